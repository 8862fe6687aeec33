"""Typed settings and profiles.

What belongs here: every knob of posterpipe with its unit, default and bounds, and how profiles and
`POSTERPIPE_*` variables are read. What does not: what is wrong with a variable (`variables`), what
the knobs do (`core`) and how Dagster shows them (`defs`).

A profile is a TOML file: one of those beside this module (`starter`, `sd21`, `sd21_768`) or any
path. Environment variables win over the profile: `POSTERPIPE_TRAINING__MAX_TRAIN_STEPS=500`.
"""

from __future__ import annotations

import itertools
import os
import tomllib
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as VariableError

from posterpipe.variables import PREFIX, is_told, malformed_variables, problem, unknown_variables

PROFILES = Path(__file__).parent / "profiles"

Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

CLIP_TOKENS = 77
"""What the text encoders of Stable Diffusion 1 and 2 read, start and end token included."""

DEFAULT_TEMPLATE = "{trigger} {caption}"


class SettingsError(ValueError):
    """A setting is wrong. The message names the setting or file and says what to do."""


class Group(BaseModel):
    """A group of settings: unknown names are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def knob(default: Any, description: str, *, unit: str, source: str, **bounds: Any) -> Any:
    """A field that also tells its unit ("" for none) and where its default comes from."""
    return Field(
        default,
        description=description,
        json_schema_extra={"unit": unit, "source": source},
        **bounds,
    )


class ModelRef(Group):
    """A model: a directory, or an id on the Hugging Face hub pinned by revision."""

    id: str = Field(description="directory relative to the project root, or hub id `owner/name`")
    revision: str | None = Field(
        None, description="hub commit, tag or branch; not used for directories"
    )


class ImageSettings(Group):
    """How posters become training images."""

    width: Positive = Field(512, multiple_of=8, description="pixels")
    height: Positive = Field(512, multiple_of=8, description="pixels")
    fit: Literal["stretch", "pad", "crop", "bucket"] = Field(
        "stretch",
        description="stretch changes the aspect ratio (as the thesis does), pad adds borders, "
        "crop cuts the longer side around the centre, bucket crops each to the nearest of several "
        "shapes of the same area",
    )
    bucket_step: Positive = Field(
        64, multiple_of=8, description="pixels; the sides of buckets are multiples of it"
    )
    min_side: Positive = Field(64, description="pixels; posters with a shorter side are rejected")
    max_pixels: Positive = Field(
        178_956_970, description="posters with more pixels are rejected as decompression bombs"
    )
    near_duplicate_distance: int = Field(
        4,
        ge=0,
        le=7,
        description="bits of 64 in which the perceptual hashes of two posters may differ for the "
        "later one to be flagged; resizing and JPEG change up to 2",
    )


class CaptionerSettings(Group):
    """BLIP and how it is decoded, and how captions are worded for training."""

    model: ModelRef = Field(description="a BLIP model")
    batch_size: Positive = Field(
        32,
        description="images described at once; on a CPU each of BLIP's takes 45 MB in fp32",
    )
    num_beams: Positive = Field(3, description="beams; 3 to 5 keep BLIP from repeating itself")
    max_new_tokens: int = Field(
        60,
        ge=1,
        le=CLIP_TOKENS - 2,
        description="longest caption, in BLIP tokens; the text encoders of Stable Diffusion read "
        "77 tokens, two of which are start and end",
    )
    no_repeat_ngram_size: int = Field(3, ge=0, description="0 allows repetitions")
    precision: Precision | Literal["auto"] = Field(
        "auto",
        description="auto is bf16 where the hardware computes it fast, fp16 on older GPUs, else "
        "fp32; captions made under auto are kept when the machine changes",
    )
    template: str = Field(
        DEFAULT_TEMPLATE,
        description="how a caption is worded for training; names {trigger} and {caption}. Applied "
        "when training.csv is built, so no poster is captioned again when it changes",
    )
    trigger: str = Field(
        "", description="phrase by which the fine-tuned look is called; the template puts it in"
    )

    @model_validator(mode="after")
    def _template_can_be_filled(self) -> Self:
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(
                f"template {self.template!r}: {error}; write a literal brace twice"
            ) from error
        names = [name for _, name, _, _ in parts if name is not None]
        if names.count("caption") != 1 or names.count("trigger") > 1:
            raise ValueError(
                f"template {self.template!r}: name {{caption}} once and {{trigger}} at most once"
            )
        if set(names) - {"caption", "trigger"} or any(form or how for _, _, form, how in parts):
            raise ValueError(
                f"template {self.template!r}: only {{trigger}} and {{caption}} may stand in braces"
            )
        if self.trigger.strip() and "trigger" not in names:
            raise ValueError(f"template {self.template!r} lacks {{trigger}}, but trigger is set")
        if not self.trigger.strip() and "trigger" in names and self.template != DEFAULT_TEMPLATE:
            raise ValueError(f"template {self.template!r} names {{trigger}}: set trigger as well")
        return self


# Where the defaults of the training settings come from.
_THESIS = "the thesis"
_NOT_IN_THESIS = "off, as in the thesis"
_OWN = "our choice"


class TrainingSettings(Group):
    """DreamBooth fine-tuning. The defaults are the thesis's table but for the precision, and what
    goes beyond it is off.

    Each setting tells its meaning, its unit, and where its default comes from; the launchpad and
    docs/training.md show all of it (`settings_table`).
    """

    seed: int = knob(
        777, "of the order of samples, their noise and their timesteps", unit="", source=_THESIS
    )

    # ---- how long, how fast
    train_batch_size: Positive = knob(
        1, "images that go through the models at once", unit="images a process", source=_THESIS
    )
    gradient_accumulation_steps: Positive = knob(
        1,
        "batches whose gradients are added up for one optimizer step",
        unit="batches",
        source=_THESIS,
    )
    max_train_steps: Positive = knob(
        1000, "how long to train", unit="optimizer steps", source=_THESIS
    )
    learning_rate: float = knob(
        1e-6,
        "peak rate of the U-Net; LoRA wants about 1e-4",
        unit="weight change a step",
        source=_THESIS,
        gt=0,
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = knob(
        "constant_with_warmup",
        "the rate over the steps; linear and cosine fall to 0 at max_train_steps",
        unit="",
        source="the thesis; it writes `constant`, which ignores its own 80 warmup steps",
    )
    lr_warmup_steps: int = knob(
        80,
        "the rate rises from 0 to its peak over so many; not with `constant`",
        unit="optimizer steps",
        source=_THESIS,
        ge=0,
    )
    time_limit_minutes: float | None = knob(
        None,
        "minutes of training, over all its processes, after which the run ends as if these were "
        "all its steps; none: no limit. To pause a run and go on later, send it SIGTERM",
        unit="minutes",
        source=_NOT_IN_THESIS,
        gt=0,
    )

    # ---- what is trained
    method: Literal["full", "lora"] = knob(
        "full",
        "full trains every weight; lora (arXiv:2106.09685) trains small matrices beside them and "
        "leaves pytorch_lora_weights.safetensors and kohya_lora.safetensors as well",
        unit="",
        source=_THESIS,
    )
    lora_rank: Positive = knob(
        16,
        "rows of the small matrices; diffusers' script has 4",
        unit="rows",
        source="the middle of what kohya's guides use, 8 to 64",
    )
    lora_alpha: float | None = knob(
        None,
        "the matrices count alpha / rank; none: alpha is the rank, so they count 1",
        unit="",
        source="diffusers' train_dreambooth_lora.py",
        gt=0,
    )
    lora_targets: tuple[str, ...] = knob(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "ends of names of the U-Net's linear and convolution layers that get LoRA; the attention's",
        unit="names",
        source="diffusers' train_dreambooth_lora.py",
        min_length=1,
    )
    lora_text_encoder_targets: tuple[str, ...] = knob(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        "the same for the text encoder, used with train_text_encoder",
        unit="names",
        source="diffusers' train_dreambooth_lora.py",
        min_length=1,
    )
    train_text_encoder: bool = knob(
        True, "trains the text encoder beside the U-Net", unit="", source=_THESIS
    )
    text_encoder_learning_rate: float | None = knob(
        None,
        "peak rate of the text encoder; none: the U-Net's. A lower one keeps what it knows",
        unit="weight change a step",
        source="the thesis has one rate",
        gt=0,
    )
    text_encoder_stop_step: int | None = knob(
        None,
        "step from which the text encoder stays as it is; none: never. At full rate it can ruin a "
        "model within 1,000 steps (diffusers issue 3475)",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
        ge=0,
    )
    ema_decay: float | None = knob(
        None,
        "the finished model is a moving average of the weights, which keeps this share of itself "
        "each step (less in the first ones); 0.9999 in diffusers' scripts; none: no average",
        unit="share a step",
        source=_NOT_IN_THESIS,
        gt=0,
        lt=1,
    )

    # ---- on what
    prior_preservation: bool = knob(
        False,
        "trains on class_images drawn by the base model as well, so that it keeps what it knows of "
        "class_prompt (arXiv:2208.12242, section 3.2); matters for faces and objects, less for a "
        "style",
        unit="",
        source=_NOT_IN_THESIS,
    )
    prior_loss_weight: float = knob(
        1.0, "weight of the class images' loss", unit="", source="arXiv:2208.12242", ge=0
    )
    class_prompt: str = knob(
        "a movie poster",
        "what the class images are drawn from",
        unit="",
        source=_OWN,
        min_length=1,
    )
    class_image_count: Positive = knob(
        100, "how many class images", unit="images", source="diffusers' train_dreambooth.py"
    )
    caption_dropout: float = knob(
        0.0,
        "how many samples are trained without their caption, which keeps classifier-free guidance "
        "working; 0.1 in Stable Diffusion's own training",
        unit="share of samples",
        source=_NOT_IN_THESIS,
        ge=0,
        le=1,
    )
    caption_shuffling: bool = knob(
        False,
        "the parts of a caption between separators come in another order each time, as kohya's "
        "shuffle_caption does; for captions that are lists of tags",
        unit="",
        source=_NOT_IN_THESIS,
    )
    caption_separator: str = knob(
        ",", "stands between the parts of a caption", unit="", source="kohya's", min_length=1
    )
    caption_kept_parts: int = knob(
        1,
        "parts that stay in front when the others are shuffled, such as the trigger phrase",
        unit="parts",
        source=_OWN,
        ge=0,
    )

    # ---- the loss
    snr_gamma: float | None = knob(
        None,
        "min-SNR-gamma weights of the loss, arXiv:2303.09556, whose authors use 5; none: all "
        "timesteps weigh the same",
        unit="signal-to-noise ratio",
        source=_NOT_IN_THESIS,
        gt=0,
    )
    offset_noise: float = knob(
        0.0,
        "standard deviation of a noise that is one number a channel, added to the noise, so that "
        "very dark and very bright images can be learnt; 0.1 in its author's post (N. Guttenberg "
        "2023, Diffusion with Offset Noise)",
        unit="of the noise's",
        source=_NOT_IN_THESIS,
        ge=0,
    )
    zero_terminal_snr: bool = knob(
        False,
        "rescales the noise schedule so that its last step is pure noise (arXiv:2305.08891, "
        "algorithm 1); needs a base model with v_prediction",
        unit="",
        source=_NOT_IN_THESIS,
    )

    # ---- optimizer and precision
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = knob(
        "adamw_8bit",
        "adamw is torch's, adamw_fused the same in one kernel, adamw_8bit bitsandbytes' AdamW8bit "
        "with a quarter of the memory",
        unit="",
        source=_THESIS,
    )
    adam_beta1: float = knob(
        0.9, "how much of the gradients' mean is kept", unit="share a step", source="torch", ge=0,
        lt=1,
    )  # fmt: skip
    adam_beta2: float = knob(
        0.999, "the same for their squares", unit="share a step", source="torch", ge=0, lt=1
    )
    adam_weight_decay: float = knob(
        1e-2,
        "how much weights shrink, times the learning rate",
        unit="share a step",
        source="torch",
        ge=0,
    )
    adam_epsilon: float = knob(
        1e-8, "keeps Adam's division finite", unit="of a gradient", source="torch", gt=0
    )
    max_grad_norm: float = knob(
        1.0,
        "longer gradients are scaled down to this norm",
        unit="norm of all gradients",
        source="diffusers' train_dreambooth.py",
        gt=0,
    )
    mixed_precision: Precision = knob(
        "bf16",
        "of the computation; trained weights stay fp32. bf16 needs an Ampere GPU or newer; fp16 "
        "runs on older ones, and Stable Diffusion 2.1 can overflow with it",
        unit="",
        source="our choice; the thesis and the profile sd21 have fp16",
    )
    tf32: bool = knob(
        False,
        "fp32 of linear layers and attention as TF32, which convolutions are anyway: GPUs from "
        "Ampere on multiply its ten bits several times as fast",
        unit="",
        source="diffusers' train_dreambooth.py, where it is allow_tf32",
    )
    gradient_checkpointing: bool = knob(
        False,
        "computes activations twice instead of keeping them: less memory, slower",
        unit="",
        source=_NOT_IN_THESIS,
    )
    channels_last: bool = knob(
        True,
        "memory layout of the U-Net's images in which convolutions are quicker",
        unit="",
        source="PyTorch's tuning guide",
    )
    compile: bool = knob(
        False,
        "torch.compile of the U-Net: minutes at the start, quicker steps after",
        unit="",
        source=_NOT_IN_THESIS,
    )
    compile_blocks: bool = knob(
        False,
        "compiles the U-Net's transformer blocks alone, those of one width once: less time at the "
        "start, and less gained at each step",
        unit="",
        source=_NOT_IN_THESIS,
    )
    halve_batch_on_out_of_memory: bool = knob(
        False,
        "halves the batch and doubles the accumulation where memory runs out, instead of ending "
        "the run; with one process only",
        unit="",
        source=_OWN,
    )

    # ---- watching
    holdout_every_steps: Positive | None = knob(
        100,
        "between two measurements of the loss on the held-out posters; none: never",
        unit="optimizer steps",
        source=_OWN,
    )
    holdout_timesteps: Positive = knob(
        4,
        "noise levels at which each held-out poster is measured, evenly spread, always the same",
        unit="timesteps a poster",
        source=_OWN,
    )
    early_stop_patience: Positive | None = knob(
        None,
        "measurements of the held-out loss without a new lowest one after which the run ends, with "
        "the weights of the lowest; none: never",
        unit="measurements",
        source=_NOT_IN_THESIS,
    )
    early_stop_min_gain: float = knob(
        0.0,
        "how much lower a held-out loss must be to put the stop off; the lowest is kept anyway",
        unit="share of the loss",
        source=_OWN,
        ge=0,
        lt=1,
    )
    sample_every_steps: Positive | None = knob(
        None,
        "between two sets of sample images; none: no samples",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
    )
    sample_prompts: tuple[str, ...] = knob(
        (),
        "prompts of the samples; none: the first four captions trained on",
        unit="prompts",
        source=_OWN,
    )
    sample_seed: int = knob(
        1,
        "of the first sample's noise; each next one counts one up",
        unit="",
        source=_OWN,
        ge=0,
    )
    log_every_steps: Positive = knob(
        10, "between two reports of the loss", unit="optimizer steps", source=_OWN
    )
    save_every_steps: Positive = knob(
        100,
        "between two saves to go on from; more where one takes over 2 seconds, since the next then "
        "waits for 20 times that long, so that saving takes at most 5 % of the time",
        unit="optimizer steps",
        source=_OWN,
    )
    keep_saves: Positive = knob(
        2, "how many saves of a run in progress are kept on disk", unit="saves", source=_OWN
    )
    export_every_steps: Positive | None = knob(
        None,
        "between two models from the middle of the run, which the finished checkpoint keeps in its "
        "folder `exports`: diffusers directories, with LoRA the small files; none: no such models",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
    )

    @model_validator(mode="after")
    def _stopping_needs_measuring(self) -> Self:
        if self.early_stop_patience is not None and self.holdout_every_steps is None:
            raise ValueError("early_stop_patience needs holdout_every_steps; set both or neither")
        return self


class SamplerSettings(Group):
    """How images are drawn."""

    num_inference_steps: Positive = Field(25, description="denoising steps an image")
    guidance_scale: float = Field(
        7.5, ge=1, description="how strictly the prompt is followed; 1 leaves the negative unused"
    )
    width: Positive = Field(512, multiple_of=8, description="pixels")
    height: Positive = Field(512, multiple_of=8, description="pixels")
    scheduler: Literal["dpmsolver++", "ddim", "euler"] = Field(
        "dpmsolver++", description="dpmsolver++ is DPMSolverMultistepScheduler"
    )
    batch_size: int = Field(
        8, ge=0, description="images drawn at once; 0: found by trial. Halved when memory runs out"
    )
    precision: Precision = Field("fp32", description="of the computation")
    negative_from: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps before the negative prompt acts; 0: all steps. What is to "
        "be left out has no shape at first, and naming it then can draw it in (arXiv:2406.02965)",
    )
    compile: bool = Field(
        False,
        description="torch.compile of the U-Net: a minute or more at the start, faster steps after",
    )
    channels_last: bool = Field(
        True, description="memory layout in which convolutions are faster on most hardware"
    )
    vae_slicing: bool | None = Field(
        None,
        description="true decodes one image at a time, which needs the least memory; false a whole "
        "batch; none: as many as make up 512x512 pixels",
    )


SAMPLING_SPEED = {"batch_size", "compile", "channels_last", "vae_slicing"}
"""Settings of the sampler that decide how fast an image comes, and nothing beyond the rounding of
its pixels: no part of a pixel's key, and no reason to draw again."""


