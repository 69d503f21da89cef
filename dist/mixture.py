"""Several sources in one order: exact integer proportions, in closed form, with an inverse.

The stream is cut into units: a sample each in the global order, C samples (one of each lane) in
the windowed one, so that lanes stay whole. Within a stage a periodic pattern says whose unit each
is; the k-th unit of a source reads samples [k * C, (k + 1) * C) of the source's own order, so a
source has epochs of its own. A stage begins at a unit with the counts that the stages before it
came to: weights may change, and sources may be added, with no row of an epoch repeated or skipped.

The pattern is Tijdeman's chairman assignment (R. Tijdeman, "The chairman assignment problem",
Discrete Math. 32, 1980): after every n units a source of weight w has had n * w of them to within
1 - 1 / (2k - 2), k sources. Golden values in tests/golden/mixture_v1.json hold it for ever.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError

I64 = NDArray[np.int64]
LARGEST_PERIOD = 1 << 16
NEVER = -1


def integer_weights(weights: Mapping[str, float]) -> list[int]:
    """Weights as integers without a common factor and with a sum of at most 2**16.

    Weights that decimals of that size can say are exact (0.7, 0.2, 0.1 are 7, 2, 1); others are
    rounded by largest remainders. ConfigError for a weight that is negative or no number, for
    all 0, and for one that would be rounded to 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"the weight of the source {name} is {weight}; it must be a number of at least 0"
            )
    exact = [Fraction(str(weight)) for weight in weights.values()]
    if not any(exact):
        raise ConfigError(
            f"all sources ({', '.join(weights)}) have weight 0: nothing is trained on"
        )
    scale = math.lcm(*(one.denominator for one in exact))
    whole = [int(one * scale) for one in exact]
    whole = [one // math.gcd(*whole) for one in whole]
    if sum(whole) > LARGEST_PERIOD:
        shares = [one * LARGEST_PERIOD / sum(exact) for one in exact]
        whole = [int(share) for share in shares]
        by_rest = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
        for i in by_rest[: LARGEST_PERIOD - sum(whole)]:
            whole[i] += 1
        whole = [one // math.gcd(*whole) for one in whole]
    for name, given, found in zip(weights, exact, whole, strict=True):
        if given and not found:
            raise ConfigError(
                f"the weight of the source {name} is below 1/{LARGEST_PERIOD} of all; set it to 0, "
                "or make it larger"
            )
    return whole


@dataclass(frozen=True)
class Pattern:
    """One period of a stage."""

    source: I64
    """(period,) whose unit it is."""
    rank: I64
    """(period,) units of that source before it in the period."""
    places: tuple[I64, ...]
    """For each source (weight,): where its units stand in the period."""


@lru_cache(maxsize=32)
def pattern_of(weights: tuple[int, ...]) -> Pattern:
    """The sequence of a stage's units; any prefix is within 1 of the weights.

    The j-th unit of a source of share w may come at place n (from 1) with n * w >= j + e and must
    by n * w <= j + 1 - e, e = 1 / (2k - 2); unit jobs with integer times: the earliest deadline
    first meets all if any schedule does, and Tijdeman shows that one does.
    """
    period = sum(weights)
    active = [i for i, weight in enumerate(weights) if weight]
    e = max(2 * len(active) - 2, 1)
    slack = 1 if len(active) > 1 else 0

    def release(i: int, j: int) -> int:
        return -(-(j * e + slack) * period // (weights[i] * e))

    def deadline(i: int, j: int) -> int:
        return ((j + 1) * e - slack) * period // (weights[i] * e)

    due: list[list[tuple[int, int, int]]] = [[] for _ in range(period + 1)]
    for i in active:
        due[max(release(i, 0), 1)].append((deadline(i, 0), i, 0))
    ready: list[tuple[int, int, int]] = []
    source = np.empty(period, np.int64)
    rank = np.empty(period, np.int64)
    for n in range(1, period + 1):
        for job in due[n]:
            heapq.heappush(ready, job)
        _, i, j = heapq.heappop(ready)
        source[n - 1], rank[n - 1] = i, j
        if j + 1 < weights[i]:
            due_at = max(release(i, j + 1), n + 1)
            due[due_at].append((deadline(i, j + 1), i, j + 1))
    places = tuple(np.flatnonzero(source == i) for i in range(len(weights)))
    return Pattern(source, rank, places)


class Mixture:
    """Whose unit each is, over all stages.

    stages: dicts {unit, weights, counts}, by unit, the first at 0: from which unit on, integers,
    and the units of each source before it. A source that a stage does not know yet is not in it.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]]) -> None:
        self.stages = list(stages)
        starts = [int(stage["unit"]) for stage in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"stages begin at units {starts}; they must rise from 0")
        self._starts = np.array(starts, np.int64)
        self.num_sources = len(self.stages[-1]["weights"])

    def at(self, unit: I64) -> tuple[I64, I64]:
        """(source, which of its units) of units (k,)."""
        unit = np.asarray(unit, np.int64)
        number = np.searchsorted(self._starts, unit, side="right") - 1
        source, count = np.empty_like(unit), np.empty_like(unit)
        for n in np.unique(number):
            here, stage = number == n, self.stages[n]
            weights = np.array(stage["weights"], np.int64)
            pattern = pattern_of(tuple(stage["weights"]))
            cycle, place = np.divmod(unit[here] - self._starts[n], len(pattern.source))
            whose = pattern.source[place]
            counts = np.array(stage["counts"], np.int64)
            source[here] = whose
            count[here] = counts[whose] + cycle * weights[whose] + pattern.rank[place]
        return source, count

    def counts_at(self, unit: int) -> list[int]:
        """Units of each source before a unit."""
        number = int(np.searchsorted(self._starts, unit, side="right")) - 1
        stage = self.stages[number]
        pattern = pattern_of(tuple(stage["weights"]))
        cycle, place = divmod(unit - int(self._starts[number]), len(pattern.source))
        within = np.bincount(pattern.source[:place], minlength=len(stage["weights"]))
        counts = [
            count + cycle * weight + int(more)
            for count, weight, more in zip(stage["counts"], stage["weights"], within, strict=True)
        ]
        return counts + [0] * (self.num_sources - len(counts))

    def units_of(self, source: int, count: I64) -> I64:
        """At which units a source's units `count` (k,) come, (k,); NEVER where they do not."""
        found = np.full(len(count), NEVER, np.int64)
        for number, stage in enumerate(self.stages):
            if source >= len(stage["weights"]) or not stage["weights"][source]:
                continue
            pattern = pattern_of(tuple(stage["weights"]))
            since = count - stage["counts"][source]
            cycle, j = np.divmod(since, stage["weights"][source])
            unit = stage["unit"] + cycle * len(pattern.source) + pattern.places[source][j]
            last = number + 1 == len(self.stages)
            here = (since >= 0) & (last | (unit < (0 if last else self._starts[number + 1])))
            found[here] = unit[here]
        return found


def with_stage(stages: Sequence[Mapping[str, Any]], unit: int, weights: list[int]) -> list[Any]:
    """`stages` with another one from `unit` on, in place of those that would begin later.

    weights: of the sources so far, in their order, and of added ones after them.
    """
    before = [dict(stage) for stage in stages if stage["unit"] < unit]
    counts = Mixture(before).counts_at(unit) if before else []
    counts += [0] * (len(weights) - len(counts))
    return [*before, {"unit": unit, "weights": weights, "counts": counts}]
