"""What the model is to predict, and how its errors are weighed: pure functions.

What belongs here: noising, targets, loss weights. What does not: where noise and timesteps come
from (`draws`), the models (`learner`).

Notation: alpha_bar is the scheduler's `alphas_cumprod`, the share of the signal's variance left at
a timestep (Ho et al. 2020, arXiv:2006.11239).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from posterpipe.core.dreambooth.errors import BaseModelError

PredictionType = Literal["epsilon", "v_prediction"]


def prediction_type(name: str) -> PredictionType:
    """`name` if it can be trained; raises BaseModelError otherwise."""
    if name not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f"scheduler_config.json: prediction_type is {name!r}; epsilon and v_prediction can be "
            "trained, choose a base model with one of them"
        )
    return cast(PredictionType, name)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The noise schedule stretched so that its last step holds no signal.

    sqrt(alpha_bar) is shifted until its last value is 0 and scaled until its first is as before
    (Lin et al. 2024, arXiv:2305.08891, algorithm 1). alphas_cumprod: float (timesteps,), falling.
    """
    roots = alphas_cumprod.double().sqrt()
    stretched = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return stretched.square().to(alphas_cumprod.dtype)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4).

    latents, noise: float32 (batch, channels, height/8, width/8); alpha_bar: float32 (batch,) in
    0..1. Returns the shape of `latents`.
    """
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def target(
    prediction_type: PredictionType, latents: Tensor, noise: Tensor, alpha_bar: Tensor
) -> Tensor:
    """What the U-Net is to predict, in the shape of `latents`.

    epsilon: the noise. v_prediction: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans &
    Ho 2022, arXiv:2202.00512, appendix D).
    """
    if prediction_type == "epsilon":
        return noise
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def min_snr_weights(prediction_type: PredictionType, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights of each sample's squared error: float32 (batch,), in 0..1 for gamma
    >= 1.

    SNR = alpha_bar / (1 - alpha_bar). The paper weighs the error of x_0 by min(SNR, gamma); the
    same in terms of the noise is min(SNR, gamma) / SNR, and of v min(SNR, gamma) / (SNR + 1) (Hang
    et al. 2023, arXiv:2303.09556, section 3.4). Both are written without the division by
    1 - alpha_bar, so that pure noise (SNR 0) and pure signal stay finite.
    """
    a = alpha_bar
    if prediction_type == "epsilon":
        return torch.minimum(torch.ones_like(a), gamma * (1 - a) / a)
    return torch.minimum(a, gamma * (1 - a))


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Each sample's mean squared error in fp32: (batch, channels, h, w) twice -> (batch,)."""
    return (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))
