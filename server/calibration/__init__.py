"""Calibration: layers and depths are measured, and plans are kept and replaced."""
