"""What operators see: metrics, logs, traces and the progress of a start."""
