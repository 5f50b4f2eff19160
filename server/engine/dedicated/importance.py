"""Block Influence measured with transformers, in a process that ends with the measurement.

An unmodified vLLM cannot measure single layers, so transformers loads the model a second time.
That happens in another process, because the server's process would keep much of that memory.

    python -m server.engine.dedicated.importance

reads one JSON object from its standard input and writes one JSON object a line: the progress, and
at the end the result or an error.
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

# In bytes. The result is one line, with some numbers for each layer.
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
        start_new_session=True,  # so that Ctrl-C reaches only the server
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
        pass  # the process has ended, as is reported below
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
    # Anything that libraries print goes to standard error, not to the server.
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
    except Exception as error:  # transformers documents no base class of its errors
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
