"""Depth pruning: the importance of layers, plans of removal, and the quality that is left.

The package is a library, usable without the server. Importing it or any of its modules loads
neither torch nor transformers; functions that compute with tensors load them when called.
"""