class ScorerSettings(Group):
    """The CLIP model behind the score."""

    model: ModelRef = Field(description="a CLIP model")
    batch_size: Positive = Field(64, description="images or texts encoded at once")
    preprocessing: Literal["crop", "pad"] = Field(
        "crop", description="crop is CLIP's own centre crop; pad letterboxes the whole image"
    )
    precision: Precision = Field("fp32", description="of the computation")


class EvidenceSettings(Group):
    """What is measured beside CLIP-T."""

    image_encoders: tuple[ModelRef, ...] = Field(
        (),
        description="CLIP, DINO or DINOv2 models behind the similarities between images; the first "
        "is the one that the gate reads. None: the image tower of the scorer",
    )
    preprocessing: Literal["crop", "pad"] = Field(
        "pad", description="for these encoders: crop cuts a poster's ends off, pad shows all of it"
    )
    batch_size: Positive = Field(32, description="images encoded at once")
    precision: Precision = Field("fp32", description="of the computation")
    copy_alarm: float = Field(
        0.01,
        gt=0,
        lt=0.5,
        description="an image counts as a copy where at most this share of posters that are no "
        "copies would be as near to a training poster",
    )
    pickscore: ModelRef | None = Field(
        None, description="PickScore, such as yuvalkirstain/PickScore_v1; none: not measured"
    )
    pickscore_processor: ModelRef | None = Field(
        None, description="where its tokenizer and image processor lie; none: with its weights"
    )

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model that is asked beside the scorer's."""
        preference = (self.pickscore, self.pickscore_processor) if self.pickscore else ()
        return (*self.image_encoders, *(ref for ref in preference if ref is not None))


