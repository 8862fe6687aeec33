"""The starter models' architectures: the real classes of diffusers and transformers, made small.

What belongs here: one build function a model, with its sizes and the reason for them. What does
not: how they are trained (`stages`), how training runs (`train`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import BlipForConditionalGeneration, CLIPModel, CLIPTextModel

WIDTH, HEIGHT = 64, 96
"""Pixels of a starter image: 2:3, as a poster is, so that nothing is stretched."""

LATENT_CHANNELS = 12
"""Flat colours want more channels than Stable Diffusion's 4: 12 at 1/8 of the size keep hues."""

TEXT_WIDTH = 128
TEXT_TOKENS = 48
"""Longest caption in tokens, start and end included: titles are spelt in several pieces."""

VISION_PIXELS = 64
"""The scorer and the captioner look at square images of this size."""

_VISION_WIDTH = 144


def build_vae() -> AutoencoderKL:
    """`AutoencoderKL` of 1.7 M parameters: images (batch, 3, 96, 64) in -1..1 to latents
    (batch, 12, 12, 8). No attention in the middle: at this size it costs much and adds nothing."""
    from diffusers import AutoencoderKL

    channels = (16, 32, 64, 96)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        sample_size=HEIGHT,
    )


def build_unet() -> UNet2DConditionModel:
    """`UNet2DConditionModel` of 4.8 M parameters for latents (batch, 12, 12, 8).

    Two wide levels learn more in a minute than three narrow ones: below 4x6 there is nothing left
    to see. The first level has no attention: there it would double the cost of a step.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=(HEIGHT // 8, WIDTH // 8),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 4),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_noise_scheduler() -> DDPMScheduler:
    """Cosine noise (Nichol & Dhariwal 2021) with v-prediction (Salimans & Ho 2022): Stable
    Diffusion's own schedule is made for 64x64 latents and drowns 8x12 ones in noise."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


def build_text_encoder(vocab_size: int, *, bos: int, eos: int, pad: int) -> CLIPTextModel:
    """`CLIPTextModel`, 3 layers of width 128: hidden states (batch, 48, 128)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text_config(vocab_size, bos, eos, pad)))


def _text_config(vocab_size: int, bos: int, eos: int, pad: int) -> dict:
    return dict(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH * 4,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _vision_config() -> dict:
    return dict(
        hidden_size=_VISION_WIDTH,
        intermediate_size=_VISION_WIDTH * 4,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=VISION_PIXELS,
        patch_size=8,
        hidden_act="gelu",
    )


def build_scorer(vocab_size: int, *, bos: int, eos: int, pad: int) -> CLIPModel:
    """`CLIPModel`: a ViT with patches of 8 pixels over 64x64 images beside a text tower."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(
            text_config=_text_config(vocab_size, bos, eos, pad),
            vision_config=_vision_config(),
            projection_dim=TEXT_WIDTH,
        )
    )


def build_captioner(
    vocab_size: int, *, bos: int, sep: int, pad: int
) -> BlipForConditionalGeneration:
    """`BlipForConditionalGeneration`: a ViT as the scorer's and a text decoder of 3 layers."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    return BlipForConditionalGeneration(
        BlipConfig(
            text_config=dict(
                vocab_size=vocab_size,
                hidden_size=TEXT_WIDTH,
                encoder_hidden_size=_VISION_WIDTH,
                intermediate_size=TEXT_WIDTH * 4,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                hidden_act="gelu",
                bos_token_id=bos,
                eos_token_id=sep,
                sep_token_id=sep,
                pad_token_id=pad,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                is_decoder=True,
            ),
            # The class's default of 1e-10 is meant for loading weights, not for learning them.
            vision_config=_vision_config() | {"initializer_range": 0.02},
            projection_dim=TEXT_WIDTH,
            image_text_hidden_size=TEXT_WIDTH,
        )
    )
