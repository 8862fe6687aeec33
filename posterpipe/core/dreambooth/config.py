"""The config of one training run, and the id of the checkpoint it makes.

What belongs here: `RunConfig` and its TOML form, the versions of its inputs, the checkpoint's id.
What does not: the knobs themselves (`posterpipe.training_settings`) and anything that needs torch,
which takes seconds to load: a wrong config is told before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posterpipe.core.dreambooth.effects import deciding
from posterpipe.core.dreambooth.errors import TrainingError, TrainingSetError
from posterpipe.core.files import sha256_of, write_atomic
from posterpipe.core.models import EXPORTS_NAME
from posterpipe.core.training.training_set import CSV_NAME
from posterpipe.settings import SamplerSettings
from posterpipe.training_settings import TrainingSettings
from posterpipe.variables import in_our_words

TRAINER_VERSION = "3"
"""Raised when the same config would give other weights, so that old checkpoints keep their id; also
when latents or text embeddings are others (`_LATENTS_VERSION`, `_EMBEDDINGS_VERSION`)."""

MODEL_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""The folders of a Stable Diffusion directory that decide what is trained."""

SAVES_NAME, LOWEST_NAME, SAMPLES_NAME = "saves", "lowest", "samples"
"""Folders of `work_dir`, as `EXPORTS_NAME` is. Each holds a folder for each run, named by its
checkpoint's id, which is removed when nothing can go on from it any more."""

# Left out of the id, not just as if they were not given, so that ids stay as they were.
_OF_EARLY_STOP = {"holdout_every_steps", "holdout_timesteps", "early_stop_min_gain"}
_OF_THE_PRIOR = {"prior_loss_weight", "class_prompt", "class_image_count"}


class Versions(BaseModel):
    """The versions of a run's inputs. Two runs with equal versions read equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    training_set: str = Field(description="version of the training set, such as its CSV's hash")
    base_model: str = Field(description="fingerprint of the base model's weights and configs")
    class_set: str = Field("", description='the same of the class images; "" without')
    holdout_set: str = Field("", description='the same of the held-out posters; "" without')
    continued: str = Field("", description='of the save that it goes on from; "" without')


class RunConfig(BaseModel):
    """Everything one training run is given. Frozen; relative paths start in the current directory.

    `work_dir` holds the saves from which a killed run goes on, in a folder for each run.
    `cache_dir` may be shared by all runs. `output_dir` appears, complete, when the run has
    finished.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Path = Field(description="diffusers directory of a Stable Diffusion 1.x or 2.x")
    base_model_name: str = Field("", description="shown in the card; not given: the folder")
    training_set: Path = Field(description="folder with training.csv and its images")
    class_set: Path | None = Field(
        None, description="the same with class images, needed for prior_preservation"
    )
    holdout_set: Path | None = Field(
        None, description="the same with posters never trained on, for the held-out loss"
    )
    output_dir: Path = Field(description="where the finished diffusers directory appears")
    work_dir: Path = Field(description="saves and samples of runs in progress")
    cache_dir: Path | None = Field(
        None, description="latents and text embeddings; `cache` in work_dir when not given"
    )
    width: int = Field(ge=8, multiple_of=8, description="pixels of the training images")
    height: int = Field(ge=8, multiple_of=8, description="pixels of the training images")
    buckets: bool = Field(
        False, description="images may differ in size (aspect-ratio buckets), in multiples of 8"
    )
    continue_from: Path | None = Field(
        None,
        description="save of another run, its folder step-..., to go on from with this one's "
        "settings; their steps count together",
    )
    keep_last_save: bool = Field(
        False, description="keeps the last save when the run has finished, to continue from it"
    )
    training: TrainingSettings = TrainingSettings()
    sampler: SamplerSettings = Field(
        SamplerSettings(), description="how the samples are drawn; its size and batch are not used"
    )
    versions: Versions | None = Field(
        None, description="versions of the inputs; measured from the files when not given"
    )

    @model_validator(mode="after")
    def _keeps_work_out_of_the_checkpoint(self) -> Self:
        # It appears whole, by a rename; whatever lay there before would stand in its way.
        output = Path(os.path.abspath(self.output_dir))
        for name, folder in (("work_dir", self.work_dir), ("cache_dir", self.cache)):
            if Path(os.path.abspath(folder)).is_relative_to(output):
                raise ValueError(
                    f"{name}: {folder} lies in output_dir, {self.output_dir}, which is to hold the "
                    "finished model alone; choose a folder beside it"
                )
        return self

    @model_validator(mode="after")
    def _keeps_the_checkpoint_out_of_its_work(self) -> Self:
        # What a run works with is removed when it has finished, and the model would go with it.
        output = Path(os.path.abspath(self.output_dir))
        work = Path(os.path.abspath(self.work_dir))
        for name in (SAVES_NAME, LOWEST_NAME, EXPORTS_NAME, SAMPLES_NAME):
            if output.is_relative_to(work / name):
                raise ValueError(
                    f"output_dir: {self.output_dir} lies in {self.work_dir / name}, where a run "
                    "keeps its unfinished work; choose another folder"
                )
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels that every training image must have; None for buckets."""
        return None if self.buckets else (self.width, self.height)

    @property
    def cache(self) -> Path:
        """The folder of latents and text embeddings."""
        return self.cache_dir or self.work_dir / "cache"

    def checkpoint_id(self, versions: Versions, processes: int = 1) -> str:
        """The id of the checkpoint that this run makes, see `make_checkpoint_id`."""
        return make_checkpoint_id(
            versions,
            self.training,
            width=self.width,
            height=self.height,
            buckets=self.buckets,
            processes=processes,
        )

    def to_toml(self, path: Path) -> Path:
        """Writes the config, atomically, and returns `path`; `from_toml` reads it back equal."""
        lines = _toml_lines(_toml_values(self))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
        return path

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Reads a config. Raises TrainingError with the file and every wrong key named."""
        try:
            # As Windows' editors write it: with a mark at the beginning.
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
            return cls(**values)
        except OSError as error:
            raise TrainingError(
                f"{path}: the run config cannot be read ({error.strerror}); give --config the "
                "path of a TOML file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path}: not valid TOML: {error}; mend that line") from error
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(
                    filter(None, [".".join(map(str, item["loc"])), in_our_words(item["msg"])])
                )
                for item in error.errors()
            )
            raise TrainingError(f"{path}: {problems}; correct it there") from error


