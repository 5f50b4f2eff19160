"""Numbers in the columns of tables."""

from __future__ import annotations


def short_number(value: float, num_decimals: int = 2) -> str:
    """Return a number that is not negative in at most 7 characters."""
    if value < 999.9995:
        return f"{value:.{num_decimals}f}"
    if value < 99_999.5:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e+")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa  # inf and nan have none
