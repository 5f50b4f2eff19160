"""Modelling code that comes with a checkpoint, in the shape of Baichuan2's.

Written from what is published about the model (Yang et al., "Baichuan 2: Open Large-scale
Language Models", arXiv 2309.10305): one projection ``W_pack`` for queries, keys and values,
RMSNorm, SwiGLU, rotary embeddings in the 7B model and ALiBi in the 13B model, and an output
layer whose rows are normalized.
"""
