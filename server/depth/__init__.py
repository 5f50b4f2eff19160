"""Which depth a request gets."""
