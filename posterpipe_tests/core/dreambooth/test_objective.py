from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.errors import BaseModelError


def samples(*alpha_bar: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents and noise of shape (n, 3, 2, 2) and their alpha_bar."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(alpha_bar), 3, 2, 2)
    latents = torch.randn(shape, generator=generator)
    return latents, torch.randn(shape, generator=generator), torch.tensor(alpha_bar)


def test_noised_latents_by_hand() -> None:
    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    noised = objective.add_noise(latents, noise, torch.tensor([0.64]))
    assert noised.item() == pytest.approx(0.8 * 2 + 0.6 * -1)


def test_targets_by_hand() -> None:
    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    alpha_bar = torch.tensor([0.64])
    assert objective.target("epsilon", latents, noise, alpha_bar).item() == -1
    v = objective.target("v_prediction", latents, noise, alpha_bar).item()
    assert v == pytest.approx(0.8 * -1 - 0.6 * 2)


def test_noising_and_v_agree_with_diffusers() -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    steps = torch.tensor([0, 250, 700, 998])
    latents, noise, _ = samples(1, 1, 1, 1)
    alpha_bar = scheduler.alphas_cumprod[steps]
    ours = objective.add_noise(latents, noise, alpha_bar)
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, steps))
    v = objective.target("v_prediction", latents, noise, alpha_bar)
    torch.testing.assert_close(v, scheduler.get_velocity(latents, noise, steps))


def test_noise_and_v_together_give_the_latents_back() -> None:
    latents, noise, alpha_bar = samples(0.01, 0.3, 0.99)
    a = alpha_bar.view(-1, 1, 1, 1)
    noised = objective.add_noise(latents, noise, alpha_bar)
    v = objective.target("v_prediction", latents, noise, alpha_bar)
    torch.testing.assert_close(a.sqrt() * noised - (1 - a).sqrt() * v, latents)


@pytest.mark.parametrize("alpha_bar", [0.05, 0.5, 0.9, 0.999])
def test_min_snr_weights_are_those_of_the_paper(alpha_bar: float) -> None:
    snr = alpha_bar / (1 - alpha_bar)
    values = torch.tensor([alpha_bar], dtype=torch.float64)
    epsilon = objective.min_snr_weights("epsilon", values, 5).item()
    v = objective.min_snr_weights("v_prediction", values, 5).item()
    assert epsilon == pytest.approx(min(snr, 5) / snr)
    assert v == pytest.approx(min(snr, 5) / (snr + 1))


def test_min_snr_weights_stay_finite_without_signal_and_without_noise() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert objective.min_snr_weights("epsilon", ends, 5).tolist() == [1, 0]
    assert objective.min_snr_weights("v_prediction", ends, 5).tolist() == [0, 0]


def test_errors_are_a_mean_for_each_sample() -> None:
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    wanted = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    errors = objective.squared_errors(prediction, wanted)
    assert errors.tolist() == [1, 4] and errors.dtype == torch.float32


def test_an_unknown_prediction_type_is_refused_by_name() -> None:
    assert objective.prediction_type("v_prediction") == "v_prediction"
    with pytest.raises(BaseModelError, match="'sample'"):
        objective.prediction_type("sample")


def test_zero_terminal_snr_by_hand() -> None:
    # sqrt: 0.9, 0.6, 0.3 -> minus 0.3, times 0.9 / 0.6: 0.9, 0.45, 0.
    rescaled = objective.zero_terminal_snr(torch.tensor([0.81, 0.36, 0.09]))
    torch.testing.assert_close(rescaled, torch.tensor([0.81, 0.2025, 0.0]))


def test_zero_terminal_snr_betas_by_hand() -> None:
    # alpha_bar 0.81, 0.2025, 0 are products of 1 - beta: 1 - 0.81, 1 - 0.2025 / 0.81, 1 - 0.
    rescaled = objective.zero_terminal_snr(torch.tensor([0.81, 0.36, 0.09]))
    before = torch.cat([torch.ones(1), rescaled[:-1]])
    torch.testing.assert_close(1 - rescaled / before, torch.tensor([0.19, 0.75, 1.0]))


def test_what_zero_terminal_snr_mends_is_what_the_paper_measured() -> None:
    # arXiv:2305.08891, table 1, Stable Diffusion: at T, SNR 0.004682 and sqrt(alpha_bar) 0.068265.
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    alphas_bar = DDPMScheduler(**betas).alphas_cumprod.double()
    last = alphas_bar[-1].item()
    assert last**0.5 == pytest.approx(0.068265, abs=5e-6)
    assert last / (1 - last) == pytest.approx(0.004682, abs=5e-6)
    mended = objective.zero_terminal_snr(alphas_bar)
    assert mended[-1] == 0
    # Then v is -x_0: the last step teaches to draw from nothing.
    latents, noise, _ = samples(1.0)
    wanted = objective.target("v_prediction", latents, noise, mended[-1:].float())
    torch.testing.assert_close(wanted, -latents)


def test_zero_terminal_snr_is_the_schedule_that_samplers_then_use() -> None:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    plain = DDPMScheduler(**betas)
    peer = DDPMScheduler(**betas, rescale_betas_zero_snr=True)
    ours = objective.zero_terminal_snr(plain.alphas_cumprod)
    torch.testing.assert_close(ours, peer.alphas_cumprod, rtol=0, atol=1e-6)
    assert ours[-1] == 0 and ours[0] == plain.alphas_cumprod[0]
    # Twice is once.
    torch.testing.assert_close(objective.zero_terminal_snr(ours), ours)


ALPHA_BAR = st.floats(1e-4, 1 - 1e-4)


@given(ALPHA_BAR, ALPHA_BAR, st.floats(0.5, 20))
def test_weights_are_finite_and_never_above_one_and_fall_with_less_noise(
    a: float, b: float, gamma: float
) -> None:
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    kinds: tuple[objective.PredictionType, ...] = ("epsilon", "v_prediction")
    for kind in kinds:
        weight = objective.min_snr_weights(kind, high, gamma)
        assert 0 <= weight.item() <= 1
    noisier = objective.min_snr_weights("epsilon", low, gamma)
    assert noisier >= objective.min_snr_weights("epsilon", high, gamma)


@given(ALPHA_BAR)
def test_the_two_targets_hold_the_same_error_up_to_the_signal(alpha_bar: float) -> None:
    # An error d in the noise is an error d / sqrt(alpha_bar) in v, for the same noisy input: with
    # x_t fixed, v = (noise - sqrt(1 - a) x_t) / sqrt(a).
    latents, noise, a = samples(alpha_bar)
    noisy = objective.add_noise(latents, noise, a)
    wanted = objective.target("v_prediction", latents, noise, a)
    root = a.view(-1, 1, 1, 1)
    by_noise = (noise - (1 - root).sqrt() * noisy) / root.sqrt()
    torch.testing.assert_close(by_noise, wanted, rtol=1e-3, atol=1e-2 / alpha_bar**0.5 * 1e-2)
