"""The search among perceptual hashes finds what comparing all with all finds."""

from __future__ import annotations

import numpy as np
import pytest

from posterpipe.core.near_duplicates import MAX_DISTANCE, _pairs, earliest_near_duplicates


def related(rng: np.random.Generator, count: int, families: int) -> list[str]:
    """Hashes of which many differ from another in a few bits, anywhere."""
    first = rng.integers(0, 2**64, families, dtype=np.uint64)
    hashes = []
    for family in rng.integers(0, families, count):
        value = int(first[family])
        for bit in rng.choice(64, rng.integers(0, 12), replace=False):
            value ^= 1 << int(bit)
        hashes.append(f"{value:016x}")
    return hashes


def compared_with_all(hashes: list[str], distance: int) -> list[int]:
    values = [int(value, 16) for value in hashes]
    return [
        next((j for j in range(i) if (values[i] ^ values[j]).bit_count() <= distance), -1)
        for i in range(len(values))
    ]


@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
def test_it_finds_exactly_what_comparing_all_with_all_finds(distance: int) -> None:
    hashes = related(np.random.default_rng(distance), 400, 40)
    found = earliest_near_duplicates(hashes, distance)
    assert found == compared_with_all(hashes, distance)
    assert 0 < sum(index >= 0 for index in found) < len(hashes)


def test_every_pair_of_seven_differing_bits_is_compared() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        code = int(rng.integers(0, 2**64, dtype=np.uint64))
        other = code
        for bit in rng.choice(64, MAX_DISTANCE, replace=False):
            other ^= 1 << int(bit)
        pairs = _pairs(np.array([code, other], dtype=np.uint64))
        assert any((1, 0) in zip(later, earlier, strict=True) for later, earlier in pairs)


def test_equal_hashes_name_the_first_of_them() -> None:
    assert earliest_near_duplicates(["00" * 8, "ff" * 8, "00" * 8, "00" * 8], 0) == [-1, -1, 0, 0]
    assert earliest_near_duplicates([], 4) == []


def test_few_of_all_pairs_are_compared() -> None:
    count = 20_000
    codes = np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64)
    compared = sum(len(later) for later, _ in _pairs(codes))
    assert compared < count * count / 2 / 500


def test_ten_thousand_blank_posters_cost_nothing_special() -> None:
    assert earliest_near_duplicates(["8" + "0" * 15] * 10_000, 4)[1:] == [0] * 9_999


def test_larger_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 7 bits"):
        earliest_near_duplicates(["0" * 16], 8)
