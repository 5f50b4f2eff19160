"""OpenAI's API over HTTP, beside gRPC: vLLM's serving classes behind Fathom's own routes."""
