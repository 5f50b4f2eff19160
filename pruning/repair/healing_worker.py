"""A process of the lowest priority that trains stand-ins of layers beside whatever else runs.

    python -m pruning.repair.healing_worker

Reads a :class:`pruning.repair.healing_job.HealingJob` as a line of JSON from its standard input,
and ends when that is closed. Writes lines of JSON to its standard output: ``{"step": n, "total":
m, "loss": nats or null, "held_out_loss": nats or null}`` after each step, and ``{"error": "..."}``
where it fails. What libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from pruning.repair.distillation import HealingStep
from pruning.repair.errors import RepairError
from pruning.repair.healing_job import HealingJob, run_job

_NICENESS = 19
# The kernel kills this process first when memory runs out.
_OOM_SCORE = "800"


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as messages:
        os.dup2(2, 1)
        os.nice(_NICENESS)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
        job = HealingJob(**json.loads(sys.stdin.buffer.readline()))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            _heal(job, messages)
        except RepairError as error:
            _tell(messages, error=str(error))
        except MemoryError:
            _tell(messages, error="memory ran out")
        except Exception as error:  # whatever transformers raises
            import traceback

            traceback.print_exc()
            _tell(messages, error=f"{type(error).__name__}: {error}")
        else:
            _end(0)
        _end(1)


def _heal(job: HealingJob, messages: IO[str]) -> None:
    import torch

    from pruning.transformers_model import load_model

    torch.set_num_threads(1)

    def on_step(step: HealingStep) -> None:
        _tell(
            messages,
            step=step.step,
            total=step.num_steps,
            loss=step.loss,
            held_out_loss=step.held_out_loss,
        )

    model = load_model(Path(job.model), job.dtype, trust=job.trust_remote_code)
    run_job(job, model, on_step)


def _tell(messages: IO[str], **message: Any) -> None:
    with suppress(BrokenPipeError):  # nobody reads any more, so this process will end
        messages.write(f"{json.dumps(message)}\n")


def _end(code: int) -> NoReturn:
    """End without waiting for the thread that reads, which would not let the interpreter end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
