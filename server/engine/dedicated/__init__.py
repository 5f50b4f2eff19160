"""One unmodified vLLM engine for each level, on a checkpoint exported at the level's depth.

It has what the elastic engine cannot have: CUDA graphs, models compiled as a whole, and any
architecture that vLLM serves. It costs one copy of the weights, one KV cache and one process for
each level, and serves no other depths than those of the levels.

A request goes to the engine that leaves out the same layers (`engine.py`). Each engine is a
`LevelEngine`, which restarts when its process has ended (`level_engine.py`). It runs a checkpoint
from the state directory (`checkpoints.py`) on its part of the machine (`resources.py`). An
unmodified vLLM cannot measure single layers, so layers are ranked with transformers, in a process
that ends with the measurement (`importance.py`). Quality comes from the level engines' own
log-probabilities (`quality.py`).
"""