class LetteringSettings(Group):
    """How titles are set in type on generated posters."""

    style: Literal["auto", "rounded", "geometric", "grotesque", "bold", "serif", "handmade"] = (
        Field("auto", description="auto gives every title one of them, always the same")
    )
    min_width: Positive = Field(
        768, description="pixels; smaller images are enlarged by a whole factor before the title"
    )
    seeds: Positive | None = Field(
        None,
        description="images of each prompt and variant that are lettered, and on which the title "
        "is read, those of its first seeds; none: all. Together a second or two of a CPU core each",
    )
    contrast: float = Field(
        4.5, ge=1, le=15, description="least contrast of letters and ground; 4.5 is WCAG 2.2's AA"
    )


class GateSettings(Group):
    """When a new checkpoint takes the place of the one that is served."""

    clip_margin: float = Field(
        0.01,
        ge=0,
        description="cosine by which CLIP-T may be lower than the champion's, and than the base "
        "model's, without counting as inferior",
    )
    fidelity_margin: float = Field(
        0.01,
        ge=0,
        description="cosine by which the similarity to holdout posters has to be lower than the "
        "champion's for a checkpoint to be rejected; lower by less holds it",
    )
    specific_margin: float | None = Field(
        None,
        ge=0,
        description="cosine by which the lead of an image's own text over those of other prompts "
        "may be lower; beyond it a checkpoint is held for people to look at. Not set: the lead is "
        "told with every decision, and decides nothing",
    )
    copy_limit: float = Field(
        0.05, ge=0, le=1, description="share of images that may count as copies of training posters"
    )
    diversity_kept: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the champion's diversity, and of the base model's, that must remain",
    )
    blocked_limit: float = Field(
        0.02, ge=0, le=1, description="share of images that may be black or of one colour"
    )
    min_prompts: int = Field(
        8,
        ge=2,
        description="prompts on which CLIP-T, fidelity and diversity are compared at least; with "
        "fewer they stay open. Simulated, the intervals of two equal models keep their 95 % from 8 "
        "prompts on, and those over 3 lie wholly on one side four times too often",
    )


