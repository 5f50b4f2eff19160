"""Distributions of prompt and output lengths, in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KINDS = "16, fixed:16, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA:MAX or list:8,16,32"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths; ``kind`` is fixed, uniform, lognormal or list."""

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read one of ``KINDS``; the values of a list are used in order, over and over.

        Raises :class:`ValueError` for anything else.
        """
        kind, _, rest = text.partition(":")
        if not rest:
            kind, rest = "fixed", kind
        try:
            values = tuple(map(float, rest.split("," if kind == "list" else ":")))
        except ValueError:
            values = ()
        low_enough = all(math.isfinite(value) and value <= 2**20 for value in values)
        match kind, values:
            case ("fixed", (length,)) if length >= 1:
                valid = True
            case ("uniform", (low, high)) if 1 <= low <= high:
                valid = True
            case ("lognormal", (median, sigma, longest)) if sigma >= 0 and 1 <= median <= longest:
                valid = True
            case ("list", (_, *_)) if min(values) >= 1:
                valid = True
            case _:
                valid = False
        integers = values if kind != "lognormal" else (values[0], values[-1]) if values else ()
        if not valid or not low_enough or not all(value == int(value) for value in integers):
            raise ValueError(f"lengths: got {text!r}, allowed: {KINDS}")
        return cls(kind, values)

    def draw(self, count: int, seed: int) -> list[int]:
        """Return ``count`` lengths; the same seed gives the same ones."""
        generator = np.random.default_rng(seed)
        match self.kind:
            case "uniform":
                low, high = self.values
                uniform = generator.integers(int(low), int(high), count, endpoint=True)
                return list(map(int, uniform))
            case "lognormal":
                median, sigma, longest = self.values
                drawn = generator.lognormal(math.log(median), sigma, count)
                return list(map(int, np.clip(np.rint(drawn), 1, longest)))
            case _:
                return [int(self.values[index % len(self.values)]) for index in range(count)]

    @property
    def longest(self) -> int:
        return int(max(self.values))

    def __str__(self) -> str:
        separator = "," if self.kind == "list" else ":"
        return f"{self.kind}:{separator.join(f'{value:g}' for value in self.values)}"
