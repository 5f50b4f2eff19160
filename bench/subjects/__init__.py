"""What is measured: engines and servers that generate tokens for a load."""
