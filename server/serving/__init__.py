"""Requests, from admission to the last token, and the service that runs them."""
