"""Measures layers and depths, and keeps and replaces what was measured."""
