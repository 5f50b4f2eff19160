"""One vLLM engine that runs every depth, for different requests of one batch.

How a request's depth reaches the layers, in the order of a step:

1. A request carries the layers it skips in ``SamplingParams.extra_args`` (`payload.py`).
2. vLLM tells a logits processor which request sits in which row of the batch, before every
   forward pass (`row_tracker.py`). The rows' layer choices are kept in a table
   (`row_table.py`).
3. The attention backend's metadata builder hands the step's metadata on (`attention.py`).
   From it and the table follow the spans of tokens that share a choice of layers
   (`token_spans.py`), and for each layer the tokens that run it.
4. The model's forward pass walks the layers (`model.py`). A layer that every token runs is run
   as usual and one that no token runs is passed over. Otherwise the tokens that run it are
   gathered (`residual_stream.py`), and attention sees metadata for those alone.
5. A prompt token that skips a layer which the request's generated tokens run leaves its keys
   and values there.

Block Influence and quality are measured on the way, on requests that are marked for it
(`measurement.py`). There is one copy of the weights and one KV cache; no state says which depth
the engine "is at".
"""
