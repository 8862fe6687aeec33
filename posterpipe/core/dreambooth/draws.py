"""Every random number of a run, as a function of the seed and a position.

What belongs here: which sample comes when, its noise and timestep, how its caption varies. What
does not: what is computed from them (`batches`, `objective`).

Samples form one endless stream: position p belongs to epoch p // n, and each epoch is a permutation
of its own. Whatever is random about a sample is a function of the run's seed and its position. So a
resumed run needs no generator states, several processes share the stream by position, and a batch
of 8 sees what 8 batches of one see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from posterpipe.core.dreambooth.latents import Shape

StreamName = Literal["posters", "class_images", "holdout"]

# Streams of random numbers drawn from one seed. Those of the class images are others than those of
# the posters at the same positions.
_STEP = 2
_STREAMS: dict[StreamName, tuple[int, int]] = {
    "posters": (0, 1),
    "class_images": (3, 4),
    "holdout": (5, 6),
}


@dataclass(frozen=True)
class Draw:
    """What is random about one sample.

    index: which image. timestep: 0 to the schedule's length - 1. noise: added to the latent;
    latent_noise: with which the latent is drawn from its distribution; both float32 (channels,
    height/8, width/8). caption_seed: decides whether the caption is dropped and how it is shuffled.
    """

    index: int
    timestep: int
    noise: Tensor
    latent_noise: Tensor
    caption_seed: int


@dataclass(frozen=True)
class Stream:
    """The endless stream of samples from one set of images.

    shapes: of each image's latent. timesteps: length of the noise schedule. run_length: samples of
    one optimizer step; where shapes differ, so many successive samples have one shape if possible,
    since those of one shape go through the U-Net together. offset_noise: see `offset`.
    """

    seed: int
    name: StreamName
    shapes: tuple[Shape, ...]
    timesteps: int
    run_length: int = 1
    offset_noise: float = 0.0

    def draw(self, position: int) -> Draw:
        """The sample at `position`, counted from 0."""
        epoch, place = divmod(position, len(self.shapes))
        order_stream, sample_stream = _STREAMS[self.name]
        index = _order(self.seed, order_stream, epoch, self.shapes, self.run_length)[place]
        shape = self.shapes[index]
        generator = _generator(self.seed, sample_stream, position)
        timestep = int(torch.randint(self.timesteps, (), generator=generator))
        noise = torch.randn(*shape, generator=generator)
        latent_noise = torch.randn(*shape, generator=generator)
        caption_seed = int(torch.randint(2**31, (), generator=generator))
        if self.offset_noise:
            noise = offset(noise, torch.randn(shape[0], generator=generator), self.offset_noise)
        return Draw(index, timestep, noise, latent_noise, caption_seed)


def offset(noise: Tensor, by_channel: Tensor, amount: float) -> Tensor:
    """Noise whose channels are each shifted as a whole (N. Guttenberg 2023, Diffusion with Offset
    Noise): (channels, h, w) + amount (channels,)."""
    return noise + amount * by_channel.view(-1, 1, 1)


@lru_cache(maxsize=8)  # a batch may reach over the end of an epoch, in each stream
def _order(
    seed: int, stream: int, epoch: int, shapes: tuple[Shape, ...], run_length: int
) -> list[int]:
    generator = _generator(seed, stream, epoch)
    shuffled = torch.randperm(len(shapes), generator=generator).tolist()
    if len(set(shapes)) == 1:
        return shuffled
    # Epochs follow each other without a gap: the first places of this one may fill up the last
    # run of the one before.
    before = -epoch * len(shapes) % run_length
    return _in_runs(shuffled, shapes, run_length, before, generator)


def _in_runs(
    shuffled: list[int],
    shapes: Sequence[Shape],
    run_length: int,
    before: int,
    generator: torch.Generator,
) -> list[int]:
    """A permutation in which runs of `run_length` images, starting at place `before`, have one
    shape each; what fills no run comes first and last, sorted by shape."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    for index in shuffled:
        groups[shapes[index]].append(index)
    runs, rest = [], []
    for group in groups.values():
        full = len(group) - len(group) % run_length
        runs += [group[start : start + run_length] for start in range(0, full, run_length)]
        rest += group[full:]
    runs = [runs[place] for place in torch.randperm(len(runs), generator=generator).tolist()]
    if len(rest) < before and runs:  # the set hardly fills a run
        rest += runs.pop()
    head, tail = rest[:before], rest[before:]
    return [*head, *(index for run in runs for index in run), *tail]


def vary_caption(
    caption: str, seed: int, *, dropout: float, shuffle: bool, separator: str, kept_parts: int
) -> str:
    """The caption as one sample is trained with it: dropped ("") with the probability `dropout`,
    or its parts between separators in another order, the first `kept_parts` in their places."""
    if not dropout and not shuffle:
        return caption
    random = np.random.Generator(np.random.PCG64(seed))
    if random.random() < dropout:
        return ""
    if not shuffle:
        return caption
    parts = [part.strip() for part in caption.split(separator) if part.strip()]
    kept, moved = parts[:kept_parts], parts[kept_parts:]
    glue = separator if separator.isspace() else f"{separator} "
    return glue.join([*kept, *(moved[place] for place in random.permutation(len(moved)))])


def positions(
    step: int, *, micro_step: int, micro_steps: int, process: int, processes: int, batch: int
) -> range:
    """The positions of one micro-batch. Over all micro-steps and processes of a step they are
    `micro_steps * processes * batch` successive ones."""
    start = ((step * micro_steps + micro_step) * processes + process) * batch
    return range(start, start + batch)


def step_seed(seed: int, step: int, process: int) -> int:
    """Seeds torch's global generator in one step, for models with dropout."""
    return _seed(seed, _STEP, step, process)


def _seed(seed: int, *parts: int) -> int:
    # SeedSequence takes no negative numbers; its output is the same in all versions of numpy.
    sequence = np.random.SeedSequence([seed % 2**64, *parts])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(seed: int, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, *parts))
