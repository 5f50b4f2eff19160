"""One vLLM engine that runs every depth, for different requests of one batch.

There is one copy of the weights and one KV cache, and no depth that the engine "is at": which
layers run is a property of each token.

How a request's depth reaches the layers, in the order of a step:

1. A request carries the layers it skips in ``SamplingParams.extra_args`` (`payload.py`).
2. Before every forward pass vLLM tells a logits processor which request sits in which row of
   the batch (`row_tracker.py`), which keeps the rows' layers in a table (`row_table.py`).
3. vLLM has the attention backend build metadata for the step (`attention.py`). From it and the
   table follow the spans of tokens that run the same layers (`token_spans.py`), and from these
   the active tokens and the KV-only tokens of each layer (`step.py`).
4. The model's forward pass (`model.py`) adds one layer after the other to the residual stream
   (`residual_stream.py`), which gathers their active tokens, runs the layers on them, and
   scatters the result. Attention sees metadata for the active tokens alone.
5. Tokens that skip a layer which later tokens of their request run write keys and values there
   (`kv_only.py`), so that these have something to look back at.

Words:

- A layer's *active tokens* are the tokens of the step that run it.
- Its *KV-only tokens* skip it, but write keys and values there: prompt tokens of a request whose
  generated tokens run the layer.
- A *subset* is some of the step's tokens, with attention metadata for them alone. One is made
  where some tokens are active and others are not.

An example: three rows, four layers. Row A generates, at full depth. Row B generates, and skips
layers 1 and 2. Row C skips layer 3 with its prompt and no layer with its generated tokens; it is
recomputed after a preemption, so its two prompt tokens and its first generated token are in one
step, as two spans.

    token       0   1   2   3   4
    row         A   B   C   C   C
    span        0   1   2   2   3      active tokens           KV-only tokens
    layer 0     x   x   x   x   x      Whole.ALL               none
    layer 1     x   .   x   x   x      subset 0, 2, 3, 4       none
    layer 2     x   .   x   x   x      subset 0, 2, 3, 4       none
    layer 3     x   x   k   k   x      subset 0, 1, 4          2, 3

``x``: the token is active, ``k``: it is KV-only, ``.``: it does nothing in this layer. What the
stream does with it:

- Layer 0 runs on the whole step: nothing is gathered.
- Layers 1 and 2 have the same active tokens, so there is one subset for both. Tokens 0, 2, 3, 4
  are gathered, go through both layers, and are scattered back. For attention the step has two
  rows: A with one token, and C with three. Token 1 passes by: row B has no keys and values in
  these layers, and never looks for any.
- Before layer 3, keys and values of the KV-only tokens 2 and 3 are computed from the stream as
  it passes by, and written to the cache. Then tokens 0, 1, 4 are gathered, run and scattered.
  For attention the step has three rows of one token each; token 4 looks back at the keys that
  tokens 2 and 3 have just left.

Had no token run a layer, its active tokens would be ``Whole.NONE``, and it would not be added.

Block Influence and quality are measured on the way, on requests that are marked for it
(`measurement.py`).
"""
