"""Hadamard matrices: rows of 1 and -1 that are orthogonal to each other.

Sylvester's construction gives the powers of two, Paley's two constructions give q + 1 for a prime q
with q % 4 = 3 and 2 (q + 1) for one with q % 4 = 1, and a Kronecker product multiplies sizes. That
is every hidden size that is 4 times something, but for few with a large odd factor.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from pruning.repair.errors import RepairError

if TYPE_CHECKING:
    import torch


def rotation(size: int) -> torch.Tensor:
    """Return an orthogonal float64 matrix [size, size] whose elements are all 1 / sqrt(size) large.

    Raises as :func:`check_rotation` does.
    """
    import torch

    check_rotation(size)
    factors = _factors(size)
    assert factors is not None
    result = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        result = torch.kron(result, _paley(factor) if factor > 2 else _sylvester())
    return result / math.sqrt(size)


def check_rotation(size: int) -> None:
    """Raise :class:`RepairError` for a size of which no such matrix is known here."""
    if _factors(size) is None:
        raise RepairError(
            f"hidden_size: got {size}, allowed: a product of sizes of which a Hadamard matrix is "
            "known: powers of two, 12, 20, 24, 28, 36, 44, ..."
        )


def _sylvester() -> torch.Tensor:
    import torch

    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


@cache
def _factors(size: int) -> tuple[int, ...] | None:
    """Return sizes whose product is ``size`` and that a matrix is constructed of, or None."""
    if size == 1:
        return ()
    for factor in range(size, 1, -1):
        if size % factor == 0 and (factor == 2 or _paley_prime(factor) is not None):
            rest = _factors(size // factor)
            if rest is not None:
                return (factor, *rest)
    return None


def _paley_prime(size: int) -> int | None:
    if size % 4 == 0:
        if (size - 1) % 4 == 3 and _is_prime(size - 1):
            return size - 1
        if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
            return size // 2 - 1
    return None


def _paley(size: int) -> torch.Tensor:
    """Return Paley's matrix, float64 [size, size], of the first kind or else of the second."""
    import torch

    prime = _paley_prime(size)
    assert prime is not None
    squares = {i * i % prime for i in range(1, prime)}
    signs = [0.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))]
    jacobsthal = torch.tensor(
        [[signs[(row - column) % prime] for column in range(prime)] for row in range(prime)],
        dtype=torch.float64,
    )
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = jacobsthal
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if size == prime + 1:  # here Q is skew-symmetric
        bordered[1:, 0] = -1
        return identity + bordered
    both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, both) + torch.kron(identity, diagonal)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