def make_checkpoint_id(
    versions: Versions,
    training: TrainingSettings,
    *,
    width: int,
    height: int,
    buckets: bool,
    processes: int,
) -> str:
    """The id of the checkpoint that a run makes: 16 hex digits. See `RunConfig` for its arguments.

    A hash of everything that decides a weight: the training set, the base model, the image size,
    the training settings and the trainer's version; the class images with prior preservation, the
    held-out posters with early stopping; the save of another run that this one goes on from; the
    number of processes where there are several, each of which takes a batch of its own. Paths, and
    settings without an effect on the weights (see `effects`), are not in it.
    """
    settings = deciding(training)
    parts: dict[str, object] = {
        "training_set": versions.training_set,
        "base_model": versions.base_model,
        "size": [width, height, buckets],
        "trainer": TRAINER_VERSION,
    }
    if processes > 1:
        parts["processes"] = processes
    if versions.continued:
        parts["continued"] = versions.continued
    if training.prior_preservation:
        parts["class_set"] = versions.class_set
    else:
        settings = _without(settings, _OF_THE_PRIOR)
    if training.early_stop_patience is not None:
        parts["holdout_set"] = versions.holdout_set
    else:
        settings = _without(settings, _OF_EARLY_STOP)
    parts["training"] = settings
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def measure_versions(config: RunConfig) -> Versions:
    """The versions of the inputs from their bytes, for runs that were not given them. Raises
    TrainingError where a file cannot be read."""
    try:
        return Versions(
            training_set=_hash_set(config.training_set),
            base_model=hash_files(config.base_model, *(f"{part}/*" for part in MODEL_PARTS)),
            class_set=_hash_set(config.class_set),
            holdout_set=_hash_set(config.holdout_set),
        )
    except OSError as error:
        raise TrainingError(
            f"{error.filename}: cannot be read ({error.strerror}); make it readable"
        ) from error


def _hash_set(folder: Path | None) -> str:
    """Hash of a set's training.csv and the images that it names: what else lies in the folder, such
    as the work of a run, is nobody's input."""
    if folder is None:
        return ""
    from posterpipe.core.dreambooth.data import read_training_set  # it imports torch

    try:
        named = [example.image for example in read_training_set(folder)]
    except TrainingSetError:
        named = []  # whoever reads it raises what is wrong; it may not be needed
    return hash_files(folder, CSV_NAME, named=named)


def hash_files(folder: Path, *patterns: str, named: Iterable[Path] = ()) -> str:
    """sha256 over the names and bytes of the files in `folder` that match, and of those that are
    `named`; "" for none."""
    digest = hashlib.sha256()
    matching = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(matching.union(named)):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _toml_values(model: BaseModel) -> dict[str, Any]:
    """The model's values without null, which TOML does not have: where a field is none by default
    it is left out, where another value is the default it is the word."""
    values = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            values[name] = _toml_values(value)
        elif value is None and field.default is None:
            del values[name]
        elif value is None:
            values[name] = "none"
    return values


def _toml_lines(values: Mapping[str, Any], table: str = "") -> list[str]:
    """Scalars first, then one `[table]` a mapping: all the TOML that a RunConfig needs."""
    lines = [f"[{table}]"] if table else []
    lines += [
        f"{key} = {_toml_scalar(value)}"
        for key, value in values.items()
        if not isinstance(value, Mapping)
    ]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", *_toml_lines(value, f"{table}.{key}" if table else key)]
    return lines


def _toml_scalar(value: str | int | float | bool | list) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan, which JSON spells otherwise
    # JSON's scalars and lists are TOML's, but for DEL, which TOML wants escaped.
    return re.sub("\x7f", r"\\u007f", json.dumps(value, ensure_ascii=False))
