"""Evaluation of a live server by lm-evaluation-harness, over gRPC."""
