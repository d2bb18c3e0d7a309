"""Split the sizes of a layer into factors, and compute the ranks of a tensor train with one core per factor."""

from __future__ import annotations

import itertools
import math

#: Maximum number of factors of a size. A size up to 2¹⁶ has at most sixteen prime factors, so more factors would be 1.
MOST_FACTORS = 16


def factorize(n: int, parts: int) -> list[int]:
    """Factor ``n`` into ``parts`` integers that are as similar as the divisors of ``n`` allow, in ascending order.

    For example, 768 in 3 parts is 8 · 8 · 12.
    """
    if parts == 1:
        return [n]
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    first = min(divisors, key=lambda d: (abs(math.log(d) - math.log(n) / parts), d))
    return sorted([first, *factorize(n // first, parts - 1)])


def train_ranks(n_cores: int, rank: int) -> list[tuple[int, int]]:
    """Return (r_{k-1}, r_k) of every core of a train whose outer ranks are 1 and whose inner ranks are ``rank``."""
    return list(itertools.pairwise([1, *[rank] * (n_cores - 1), 1]))