class CheckSettings(Group):
    """What must hold before the next step is worth its cost. Shares are of 1."""

    min_posters: Positive = Field(5, description="usable posters; with fewer nothing is trained")
    max_rejected_share: Share = Field(
        0.25, description="rejected files among all of the landing folder; more is a warning"
    )
    max_near_duplicate_share: Share = Field(
        0.1, description="posters that resemble an earlier one; more is a warning"
    )
    max_blank_share: Share = Field(
        0.01,
        description="training images that are black, white or of one colour; with more nothing is "
        "captioned",
    )
    max_failed_share: Share = Field(
        0.2,
        description="training images, or captions, that could not be made; with more of either "
        "nothing is trained",
    )
    max_repeated_share: Share = Field(
        0.25, description="repeats among the word pairs of one caption; more is a warning"
    )
    max_shared_captions: Share = Field(
        0.1, description="posters whose caption another poster has too; more is a warning"
    )
    min_distinct_captions: Share = Field(
        0.1, description="distinct captions among all; with fewer nothing is trained"
    )
    max_long_captions: Share = Field(
        0.0,
        description="training captions with more tokens than the text encoder reads; with more of "
        "them nothing is trained",
    )
    max_lost_share: Share = Field(
        0.4,
        description="by which share of the posters last trained on there may be fewer now; with "
        "fewer still nothing is trained",
    )
    holdout_distance: int = Field(
        4,
        ge=-1,
        le=32,
        description="bits of 64 up to which the perceptual hashes of a training and a holdout "
        "poster count as the same picture, so that nothing is trained, and that the holdout poster "
        "says nothing of how near new posters come to old ones; resizing and JPEG change up "
        "to 2, unrelated posters of the starter data differ in 6 or more; -1 compares bytes only",
    )
    max_blocked_share: Share = Field(
        0.05, description="generated images that show nothing; more is a warning"
    )
    min_titles_read: Share = Field(
        0.95, description="titles set in type that an OCR reads exactly; fewer is a warning"
    )
    max_scoring_delay_hours: float = Field(
        24, gt=0, description="hours that new generations may wait for their scores"
    )
    max_score_age_days: float | None = Field(
        None,
        gt=0,
        description="days since the last scoring; none: scores of the current generations are "
        "never too old",
    )
    freshness_cron: str = Field(
        "0 8 * * *", description="when the freshness of the scores is checked, in UTC"
    )


