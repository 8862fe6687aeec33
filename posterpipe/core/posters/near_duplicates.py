"""Which posters look like an earlier one.

What belongs here: the search among perceptual hashes. What does not: the hash itself (`images`) and
what is done about near-duplicates (they are flagged, never dropped: `landing`).

Comparing all with all would be quadratic. As in multi-index hashing (Norouzi, Punjani, Fleet 2012)
the 64 bits are cut into bands: of two hashes that differ in at most d bits, three of d + 3 bands
are equal. So for each choice of three bands only hashes that agree in all of them are compared,
and, since the earliest neighbour is all that is wanted, each with the earliest of them first and no
further than the best that it has. Many posters that resemble each other, variants of one layout,
say, therefore cost little more than as many that do not: most find an early neighbour at once.

Hashes may agree in three bands and still be far apart, many of them where pictures share a frame or
where somebody means it. What has found nothing among the first `_MANY` of such a group is compared
no further there: the bits that are left are cut into bands again, and the same holds of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 7
"""Bits; more would need more choices of bands than are quick."""

_EQUAL_BANDS = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing: 2**64 / golden ratio
_HIGH = np.uint64(0xFFFFFFFF00000000)
_MANY = 255
_PAIRS_AT_ONCE = 2_000_000
"""Bounds the memory: a pair costs about 50 bytes for a moment."""


def earliest_near_duplicates(hashes: Sequence[str], distance: int) -> list[int]:
    """For each hash, the index of the first earlier one within `distance` bits; -1 without one.

    `hashes`: 16 hex digits each, in the order in which posters count as earlier. `distance`: 0 to 7
    bits of 64. Raises ValueError for another distance.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}: 0 to {MAX_DISTANCE} bits can be searched")
    if not hashes:
        return []
    codes = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    # Equal hashes count once in the search: a thousand blank posters would be a million pairs.
    distinct, first, which = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    distinct, first, which = distinct[order], first[order], place[which]

    best = np.arange(len(distinct), dtype=np.int64)  # itself, where there is none before it
    everything = np.arange(len(distinct), dtype=np.int64)
    for mask in _masks(distance):
        _improve(best, distinct, everything, mask, distance)
    # A repeated hash resembles its own first holder, if nothing earlier.
    found = first[best][which]
    found = np.where(found == np.arange(len(codes)), -1, found)
    return [int(index) for index in found]


def _masks(distance: int, bits: Sequence[int] = range(64)) -> Iterator[int]:
    """The bits of each choice of three of the `distance` + 3 bands into which `bits` are cut.

    A band takes its bits from all over the picture: posters that are alike in a corner, black at
    the bottom, say, then agree in no band.
    """
    count = distance + _EQUAL_BANDS
    bands = [sum(1 << bit for bit in bits[begin::count]) for begin in range(count)]
    for chosen in combinations(bands, _EQUAL_BANDS):
        yield sum(chosen)


def _improve(
    best: NDArray[np.int64],
    codes: NDArray[np.uint64],
    among: NDArray[np.int64],
    mask: int,
    distance: int,
) -> None:
    """Put into `best` the first code within `distance` of each, of the codes at the places `among`
    and of these among those equal in the bits of `mask`, where it comes before the one that is
    there."""
    places = np.arange(len(among), dtype=np.int64)
    # Fewer bits than bands leave groups of few codes, since no code is there twice.
    rest = [bit for bit in range(64) if not mask >> bit & 1]
    most = _MANY if len(rest) >= distance + _EQUAL_BANDS else len(among)
    # Groups of equal bits, the earlier code first, by plain numbers, which sort quickest: a hash of
    # the bits above, the place below. Where hashes collide, groups are compared for nothing.
    equal = codes[among] & np.uint64(mask)
    packed = (equal * _MIX) & _HIGH | among.astype(np.uint64)
    packed.sort()
    order, keys = (packed & ~_HIGH).astype(np.int64), packed & _HIGH
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])
    starts = np.maximum.accumulate(np.where(begins, places, 0))
    members = places - starts  # how many of its group come before it

    tried, step = 0, 1
    open_ = np.flatnonzero(members > 0)
    while len(open_) and tried < most:
        # A few at first, since most find a neighbour among these; then twice as many each time.
        step = max(1, min(step, _PAIRS_AT_ONCE // len(open_)))
        counts = np.minimum(members[open_] - tried, step)
        queries = np.repeat(open_, counts)
        within = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
        later, earlier = order[queries], order[starts[queries] + tried + within]
        near = _near(codes, later, earlier, distance)
        np.minimum.at(best, later[near], earlier[near])
        tried += step
        step *= 2
        open_ = open_[members[open_] > tried]
        open_ = open_[order[starts[open_] + tried] < best[order[open_]]]
    if len(open_):
        still = order[np.isin(starts, starts[open_])]
        for further in _masks(distance, rest):
            _improve(best, codes, still, mask | further, distance)


def _near(
    codes: NDArray[np.uint64],
    some: NDArray[np.int64],
    others: NDArray[np.int64],
    distance: int,
) -> NDArray[np.bool_]:
    """Which of these pairs of codes differ in at most `distance` bits."""
    return np.bitwise_count(codes[some] ^ codes[others]) <= distance
