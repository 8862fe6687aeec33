"""Typed settings and profiles.

What belongs here: every knob of posterpipe with its unit, default and bounds, and how profiles and
`POSTERPIPE_*` variables are read. What does not: those of the training (`training_settings`), what
is wrong with a variable (`variables`), what the knobs do (`core`) and how Dagster shows them
(`defs`).

A profile is a TOML file: one of those beside this module (`starter`, `sd21`, `sd21_768`) or any
path. Environment variables win over the profile: `POSTERPIPE_TRAINING__MAX_TRAIN_STEPS=500`.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from string import Formatter
from typing import Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as VariableError

from posterpipe.setting_types import Group, Positive, Precision, Share, no_bool_for_a_number
from posterpipe.training_settings import TrainingSettings
from posterpipe.variables import (
    PREFIX,
    is_told,
    malformed_variables,
    problem,
    ragged_paths,
    unknown_variables,
    value_of,
)

PROFILES = Path(__file__).parent / "profiles"

PUBLIC = "public"
"""The folder of the store that people read."""

CLIP_TOKENS = 77
"""What the text encoders of Stable Diffusion 1 and 2 read, start and end token included."""

_MOST_STEPS = {"dpmsolver++": 995, "ddim": 1000}
"""Steps that a scheduler can make of the 1,000 timesteps of Stable Diffusion: with more, two fall
on one timestep. The bound of dpmsolver++ is that of a cosine schedule, of which it leaves the last
timesteps out."""

DEFAULT_TEMPLATE = "{trigger} {caption}"


class SettingsError(ValueError):
    """A setting is wrong. The message names the setting or file and says what to do."""


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


class SamplerSettings(Group):
    """How images are drawn."""

    num_inference_steps: Positive = Field(
        25,
        description="denoising steps an image; dpmsolver++ makes at most 995, ddim 1000",
    )
    guidance_scale: float = Field(
        7.5,
        ge=1,
        allow_inf_nan=False,
        description="how strictly the prompt is followed; 1 leaves the negative unused",
    )
    width: Positive = Field(512, multiple_of=8, description="pixels")
    height: Positive = Field(512, multiple_of=8, description="pixels")
    scheduler: Literal["dpmsolver++", "ddim", "euler"] = Field(
        "dpmsolver++", description="dpmsolver++ is DPMSolverMultistepScheduler"
    )
    batch_size: int = Field(
        8,
        ge=0,
        description="images drawn at once; 0: found by trial. Halved when memory runs out. Another "
        "size rounds some pixels otherwise: with 0, a run that goes on after a kill may differ in "
        "these from one that was not interrupted",
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
        description="torch.compile of the U-Net: a minute or more at the start; whether steps are "
        "faster after depends on the GPU (on an H200 they were not)",
    )
    channels_last: bool | None = Field(
        None,
        description="memory layout in which convolutions are faster; none: where the rest is not "
        "slower for it, which is on CPUs, and on GPUs with compile",
    )
    vae_slicing: bool | None = Field(
        None,
        description="true decodes one image at a time, which needs the least memory; false a whole "
        "batch; none: as many as make up 512x512 pixels",
    )

    @model_validator(mode="after")
    def _no_timestep_comes_twice(self) -> Self:
        """Where one does, dpmsolver++ divides by zero, and ddim refuses. euler draws between them
        as well."""
        most = _MOST_STEPS.get(self.scheduler)
        if most is not None and self.num_inference_steps > most:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}, and {self.scheduler} makes at "
                f"most {most}; lower it, or change scheduler"
            )
        return self

    @property
    def latest_negative(self) -> float:
        """The largest share of the steps after which one is left in which a negative prompt acts:
        0 (of one step) to below 1. Later ones give the image without it."""
        return (self.num_inference_steps - 1) / self.num_inference_steps

    @model_validator(mode="after")
    def _negative_acts_in_a_step(self) -> Self:
        if self.negative_from > self.latest_negative:
            raise ValueError(
                f"negative_from is {self.negative_from:g}, and the last of "
                f"{self.num_inference_steps} steps begins after {self.latest_negative:.4g} of "
                "them, so the negative prompt would never act; lower it, or raise "
                "num_inference_steps"
            )
        return self


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
        "model's, without counting as inferior; smaller than a suite resolves, it leaves equal "
        "models undecided, and the decision says so",
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
        description="share of the champion's diversity, and of the base model's, that must remain; "
        "as with clip_margin, the decision says where a suite does not resolve it",
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
        description="the largest share of the posters last trained on that may be gone; where "
        "more are, nothing is trained",
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

    _no_bool_for_a_number = field_validator("*", mode="before")(no_bool_for_a_number)

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
    def _duckdb_finds_its_files(self) -> Self:
        """DuckDB takes a ? for the end of a path, and writes its log to another folder."""
        if "?" in str(self.path(self.store)):
            raise ValueError(
                f"`store` ({self.path(self.store)}): DuckDB cannot write below a path with ?; give "
                "it a folder without, or move the checkout"
            )
        return self

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
        return self.public_path / "scores.duckdb"

    @property
    def public_path(self) -> Path:
        """What people read: the scores, the report, pictures."""
        return self.path(self.store) / PUBLIC


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
    name = profile or value_of("POSTERPIPE_PROFILE") or "starter"
    path = profile_path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # as Windows' editors write it
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}; mend that line") from error
    unknown = unknown_variables(Settings)
    wrong = [*unknown.values(), *ragged_paths(Settings)]
    try:
        settings = Settings(**{**values, **overrides})
    except VariableError as error:
        malformed = malformed_variables(Settings) or [str(error)]
        raise SettingsError("; ".join([*wrong, *malformed])) from error
    except ValidationError as error:
        problems = [
            problem(Settings, item["loc"], item["msg"])
            for item in error.errors()
            if not (item["type"] == "extra_forbidden" and is_told(item["loc"], unknown))
        ]
        found = f"{path} (with {PREFIX}* variables): {'; '.join(problems)}; correct it there"
        raise SettingsError("; ".join([*wrong, *([found] if problems else [])])) from error
    if wrong:
        raise SettingsError("; ".join(wrong))
    # Whatever the variable says where another one was asked for.
    return settings.model_copy(update={"profile": name})
