"""One unmodified vLLM engine for each level, on a checkpoint exported at the level's depth.

What the elastic engine cannot have comes with it: compiled layers, CUDA graphs, any architecture
that vLLM serves. It costs one copy of the weights, one KV cache and one process for each level,
and a depth that is no level's cannot be asked for.

The layers that a request leaves out name the engine that runs it (`engine.py`). Each engine is a
`LevelEngine`, which is started again by itself when its process has ended (`level_engine.py`), on a
checkpoint from the state directory (`checkpoints.py`) and with its part of the machine
(`resources.py`). An unmodified vLLM has no place to measure a layer at, so layers are ranked with
transformers, in a process that ends with the measurement (`importance.py`). Quality comes from
the level engines' own log-probabilities (`quality.py`).
"""
