"""Metrics, logs, traces and the progress of a start."""
