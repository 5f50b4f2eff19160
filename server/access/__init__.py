"""Who may connect, and who may write what the server runs."""
