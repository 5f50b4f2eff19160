"""Who may connect: listening addresses, certificates and clients."""
