"""A trial of patterns, before the engine compiles them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from contextlib import suppress

from server.engine.base import Structure, StructureKind
from server.errors import InvalidArgument

# Compiled by the engine, a pattern takes as long again, and others wait for their own meanwhile.
_SECONDS = 5.0
# For the process to load its libraries and the tokenizer.
_START_SECONDS = 120.0
_NUM_KNOWN = 1024
_FIELD = "structure"
# These have no pattern that could be large when it is compiled.
_SAFE = {StructureKind.CHOICE, StructureKind.JSON_OBJECT}


class PatternCheck:
    """Compiles each new pattern in a process of its own, within limits of time and memory.

    A small pattern may take for ever to compile, and all memory. The engine and the server would
    not live through it; this process is replaced.
    """

    def __init__(self, model: str, vocab_size: int, *, seconds: float = _SECONDS) -> None:
        """``model`` is the directory of the tokenizer."""
        self._arguments = [model, str(vocab_size)]
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        # Patterns that were compiled, the latest last.
        self._known: OrderedDict[Structure, None] = OrderedDict()

    async def check(self, structure: Structure) -> None:
        """Raise :class:`InvalidArgument` for a pattern that is wrong, or takes too much."""
        if structure.kind in _SAFE:
            return
        if structure in self._known:
            self._known.move_to_end(structure)
            return
        async with self._turn:
            try:
                problem = await self._try(structure)
            except BaseException:
                await self.close()  # an answer may be under way, which the next would take for its
                raise
        if problem is not None:
            raise InvalidArgument(_FIELD, structure.pattern, f"what can be compiled ({problem})")
        self._known[structure] = None
        if len(self._known) > _NUM_KNOWN:
            self._known.popitem(last=False)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _try(self, structure: Structure) -> str | None:
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._start()
        assert process.stdin is not None
        line = json.dumps([structure.kind.value, structure.pattern]) + "\n"
        process.stdin.write(line.encode())
        try:
            answer = await asyncio.wait_for(_line(process), self._seconds)
        except TimeoutError:
            await self.close()
            return f"it takes more than {self._seconds:g} s"
        if answer is None:
            await self.close()
            return "it takes too much memory"
        return None if answer == "null" else str(json.loads(answer))[:300]

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "server.engine.pattern_worker",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            # Ctrl-C reaches every process of a terminal's group.
            start_new_session=True,
        )
        if await asyncio.wait_for(_line(process), _START_SECONDS) is None:
            raise RuntimeError("the process that compiles patterns has ended")
        return process


async def _line(process: asyncio.subprocess.Process) -> str | None:
    """Return the next line of the process; None if it has ended."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    return line.decode().strip() if line else None
