"""Block Influence as the paper writes it, for comparing costs.

    python -m bench.formula MODEL DTYPE WINDOWS

Uses all hidden states that transformers returns, and prints scores, seconds and peak memory as
JSON. The last entry of ``output_hidden_states`` has gone through the final norm, so the score of
the last layer is wrong here, but the cost is right. WINDOWS is a JSON file of token ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.memory import PeakMemory


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory, dtype, windows_file = sys.argv[1:]
    windows: list[list[int]] = json.loads(Path(windows_file).read_text())
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=getattr(torch, dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with PeakMemory([psutil.Process()]) as memory, torch.inference_mode():
        begin = time.perf_counter()
        sums: list[float] = []
        num_tokens = 0
        for window in windows:
            ids = torch.tensor([window], device=model.device)
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            similarities = [
                torch.cosine_similarity(a, b, dim=-1).sum().item() for a, b in pairwise(states)
            ]
            sums = [
                a + b for a, b in zip(sums or [0.0] * len(similarities), similarities, strict=True)
            ]
            num_tokens += len(window)
        seconds = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "scores": [1 - total / num_tokens for total in sums],
                "seconds": seconds,
                "added_peak_bytes": memory.added,
            }
        )
    )


if __name__ == "__main__":
    main()
