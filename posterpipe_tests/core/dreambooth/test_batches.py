"""What goes through the U-Net, and with which weight, by hand."""

from __future__ import annotations

import pytest
import torch

from posterpipe.core.dreambooth.batches import Batch, Feed, Source, fixed_batches
from posterpipe.core.dreambooth.draws import Stream, StreamName
from posterpipe.core.dreambooth.latents import Latents, Shape
from posterpipe.core.dreambooth.objective import PredictionType
from posterpipe.training_settings import TrainingSettings

ALPHAS_CUMPROD = torch.linspace(0.999, 0.001, 1000)
WIDE, TALL = (4, 2, 4), (4, 4, 2)


def source(name: StreamName, shapes: list[Shape], weight: float = 1.0) -> Source:
    generator = torch.Generator().manual_seed(len(shapes))
    means = [torch.randn(shape, generator=generator) for shape in shapes]
    latents = Latents(means, [torch.full_like(mean, 0.1) for mean in means])
    stream = Stream(1, name, tuple(shapes), timesteps=1000, run_length=4)
    return Source([f"{name} {n}" for n in range(len(shapes))], latents, stream, weight)


def feed(
    *sources: Source, prediction_type: PredictionType = "v_prediction", **settings: object
) -> Feed:
    return Feed(TrainingSettings(**settings), prediction_type, ALPHAS_CUMPROD, sources)


def weights(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.weights for batch in batches])


def test_noise_target_and_timestep_belong_together() -> None:
    posters = source("posters", [WIDE] * 5)
    (batch,) = feed(posters, prediction_type="epsilon").batches(range(3), parts=1)
    for row, position in enumerate(range(3)):
        draw = posters.stream.draw(position)
        clean = posters.latents.means[draw.index] + 0.1 * draw.latent_noise
        a = ALPHAS_CUMPROD[draw.timestep]
        torch.testing.assert_close(batch.noisy[row], a**0.5 * clean + (1 - a) ** 0.5 * draw.noise)
        assert torch.equal(batch.target[row], draw.noise)
        assert batch.timesteps[row] == draw.timestep
        assert batch.texts[row] == f"posters {draw.index}"


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_the_weights_of_a_step_add_up_whatever_the_batch(batch_size: int, parts: int) -> None:
    both = feed(
        source("posters", [WIDE, TALL, WIDE]), source("class_images", [WIDE] * 4, weight=0.5)
    )
    step = [
        batch
        for part in range(parts)
        for batch in both.batches(range(part * batch_size, (part + 1) * batch_size), parts=parts)
    ]
    assert weights(step).sum().item() == pytest.approx(1.5)
    posters = sum(
        float(weight)
        for batch in step
        for text, weight in zip(batch.texts, batch.weights, strict=True)
        if text.startswith("posters")
    )
    assert posters == pytest.approx(1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_min_snr_weighs_each_sample_by_its_own_timestep_with_prior_preservation(
    prediction_type: PredictionType, batch_size: int
) -> None:
    posters, prior = source("posters", [WIDE] * 5), source("class_images", [WIDE] * 4, weight=0.5)
    (batch,) = feed(posters, prior, prediction_type=prediction_type, snr_gamma=5.0).batches(
        range(batch_size), parts=1
    )
    assert len(batch.texts) == 2 * batch_size
    row = 0
    for one in (posters, prior):
        for position in range(batch_size):
            a = float(ALPHAS_CUMPROD[one.stream.draw(position).timestep])
            snr = a / (1 - a)
            weight = min(snr, 5) / (snr if prediction_type == "epsilon" else snr + 1)
            assert batch.weights[row].item() == pytest.approx(
                one.weight * weight / batch_size, rel=1e-4
            )
            row += 1


def test_samples_of_one_shape_go_together() -> None:
    mixed = feed(source("posters", [WIDE, TALL, TALL, WIDE, TALL]))
    batches = mixed.batches(range(5), parts=1)
    assert {tuple(batch.noisy.shape[1:]) for batch in batches} == {WIDE, TALL}
    assert sorted(len(batch.texts) for batch in batches) == [2, 3]


def test_captions_vary_as_the_settings_say() -> None:
    dropped = feed(source("posters", [WIDE] * 5), caption_dropout=1.0)
    assert dropped.batches(range(3), parts=1)[0].texts == ("", "", "")


def test_holdout_batches_are_every_image_at_every_timestep_and_never_change() -> None:
    held_out = source("holdout", [WIDE, TALL, WIDE])

    def made() -> list[Batch]:
        return fixed_batches(
            held_out, "v_prediction", ALPHAS_CUMPROD, timesteps_an_image=4, batch_size=5
        )

    batches = made()
    found = {
        (text, int(timestep))
        for batch in batches
        for text, timestep in zip(batch.texts, batch.timesteps, strict=True)
    }
    steps = (125, 375, 625, 875)
    assert found == {(f"holdout {image}", step) for image in range(3) for step in steps}
    assert max(len(batch.texts) for batch in batches) <= 5
    assert weights(batches).sum().item() == pytest.approx(1)
    assert all(
        torch.equal(a.noisy, b.noisy) and torch.equal(a.target, b.target)
        for a, b in zip(batches, made(), strict=True)
    )
