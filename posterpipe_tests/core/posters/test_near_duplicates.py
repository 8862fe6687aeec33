"""The search among perceptual hashes finds what comparing all with all finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from posterpipe.core.posters import near_duplicates
from posterpipe.core.posters.near_duplicates import MAX_DISTANCE, earliest_near_duplicates


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


@pytest.mark.parametrize("distance", range(1, MAX_DISTANCE + 1))
def test_every_pair_of_as_many_differing_bits_is_found(distance: int) -> None:
    rng = np.random.default_rng(distance)
    for _ in range(100):
        code = int(rng.integers(0, 2**64, dtype=np.uint64))
        other = code
        for bit in rng.choice(64, distance, replace=False):
            other ^= 1 << int(bit)
        hashes = [f"{code:016x}", f"{other:016x}"]
        assert earliest_near_duplicates(hashes, distance) == [-1, 0]
        assert earliest_near_duplicates(hashes, distance - 1) == [-1, -1]


def test_equal_hashes_name_the_first_of_them() -> None:
    assert earliest_near_duplicates(["00" * 8, "ff" * 8, "00" * 8, "00" * 8], 0) == [-1, -1, 0, 0]
    assert earliest_near_duplicates([], 4) == []


def unrelated(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    return rng.integers(0, 2**64, count, dtype=np.uint64)


def variants_of_one(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """One layout with a few bits changed, as a series of posters has."""
    codes = np.full(count, rng.integers(0, 2**64, dtype=np.uint64))
    for _ in range(6):
        codes ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    return codes


def alike_in_a_corner(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Black at the bottom, and nothing else in common."""
    return unrelated(rng, count) & np.uint64(2**64 - 2**16)


def equal_in_three_bands(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Made to be compared all with all: equal where the search looks first, and else unrelated."""
    equal = np.uint64(next(iter(near_duplicates._masks(4))))
    return unrelated(rng, count) & ~equal


def equal_in_three_bands_and_three_of_the_rest(
    rng: np.random.Generator, count: int
) -> NDArray[np.uint64]:
    """The same for the second look."""
    first = next(iter(near_duplicates._masks(4)))
    rest = [bit for bit in range(64) if not first >> bit & 1]
    second = next(iter(near_duplicates._masks(4, rest)))
    return unrelated(rng, count) & ~np.uint64(first | second)


@pytest.mark.parametrize(
    "kind", [equal_in_three_bands, equal_in_three_bands_and_three_of_the_rest, alike_in_a_corner]
)
@pytest.mark.parametrize("distance", [2, 4, 7])
def test_in_a_large_group_of_equal_bands_none_is_missed(
    kind: Callable[[np.random.Generator, int], NDArray[np.uint64]], distance: int
) -> None:
    rng = np.random.default_rng(7)
    codes = kind(rng, 700)
    for place in rng.choice(np.arange(350, 700), 60, replace=False):
        codes[place] = codes[rng.integers(0, 350)]
        for bit in rng.choice(64, rng.integers(1, distance + 2), replace=False):
            codes[place] ^= np.uint64(1) << np.uint64(bit)
    hashes = [f"{code:016x}" for code in codes.tolist()]
    found = earliest_near_duplicates(hashes, distance)
    assert found == compared_with_all(hashes, distance)
    assert sum(index >= 0 for index in found) > 20


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[NDArray[np.uint64]], int]:
    """How many pairs of some hashes are compared."""
    pairs = 0
    near = near_duplicates._near

    def counting(codes: Any, some: Any, others: Any, distance: int) -> Any:
        nonlocal pairs
        pairs += len(some)
        return near(codes, some, others, distance)

    def count(codes: NDArray[np.uint64]) -> int:
        nonlocal pairs
        pairs = 0
        earliest_near_duplicates([f"{code:016x}" for code in codes.tolist()], 4)
        return pairs

    monkeypatch.setattr(near_duplicates, "_near", counting)
    return count


@pytest.mark.parametrize("kind", [unrelated, variants_of_one, alike_in_a_corner])
def test_twice_as_many_posters_take_no_four_times_as_many_comparisons(
    kind: Callable[[np.random.Generator, int], NDArray[np.uint64]],
    compared: Callable[[NDArray[np.uint64]], int],
) -> None:
    codes = kind(np.random.default_rng(1), 20_000)
    assert compared(codes) < 3 * max(compared(codes[:10_000]), 10_000)


@pytest.mark.parametrize("kind", [equal_in_three_bands, equal_in_three_bands_and_three_of_the_rest])
def test_hashes_made_to_agree_in_the_bands_are_not_compared_all_with_all(
    kind: Callable[[np.random.Generator, int], NDArray[np.uint64]],
    compared: Callable[[NDArray[np.uint64]], int],
) -> None:
    """All with all would be 10,000 comparisons a poster."""
    assert compared(kind(np.random.default_rng(1), 20_000)) < 20_000 * 2_000


def test_ten_thousand_blank_posters_cost_nothing_special() -> None:
    assert earliest_near_duplicates(["8" + "0" * 15] * 10_000, 4)[1:] == [0] * 9_999


def test_larger_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 7 bits"):
        earliest_near_duplicates(["0" * 16], 8)
