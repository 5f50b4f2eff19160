"""The layers' importance measured with transformers, in a process that ends with the measurement.

An unmodified vLLM cannot measure single layers, so transformers loads the model a second time.
That happens in another process, because the server's process would keep much of that memory.

    python -m server.engine.dedicated.importance

reads one JSON object from its standard input and writes one JSON object a line: the progress, what
some groups of windows add up to, or an error, which is the last.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pruning.layer_means import ImportanceError
from pruning.metrics import DensePassSums
from server.engine.base import IsEnough, ProgressCallback
from server.engine.measuring import importance_parts
from server.errors import FailedPrecondition

# In bytes. A line has some numbers for each pair of layers, for some groups.
_LINE_LIMIT = 1 << 26


async def measure_in_process(
    model: Path,
    windows: Sequence[Sequence[int]],
    progress: ProgressCallback,
    is_enough: IsEnough,
    *,
    dtype: str,
    trust_remote_code: bool,
) -> list[DensePassSums]:
    """Measure as :meth:`server.engine.base.Engine.measure_importance`, in a process of its own.

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
        num_tokens = sum(map(len, windows))
        groups: list[DensePassSums] = []
        async for line in process.stdout:
            message = json.loads(line)
            if "done" in message:
                progress(message["done"], num_tokens)
            elif "groups" in message:
                groups += [DensePassSums(**sums) for sums in message["groups"]]
                if message["last"] or await is_enough(groups):
                    progress(num_tokens, num_tokens)
                    return groups
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

    from pruning.metrics import measure_dense_pass_sums
    from pruning.transformers_model import batches, load_model

    try:
        model = load_model(Path(job["model"]), job["dtype"], trust=job["trust_remote_code"])
        done = 0
        parts = list(importance_parts(job["windows"]))
        for part in parts:
            groups = []
            for group in part:
                sums = measure_dense_pass_sums(model, batches(group, model.device))
                groups.append(asdict(sums))
                done += sum(map(len, group))
                tell({"done": done})
            tell({"groups": groups, "last": part is parts[-1]})
    except Exception as error:  # transformers documents no base class of its errors
        tell({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
