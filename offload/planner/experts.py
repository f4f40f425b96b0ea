"""How many rows each expert of a mixture gets, where every token chooses some of them and none is preferred.

Of E experts a token chooses k. Over T tokens an expert's rows are binomial, T times with k / E; E (1 - (1 - k/E)^T)
experts get any at all. A product's seconds are no straight line over its rows, so a price takes the expectation over
all counts and not the price of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, lgamma, log, log1p, sqrt

_REACH = 6.0  # standard deviations on each side: what lies beyond weighs less than 1e-8


def rows_of_experts(experts: int, chosen: int, tokens: int) -> Iterator[tuple[int, float]]:
    """(rows, expected number of experts that get so many), for rows above 0.

    Args:
        experts, chosen: how many there are, and how many a token uses.
        tokens: of all sequences together.
    """
    share = chosen / experts
    if share >= 1:
        yield tokens, float(experts)
        return
    mean, width = tokens * share, _REACH * sqrt(tokens * share * (1 - share)) + _REACH
    for rows in range(max(1, int(mean - width)), min(tokens, int(mean + width) + 1) + 1):
        ways = lgamma(tokens + 1) - lgamma(rows + 1) - lgamma(tokens - rows + 1)
        yield rows, experts * exp(ways + rows * log(share) + (tokens - rows) * log1p(-share))


def different_rows(experts: int, chosen: int, tokens: int, layers: int, are_made: Callable[[int], bool]) -> float:
    """How many different numbers of rows the experts of all layers are expected to get, of those that `are_made`."""
    found = ((rows, count / experts) for rows, count in rows_of_experts(experts, chosen, tokens) if are_made(rows))
    return sum(1 - (1 - part) ** (layers * experts) for _, part in found)
