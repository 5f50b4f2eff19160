"""The subjects of measurements: engines and servers that generate tokens for a load."""
