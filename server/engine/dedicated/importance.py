"""Ranks layers with transformers, in a process that ends with the measurement.

An unmodified vLLM has no place to measure a layer at. The model is loaded a second time for it,
so not in the server's process, which would keep much of that memory.

    python -m server.engine.dedicated.importance

reads one JSON object from its standard input and writes one for each line of its output: how far
it is, at last the sums or an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruning.importance import BlockInfluence, ImportanceError
from server.engine.base import ProgressCallback
from server.errors import FailedPrecondition

# The result has one line with numbers for each layer.
_LINE_LIMIT = 1 << 24


async def measure_in_process(
    model: Path,
    windows: Sequence[Sequence[int]],
    progress: ProgressCallback,
    *,
    dtype: str,
    trust_remote_code: bool,
) -> BlockInfluence:
    """Measure the Block Influence of every layer in a process of its own.

    Cancelling ends that process. Raises :class:`ImportanceError` for a model whose layers cannot
    be ranked, :class:`FailedPrecondition` where the measurement fails otherwise.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
        start_new_session=True,  # Ctrl-C is for the server
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        job = {
            "model": str(model),
            "windows": [list(window) for window in windows],
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        process.stdin.write(json.dumps(job).encode())
        await process.stdin.drain()
        process.stdin.close()
        async for line in process.stdout:
            message = json.loads(line)
            if "done" in message:
                progress(message["done"], message["total"])
            elif "importance" in message:
                found = message["importance"]
                return BlockInfluence(
                    tuple(found["scores"]), tuple(found["stderrs"]), found["num_tokens"]
                )
            else:
                raise ImportanceError(message["error"])
    except (BrokenPipeError, ConnectionResetError):
        pass  # it has ended
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    raise FailedPrecondition(
        "the process that ranks the layers ended before it was done, with code "
        f"{process.returncode}; where memory is short, --plan takes a ranking made elsewhere"
    )


def main() -> None:
    """Measure what standard input asks for."""
    job = json.load(sys.stdin)
    # What libraries print is not for the server to read.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict[str, Any]) -> None:
        out.write(f"{json.dumps(message)}\n")
        out.flush()

    from pruning.importance import measure_block_influence
    from pruning.transformers_model import batches, load_model

    try:
        model = load_model(Path(job["model"]), job["dtype"], trust=job["trust_remote_code"])
        influence = measure_block_influence(
            model,
            batches(
                job["windows"],
                model.device,
                lambda done, total: tell({"done": done, "total": total}),
            ),
        )
    except Exception as error:  # there is no telling what transformers may find
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    tell(
        {
            "importance": {
                "scores": influence.scores,
                "stderrs": influence.stderrs,
                "num_tokens": influence.num_tokens,
            }
        }
    )


if __name__ == "__main__":
    main()