class AutomationSettings(Group):
    """When the pipeline looks at the outside world, and when it trains."""

    training_cron: str = Field(
        "0 2 * * *",
        description="when it is decided whether to train: minute, hour, day, month, weekday",
    )
    training_timezone: str = Field(
        "UTC", description="time zone of training_cron, such as Europe/Berlin"
    )
    min_new_posters: Positive = Field(
        5, description="posters that came, went or got another caption before it is worth training"
    )
    max_age_days: float = Field(
        7.0, ge=0, description="days after which fewer changes are trained on as well"
    )
    sensor_interval_seconds: Positive = Field(
        30, description="least time between two looks at posters, captions and prompts"
    )
    settle_seconds: float = Field(
        10.0, ge=0, description="a file that changed less than this ago may still be being written"
    )
    patience_seconds: float = Field(
        300.0, ge=0, description="longest wait for files that keep changing, while others are ready"
    )

    @field_validator("training_timezone")
    @classmethod
    def _known_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"there is no time zone {name!r}") from error
        return name


class AlertSettings(Group):
    """Who is told when a run or a check failed. Without `webhook_url` and `email_to`, nobody."""

    webhook_url: SecretStr | None = Field(
        None, description="gets JSON by POST; `text` and `content` are what chats show"
    )
    email_to: str = Field("", description="addresses, with commas between them")
    email_from: str = Field("", description="the sender; empty: posterpipe@ this machine")
    smtp_host: str = Field("localhost", min_length=1, description="mail server")
    smtp_port: int = Field(587, ge=1, le=65535, description="587 for starttls, 465 for tls")
    smtp_security: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="none only for a mail server on the same machine"
    )
    smtp_user: str = Field("", description="empty: without signing in")
    smtp_password: SecretStr | None = Field(None, description="of smtp_user")
    ui_url: str = Field(
        "http://127.0.0.1:3000", description="where the Dagster UI is, for links in messages"
    )
    max_age_hours: float = Field(
        24.0, gt=0, description="failures that could not be told within this time are given up"
    )

    @field_validator("webhook_url")
    @classmethod
    def _web_address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None or not url.get_secret_value():
            return None
        if not url.get_secret_value().startswith(("https://", "http://")):
            raise ValueError("begins with https://")
        return url


