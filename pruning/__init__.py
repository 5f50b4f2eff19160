"""Depth pruning: which layers matter, which to leave out, and what that costs.

Usable as a library without the server: importing it, or any of its modules, loads neither
torch nor transformers; the functions that compute with tensors do so when they are called.
"""
