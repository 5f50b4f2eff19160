"""A process that quantizes one checkpoint with GPTQModel.

    python -m pruning.quantization.worker DESCRIPTOR

Reads a :class:`pruning.quantization.worker_process.Request` as a line of JSON from its standard
input, and ends when that is closed. Writes to DESCRIPTOR lines of JSON: ``{"done": n, "total": m}``
after each layer, or ``{"error": "..."}``. GPTQModel's own output goes elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_SEED = 0
# The kernel kills this process first when memory runs out.
_OOM_SCORE = "800"


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as messages:
        request = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
        try:
            _quantize(request, messages)
        except MemoryError:
            _tell(messages, error="memory ran out")
            sys.exit(1)
        except Exception as error:  # whatever GPTQModel and transformers raise
            import traceback

            traceback.print_exc()
            _tell(messages, error=f"{type(error).__name__}: {error}")
            sys.exit(1)
        sys.stdout.flush()
        # GPTQModel's thread pools take seconds to end, and have no work left.
        os._exit(0)


def _quantize(request: dict[str, Any], messages: IO[str]) -> None:
    # Optional for the packages that import it; its import is slow, and warns where there is no GPU.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]

    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    config: Any = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=True,
        desc_act=request["act_order"],
        # Without this, a group's columns would be scattered, which vLLM's kernels cannot read.
        static_groups=request["act_order"],
        act_group_aware=not request["act_order"] and request["group_size"] != -1,
        offload_to_disk_path=request["scratch"],
    )
    model = GPTQModel.load(
        request["source"], config, trust_remote_code=request["trust_remote_code"]
    )
    total = _num_layers(model.model.config)

    def on_layer(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            _tell(messages, done=min(layer_idx + 1, total), total=total)

    model.layer_callback = on_layer
    _tell(messages, done=0, total=total)
    model.quantize(
        [
            {
                "input_ids": torch.tensor([window]),
                "attention_mask": torch.ones(1, len(window), dtype=torch.long),
            }
            for window in request["windows"]
        ],
        batch_size=1,
        calibration_data_min_length=0,  # a text of short lines alone is text, too
    )
    model.save(request["out"])


def _num_layers(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _tell(messages: IO[str], **message: object) -> None:
    with suppress(BrokenPipeError):  # nobody reads any more, so this process will end
        messages.write(f"{json.dumps(message)}\n")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
