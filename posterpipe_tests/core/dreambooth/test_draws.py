"""Random numbers as functions of seed and position: each sample once an epoch, the right
distributions, buckets, captions that vary."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posterpipe.core.dreambooth.draws import Draw, Stream, StreamName, positions, vary_caption

SHAPE = (2, 3, 2)
WIDE, TALL, SQUARE = (4, 4, 8), (4, 8, 4), (4, 6, 6)


def stream(
    seed: int = 7, *, name: StreamName = "posters", images: int = 5, offset_noise: float = 0.0
) -> Stream:
    return Stream(seed, name, (SHAPE,) * images, timesteps=1000, offset_noise=offset_noise)


def sample(position: int, seed: int = 7) -> Draw:
    return stream(seed).draw(position)


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    epochs = [[sample(p).index for p in range(e * 5, e * 5 + 5)] for e in range(8)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_a_sample_is_a_function_of_seed_and_position_alone() -> None:
    before = sample(12)
    torch.manual_seed(99)
    sample(3)
    after = sample(12)
    assert (before.index, before.timestep) == (after.index, after.timestep)
    assert torch.equal(before.noise, after.noise)
    assert not torch.equal(before.noise, sample(12, seed=8).noise)
    assert not torch.equal(before.noise, before.latent_noise)
    assert torch.equal(sample(1, seed=-1).noise, sample(1, seed=-1).noise)


def test_posters_and_class_images_have_noise_of_their_own() -> None:
    poster, other = stream().draw(3), stream(name="class_images").draw(3)
    assert not torch.equal(poster.noise, other.noise)
    pairs = [(stream().draw(p), stream(name="class_images").draw(p)) for p in range(40)]
    assert sum(a.timestep == b.timestep for a, b in pairs) < 5


def test_timesteps_and_noise_follow_their_distributions() -> None:
    draws = [sample(p) for p in range(2000)]
    timesteps = torch.tensor([d.timestep for d in draws], dtype=torch.float64)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # Uniform on 0..999: mean 499.5, standard error 289 / sqrt(2000) = 6.5.
    assert abs(timesteps.mean().item() - 499.5) < 4 * 6.5
    noise = torch.stack([d.noise for d in draws])
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_offset_noise_moves_each_channel_as_a_whole() -> None:
    for position in range(5):
        plain, moved = stream().draw(position), stream(offset_noise=0.5).draw(position)
        difference = moved.noise - plain.noise
        assert torch.allclose(difference, difference[:, :1, :1].expand(SHAPE))
        assert moved.timestep == plain.timestep
        assert torch.equal(moved.latent_noise, plain.latent_noise)
    shifts = torch.stack(
        [stream(offset_noise=0.1).draw(p).noise - stream().draw(p).noise for p in range(1000)]
    )[:, :, 0, 0]
    # 2,000 numbers: standard error of the standard deviation 0.1 / sqrt(4000) = 0.0016.
    assert shifts.std().item() == pytest.approx(0.1, abs=0.0065)


@pytest.mark.parametrize(("micro_steps", "processes"), [(1, 1), (4, 1), (1, 2), (2, 3)])
def test_micro_steps_and_processes_share_one_stream(micro_steps: int, processes: int) -> None:
    seen = Counter(
        position
        for step in range(5)
        for micro_step in range(micro_steps)
        for process in range(processes)
        for position in positions(
            step,
            micro_step=micro_step,
            micro_steps=micro_steps,
            process=process,
            processes=processes,
            batch=3,
        )
    )
    assert seen == Counter(range(5 * micro_steps * processes * 3))


@settings(max_examples=60)
@given(st.lists(st.sampled_from([WIDE, TALL, SQUARE]), min_size=1, max_size=40), st.integers(1, 9))
def test_with_buckets_each_epoch_still_shows_each_image_once(
    shapes: list[tuple[int, int, int]], run_length: int
) -> None:
    samples = Stream(1, "posters", tuple(shapes), timesteps=1000, run_length=run_length)
    for epoch in range(3):
        first = epoch * len(shapes)
        seen = [samples.draw(p).index for p in range(first, first + len(shapes))]
        assert sorted(seen) == list(range(len(shapes)))
        assert samples.draw(first).noise.shape == shapes[samples.draw(first).index]


def test_most_batches_have_one_shape() -> None:
    shapes = (WIDE,) * 37 + (TALL,) * 51 + (SQUARE,) * 12
    samples = Stream(1, "posters", shapes, timesteps=1000, run_length=4)
    batches = [
        {shapes[samples.draw(p).index] for p in range(start, start + 4)}
        for start in range(0, 3000, 4)
    ]
    alike = sum(len(batch) == 1 for batch in batches) / len(batches)
    # Of an epoch's 25 batches, what is left over of three shapes fills two or three.
    assert alike > 0.85


def test_buckets_come_in_an_order_of_their_own_each_epoch() -> None:
    shapes = (WIDE,) * 16 + (TALL,) * 16
    samples = Stream(1, "posters", shapes, timesteps=1000, run_length=4)
    orders = {
        tuple(shapes[samples.draw(e * 32 + start).index] for start in range(0, 32, 4))
        for e in range(6)
    }
    assert len(orders) > 3


def vary(seed: int, *, dropout: float = 0.0, shuffle: bool = False, kept: int = 1) -> str:
    return vary_caption(
        "a poster, red, a rocket, minimalist",
        seed,
        dropout=dropout,
        shuffle=shuffle,
        separator=",",
        kept_parts=kept,
    )


def test_captions_stay_as_they_are_by_default() -> None:
    assert {vary(seed) for seed in range(20)} == {"a poster, red, a rocket, minimalist"}


@pytest.mark.parametrize("shuffle", [False, True], ids=["in their order", "shuffled"])
def test_captions_are_dropped_as_often_as_asked(shuffle: bool) -> None:
    dropped = sum(vary(seed, dropout=0.1, shuffle=shuffle) == "" for seed in range(4000))
    # Binomial: standard deviation sqrt(4000 * 0.1 * 0.9) = 19.
    assert abs(dropped - 400) < 4 * 19
    assert all(vary(seed, dropout=1.0) == "" for seed in range(20))


def test_shuffling_moves_all_parts_but_the_kept_ones() -> None:
    texts = [vary(seed, shuffle=True) for seed in range(600)]
    parts = [text.split(", ") for text in texts]
    assert all(sorted(p) == ["a poster", "a rocket", "minimalist", "red"] for p in parts)
    assert all(p[0] == "a poster" for p in parts)
    counts = Counter(texts)
    # Six orders, each expected 100 times: standard deviation 9.
    assert len(counts) == 6
    assert all(abs(count - 100) < 4 * 9.2 for count in counts.values())
    assert {vary(seed, shuffle=True, kept=0).split(", ")[0] for seed in range(60)} == {
        "a poster",
        "red",
        "a rocket",
        "minimalist",
    }


def test_a_caption_of_one_part_survives_shuffling() -> None:
    text = vary_caption("a red rocket", 3, dropout=0, shuffle=True, separator=",", kept_parts=1)
    assert text == "a red rocket"
