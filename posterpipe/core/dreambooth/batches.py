"""From positions of the stream to what the U-Net reads.

What belongs here: putting samples of one shape together, each with its target and its weight in the
loss. What does not: random numbers (`draws`), formulas (`objective`), models
(`learner`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.draws import Stream, vary_caption
from posterpipe.core.dreambooth.latents import Latents
from posterpipe.core.dreambooth.objective import PredictionType
from posterpipe.training_settings import TrainingSettings


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, as one call of the U-Net takes them.

    noisy, target: float32 (batch, channels, height/8, width/8), the U-Net's input and what it is to
    predict. timesteps: int64 (batch,). weights: float32 (batch,), of each sample's squared error in
    the loss of the step. texts: a caption each.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    weights: Tensor
    texts: tuple[str, ...]

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """The same on a device, the images in that layout."""
        return Batch(
            to_device(self.noisy, device).to(memory_format=memory_format),
            to_device(self.target, device).to(memory_format=memory_format),
            to_device(self.timesteps, device),
            to_device(self.weights, device),
            self.texts,
        )

    def part(self, part: slice) -> Batch:
        """Some of the samples, each as it is."""
        return Batch(
            self.noisy[part],
            self.target[part],
            self.timesteps[part],
            self.weights[part],
            self.texts[part],
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for what the device is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Source:
    """A set of captioned images, and the stream of samples from it.

    weight: of its samples in the loss; 1 for the posters, the prior's weight for class images.
    """

    captions: Sequence[str]
    latents: Latents
    stream: Stream
    weight: float = 1.0


@dataclass(frozen=True)
class _Sample:
    latent: Tensor
    noise: Tensor
    timestep: int
    weight: float
    text: str


@dataclass(frozen=True)
class Feed:
    """Makes the batches of a step.

    alphas_cumprod: float32 (timesteps,), see `objective`. sources: each gives one sample a
    position, so with prior preservation every poster comes with a class image that has its own
    noise and timestep.
    """

    settings: TrainingSettings
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    sources: Sequence[Source]

    def batches(self, positions: Sequence[int], *, parts: int) -> list[Batch]:
        """The samples at some positions, one batch a shape.

        parts: into how many such calls an optimizer step is divided. The weights of all samples of
        a step and source then add up to the source's weight, before min-SNR.
        """
        samples = [
            self._sample(source, position, source.weight / (len(positions) * parts))
            for source in self.sources
            for position in positions
        ]
        return [
            _batch(group, self.prediction_type, self.alphas_cumprod, self.settings.snr_gamma)
            for group in _by_shape(samples)
        ]

    def _sample(self, source: Source, position: int, weight: float) -> _Sample:
        draw = source.stream.draw(position)
        text = vary_caption(
            source.captions[draw.index],
            draw.caption_seed,
            dropout=self.settings.caption_dropout,
            shuffle=self.settings.caption_shuffling,
            separator=self.settings.caption_separator,
            kept_parts=self.settings.caption_kept_parts,
        )
        latent = source.latents.sample(draw.index, draw.latent_noise)
        return _Sample(latent, draw.noise, draw.timestep, weight, text)


def fixed_batches(
    source: Source,
    prediction_type: PredictionType,
    alphas_cumprod: Tensor,
    *,
    timesteps_an_image: int,
    batch_size: int,
) -> list[Batch]:
    """Batches that are always the same, for the held-out loss: every image at `timesteps_an_image`
    timesteps, spread evenly over the schedule, each with its own noise. All weights add up to 1."""
    images = len(source.captions)
    samples = []
    for position in range(images * timesteps_an_image):
        draw = source.stream.draw(position)  # each epoch of the stream shows each image once
        part = position // images
        samples.append(
            _Sample(
                source.latents.sample(draw.index, draw.latent_noise),
                draw.noise,
                int((part + 0.5) * len(alphas_cumprod) / timesteps_an_image),
                1 / (images * timesteps_an_image),
                source.captions[draw.index],
            )
        )
    return [
        _batch(group[start : start + batch_size], prediction_type, alphas_cumprod, None)
        for group in _by_shape(samples)
        for start in range(0, len(group), batch_size)
    ]


def _by_shape(samples: Sequence[_Sample]) -> list[list[_Sample]]:
    groups: dict[torch.Size, list[_Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.latent.shape].append(sample)
    return list(groups.values())


def _batch(
    samples: Sequence[_Sample],
    prediction_type: PredictionType,
    alphas_cumprod: Tensor,
    snr_gamma: float | None,
) -> Batch:
    clean = torch.stack([sample.latent for sample in samples])
    noise = torch.stack([sample.noise for sample in samples])
    timesteps = torch.tensor([sample.timestep for sample in samples])
    weights = torch.tensor([sample.weight for sample in samples])
    alpha_bar = alphas_cumprod[timesteps]
    if snr_gamma is not None:
        weights = weights * objective.min_snr_weights(prediction_type, alpha_bar, snr_gamma)
    return Batch(
        noisy=objective.add_noise(clean, noise, alpha_bar),
        target=objective.target(prediction_type, clean, noise, alpha_bar),
        timesteps=timesteps,
        weights=weights,
        texts=tuple(sample.text for sample in samples),
    )