class Settings(BaseSettings):
    """All settings of one deployment."""

    model_config = SettingsConfigDict(
        env_prefix="POSTERPIPE_",
        env_nested_delimiter="__",
        # What a compose file passes on of a variable that is not set.
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )

    profile: str = Field("starter", description="name of a shipped profile, or a TOML file")
    root: Path = Field(
        default_factory=lambda: default_root(), description="relative paths below start here"
    )
    landing: Path | str = Field(
        Path("data/raw_posters"),
        description="folder of posters to train on, or a bucket such as s3://bucket/posters",
    )
    captions: Path = Field(
        Path("data/captions.csv"),
        description="captions by people: a CSV with file_name and caption; need not exist",
    )
    holdout: Path = Field(Path("data/holdout_posters"), description="posters never trained on")
    prompt_suite: Path = Field(
        Path("data/prompt_suites/animated_movies.yaml"), description="what every model draws"
    )
    store: Path = Field(Path("data/store"), description="everything computed")
    public_url: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="where a web server shows the store's folder `public`, for links to the report",
    )
    max_concurrent: Positive = Field(1, description="steps of one run at the same time")
    base_model: ModelRef = Field(description="the Stable Diffusion that is fine-tuned")
    images: ImageSettings = ImageSettings()
    captioner: CaptionerSettings
    training: TrainingSettings = TrainingSettings()
    sampler: SamplerSettings = SamplerSettings()
    scorer: ScorerSettings
    evidence: EvidenceSettings = EvidenceSettings()
    lettering: LetteringSettings = LetteringSettings()
    gate: GateSettings = GateSettings()
    checks: CheckSettings = CheckSettings()
    automation: AutomationSettings = AutomationSettings()
    alerts: AlertSettings = AlertSettings()

    @field_validator("captions", "holdout", "prompt_suite", "store", mode="before")
    @classmethod
    def _is_local(cls, path: object) -> object:
        if isinstance(path, str) and "://" in path:
            raise ValueError(
                f"{path} is a URL, and only `landing` may be one; give a file or folder on this "
                "machine, where a bucket can be mounted"
            )
        return path

    @field_validator("root", "landing", "captions", "holdout", "prompt_suite", "store")
    @classmethod
    def _home(cls, path: Path | str) -> Path | str:
        """No shell expands the ~ of a TOML file or of a service's environment."""
        if isinstance(path, str) and "://" in path:
            return path
        try:
            return Path(path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{path}: there is no such home folder; write it whole") from error

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """Images of the store would be taken for new posters, held-out posters be trained on."""
        folders = {
            name: self.path(place).resolve()
            for name, place in (
                ("landing", self.landing),
                ("holdout", self.holdout),
                ("store", self.store),
            )
            if "://" not in str(place)
        }
        clashes = [
            f"`{one}` ({at}) and `{other}` ({there})"
            for (one, at), (other, there) in itertools.combinations(folders.items(), 2)
            if at.is_relative_to(there) or there.is_relative_to(at)
        ]
        if clashes:
            raise ValueError(
                f"{'; '.join(clashes)}: the same folder or one in the other; give each its own"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Environment over what `load_settings` read from the profile.
        return env_settings, init_settings

    def path(self, relative: Path | str) -> Path:
        """An absolute path: `relative` below the root, or itself where it is absolute."""
        return self.root / relative

    @property
    def warehouse_path(self) -> Path:
        """The database that only the pipeline opens."""
        return self.path(self.store) / "warehouse.duckdb"

    @property
    def published_path(self) -> Path:
        """The analysts' copy of the database."""
        return self.path(self.store) / "public" / "scores.duckdb"


def default_root() -> Path:
    """The checkout this package lies in, or the current directory for an installed package."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "workspace.yaml").exists() else Path.cwd()


def profile_path(profile: str) -> Path:
    """The TOML file of a profile. Raises SettingsError for an unknown one."""
    shipped = PROFILES / f"{profile}.toml"
    if shipped.exists():
        return shipped
    path = Path(profile).expanduser()
    if path.suffix == ".toml" and path.exists():
        return path
    names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
    raise SettingsError(
        f"POSTERPIPE_PROFILE: there is no profile {profile!r}; name one of {names} or a TOML file"
    )


def load_settings(profile: str | None = None, **overrides: Any) -> Settings:
    """Settings of a profile (default: `POSTERPIPE_PROFILE`, else `starter`).

    `overrides` are top-level settings that win over the profile's; environment variables win
    over both. Raises SettingsError with every wrong setting named.
    """
    name = profile or os.environ.get("POSTERPIPE_PROFILE") or "starter"
    path = profile_path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}; mend that line") from error
    unknown = unknown_variables(Settings)
    try:
        settings = Settings(**{**values, "profile": name, **overrides})
    except VariableError as error:
        malformed = malformed_variables(Settings) or [str(error)]
        raise SettingsError("; ".join([*unknown.values(), *malformed])) from error
    except ValidationError as error:
        problems = [
            problem(Settings, item["loc"], item["msg"])
            for item in error.errors()
            if not (item["type"] == "extra_forbidden" and is_told(item["loc"], unknown))
        ]
        found = f"{path} (with {PREFIX}* variables): {'; '.join(problems)}; correct it there"
        raise SettingsError(
            "; ".join([*unknown.values(), *([found] if problems else [])])
        ) from error
    if unknown:
        raise SettingsError("; ".join(unknown.values()))
    return settings
