"""Throw many requests at the code that reads them.

    python -m tests.fuzz [--cases 100000] [--seed 0] [--random]

Each case is some bytes, half of them taken for a request as they are, half as instructions for
making one. With atheris, where it is installed, coverage of the server's code leads from one case
to the next. Otherwise, and with ``--random``, they are random; those that are taken as they are
come from a request in which some bytes were changed, since others hardly ever can be read.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from collections import Counter

MAX_BYTES = 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="without atheris")
    arguments = parser.parse_args()
    guided = importlib.util.find_spec("atheris") is not None and not arguments.random
    if guided:
        _guided(arguments.cases, arguments.seed)
    else:
        if not arguments.random:
            print("atheris is not installed: the cases are random")
        _random(arguments.cases, arguments.seed)


def _random(cases: int, seed: int) -> None:
    from tests.fuzz.target import check_raw, check_structured

    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for case in range(cases):
        data = rng.randbytes(rng.randrange(MAX_BYTES))
        check = check_raw if case % 2 else check_structured
        if check is check_raw:
            data = _damaged(data, rng)
        try:
            accepted = check(data)
        except Exception:
            print(f"case {case} of seed {seed}: {check.__name__}({data!r})")
            raise
        counts["accepted" if accepted else "refused"] += 1
    print(
        f"{cases:,} cases in {time.monotonic() - started:.1f} s: {counts['accepted']:,} accepted, "
        f"{counts['refused']:,} refused, none failed"
    )


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the request that ``data`` stands for, with some bytes changed."""
    from tests.fuzz.messages import request_from

    content = bytearray(request_from(data).SerializeToString())
    for _ in range(rng.randrange(4) if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _guided(cases: int, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["server", "tests.fuzz"]):
        from tests.fuzz.target import check_raw, check_structured

    def one(data: bytes) -> None:
        (check_raw if data[:1] and data[0] % 2 else check_structured)(data[1:])

    # atheris ends the process: with 0 after all runs, with another code at the first failure.
    options = [
        f"-runs={cases}",
        f"-seed={seed + 1}",
        f"-max_len={MAX_BYTES}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
