"""Which posters look like an earlier one.

What belongs here: the search among perceptual hashes. What does not: the hash itself (`images`) and
what is done about near-duplicates (they are flagged, never dropped: `landing`).

Comparing all with all would be quadratic. Multi-index hashing (Norouzi, Punjani, Fleet 2012) cuts
the 64 bits into four bands: of two hashes that differ in at most seven bits, one band differs in at
most one bit. So only hashes that share a band, or a band with one bit flipped, are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 7
"""Bits; more would need other bands."""

_BANDS = 4
_BAND_BITS = 16
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

    none = len(codes)
    earliest = np.full(len(distinct), none, dtype=np.int64)
    for queries, candidates in _pairs(distinct):
        near = np.bitwise_count(distinct[queries] ^ distinct[candidates]) <= distance
        np.minimum.at(earliest, queries[near], first[candidates[near]])
    # A repeated hash resembles its own first holder, if nothing earlier.
    found = np.minimum(earliest, first)[which]
    found = np.where(found == np.arange(len(codes)), -1, found)
    return [int(index) for index in found]


def _pairs(codes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of indices (later, earlier) of codes that may be within MAX_DISTANCE, in parts.

    A pair may come several times, and every pair within MAX_DISTANCE comes at least once.
    """
    everyone = np.arange(len(codes), dtype=np.int64)
    flips = np.array([0, *(1 << bit for bit in range(_BAND_BITS))], dtype=np.int64)
    for band in range(_BANDS):
        shift = np.uint64(band * _BAND_BITS)
        values = ((codes >> shift) & np.uint64(2**_BAND_BITS - 1)).astype(np.int64)
        members = np.argsort(values, kind="stable")  # within a bucket, the earlier first
        counts = np.bincount(values, minlength=2**_BAND_BITS)
        starts = np.cumsum(counts) - counts
        for flip in flips:
            targets = values ^ flip
            lengths = counts[targets]
            ends = np.cumsum(lengths)
            begin = 0
            while begin < len(codes):
                done = ends[begin - 1] if begin else 0
                stop = int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right"))
                stop = max(stop, begin + 1)
                part = lengths[begin:stop]
                queries = np.repeat(everyone[begin:stop], part)
                within = np.arange(len(queries)) - np.repeat(np.cumsum(part) - part, part)
                candidates = members[np.repeat(starts[targets[begin:stop]], part) + within]
                earlier = candidates < queries
                yield queries[earlier], candidates[earlier]
                begin = stop
