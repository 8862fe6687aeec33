"""Typed settings and profiles.

What belongs here: every knob of posterpipe with its unit, default and bounds, and how profiles and
`POSTERPIPE_*` variables are read. What does not: what the knobs do (`core`) and how Dagster shows
them (`defs`).

A profile is a TOML file: one of those beside this module (`starter`, `sd21`, `sd21_768`) or any
path. Environment variables win over the profile: `POSTERPIPE_TRAINING__MAX_TRAIN_STEPS=500`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PROFILES = Path(__file__).parent / "profiles"

Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]


class SettingsError(ValueError):
    """A setting is wrong. The message names the setting or file and says what to do."""


class Group(BaseModel):
    """A group of settings: unknown names are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    fit: Literal["stretch", "pad", "crop"] = Field(
        "stretch",
        description="stretch changes the aspect ratio (as the thesis does), pad adds borders, "
        "crop cuts the longer side around the centre",
    )
    min_side: Positive = Field(64, description="pixels; posters with a shorter side are rejected")
    max_pixels: Positive = Field(
        178_956_970, description="posters with more pixels are rejected as decompression bombs"
    )


class CaptionerSettings(Group):
    """BLIP and how it is decoded."""

    model: ModelRef
    batch_size: Positive = 8
    num_beams: Positive = Field(3, description="beams; 3 to 5 keep BLIP from repeating itself")
    max_new_tokens: Positive = Field(60, description="longest caption, in BLIP tokens")
    no_repeat_ngram_size: int = Field(3, ge=0, description="0 allows repetitions")
    precision: Precision = "fp32"


class TrainingSettings(Group):
    """DreamBooth fine-tuning; the defaults are the thesis's table."""

    seed: int = 777
    train_batch_size: Positive = Field(1, description="images a step and process")
    gradient_accumulation_steps: Positive = 1
    max_train_steps: Positive = Field(1000, description="optimizer steps")
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup",
        description="the thesis names `constant`, which ignores its 80 warmup steps",
    )
    lr_warmup_steps: int = Field(80, ge=0, description="optimizer steps")
    train_text_encoder: bool = True
    text_encoder_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak rate of the text encoder; none: the U-Net's. A lower one keeps what the "
        "encoder knows",
    )
    snr_gamma: float | None = Field(
        None,
        gt=0,
        description="min-SNR-gamma loss weights, arXiv:2303.09556, whose authors use 5; none: all "
        "timesteps weigh the same",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw_8bit", description="8-bit Adam is bitsandbytes' AdamW8bit"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    log_every_steps: Positive = Field(10, description="optimizer steps between two reports")
    save_every_steps: Positive = Field(100, description="optimizer steps between two saves")
    keep_saves: Positive = Field(2, description="saves of a run in progress kept on disk")


class SamplerSettings(Group):
    """How images are drawn."""

    num_inference_steps: Positive = 25
    guidance_scale: float = Field(7.5, ge=1)
    width: Positive = Field(512, multiple_of=8, description="pixels")
    height: Positive = Field(512, multiple_of=8, description="pixels")
    scheduler: Literal["dpmsolver++", "ddim", "euler"] = Field(
        "dpmsolver++", description="dpmsolver++ is DPMSolverMultistepScheduler"
    )
    batch_size: Positive = Field(8, description="images drawn at once")
    precision: Precision = "fp32"


class ScorerSettings(Group):
    """The CLIP model behind the score."""

    model: ModelRef
    batch_size: Positive = Field(64, description="images or texts encoded at once")
    preprocessing: Literal["crop", "pad"] = Field(
        "crop", description="crop is CLIP's own centre crop; pad letterboxes the whole image"
    )
    precision: Precision = "fp32"


class CheckSettings(Group):
    """What must hold before the next step is worth its cost."""

    min_posters: Positive = Field(5, description="usable posters; with fewer nothing is trained")


class Settings(BaseSettings):
    """All settings of one deployment."""

    model_config = SettingsConfigDict(
        env_prefix="POSTERPIPE_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    profile: str = Field("starter", description="name of a shipped profile, or a TOML file")
    root: Path = Field(
        default_factory=lambda: default_root(), description="relative paths below start here"
    )
    landing: Path = Field(Path("data/raw_posters"), description="folder of posters to train on")
    holdout: Path = Field(Path("data/holdout_posters"), description="posters never trained on")
    prompt_suite: Path = Path("data/prompt_suites/animated_movies.yaml")
    store: Path = Field(Path("data/store"), description="everything computed")
    max_concurrent: Positive = Field(1, description="steps of one run at the same time")
    base_model: ModelRef
    images: ImageSettings = ImageSettings()
    captioner: CaptionerSettings
    training: TrainingSettings = TrainingSettings()
    sampler: SamplerSettings = SamplerSettings()
    scorer: ScorerSettings
    checks: CheckSettings = CheckSettings()

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

    def path(self, relative: Path) -> Path:
        """An absolute path: `relative` below the root, or itself where it is absolute."""
        return self.root / relative


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
    try:
        return Settings(**{**values, "profile": name, **overrides})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        )
        raise SettingsError(
            f"{path} (with POSTERPIPE_* variables): {problems}; correct it there"
        ) from error
