"""What a run reads: its posters, class images and held-out posters, ready for use.

What belongs here: which sets are needed, and the error when one is missing. What does not: how
sets are read (`data`) and encoded (`latents`), and how batches are made (`batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from diffusers.models import AutoencoderKL
from torch import Tensor

from posterpipe.core.dreambooth import objective
from posterpipe.core.dreambooth.base_model import load_noise_schedule, load_vae
from posterpipe.core.dreambooth.batches import Batch, Feed, Source, fixed_batches
from posterpipe.core.dreambooth.config import SAMPLES_NAME, RunConfig
from posterpipe.core.dreambooth.data import Example, read_training_set
from posterpipe.core.dreambooth.draws import Stream, StreamName
from posterpipe.core.dreambooth.errors import BaseModelError, TrainingError
from posterpipe.core.dreambooth.latents import cached_latents
from posterpipe.core.dreambooth.samples import DEFAULT_PROMPTS, SampleDrawer

_HOLDOUT_BATCH_SIZE = 8
_HOLDOUT_SEED = 0  # whatever the run's seed: runs can be compared


@dataclass(frozen=True)
class Inputs:
    """feed: training batches. holdout_batches: of the held-out loss, none without it. drawer: of
    sample images, None without them. texts: all captions among them, before they vary."""

    feed: Feed
    holdout_batches: list[Batch]
    drawer: SampleDrawer | None
    texts: frozenset[str]


def read_inputs(
    config: RunConfig, checkpoint_id: str, accelerator: Accelerator, log: Callable[[str], None]
) -> Inputs:
    """Reads all sets that the settings ask for, and encodes their images.

    checkpoint_id: under which the samples go. Raises TrainingError for a set that is missing,
    TrainingSetError, BaseModelError.
    """
    settings = config.training
    prediction_type, alphas_cumprod = _noise(config)

    def vae() -> AutoencoderKL:
        return load_vae(config.base_model).to(accelerator.device)

    def source(name: StreamName, rows: Sequence[Example], weight: float = 1.0) -> Source:
        # One process encodes, the others then find the latents.
        with accelerator.main_process_first():
            latents = cached_latents(
                config.cache,
                rows,
                config.base_model,
                vae,
                device=accelerator.device,
                size=config.size,
                log=log,
            )
        held_out = name == "holdout"
        samples_a_step = settings.train_batch_size * settings.gradient_accumulation_steps
        stream = Stream(
            seed=_HOLDOUT_SEED if held_out else settings.seed,
            name=name,
            shapes=tuple(latents.shapes),
            timesteps=len(alphas_cumprod),
            # Held-out posters come in one order, whatever a step is.
            run_length=1 if held_out else samples_a_step * accelerator.num_processes,
            offset_noise=0.0 if held_out else settings.offset_noise,
        )
        return Source([row.caption for row in rows], latents, stream, weight)

    posters = source("posters", read_training_set(config.training_set))
    sources = [posters]
    if settings.prior_preservation:
        rows = read_training_set(_class_set(config))
        sources.append(source("class_images", rows, settings.prior_loss_weight))
    holdout_batches: list[Batch] = []
    if config.holdout_set is not None and settings.holdout_every_steps is not None:
        holdout_batches = fixed_batches(
            source("holdout", read_training_set(config.holdout_set)),
            prediction_type,
            alphas_cumprod,
            timesteps_an_image=settings.holdout_timesteps,
            batch_size=max(settings.train_batch_size, _HOLDOUT_BATCH_SIZE),
        )
    elif settings.early_stop_patience is not None:
        raise TrainingError(
            "training.early_stop_patience: there are no held-out posters; put some into the "
            "holdout folder and materialize `holdout_posters` (when training by hand, set "
            "`holdout_set` to their folder), or unset early_stop_patience"
        )
    drawer = None
    if settings.sample_every_steps is not None:
        captions = list(dict.fromkeys(posters.captions))[:DEFAULT_PROMPTS]
        drawer = SampleDrawer(
            config.work_dir / SAMPLES_NAME / checkpoint_id,
            config.base_model,
            vae,
            config.sampler,
            prompts=settings.sample_prompts or captions,
            seed=settings.sample_seed,
            shape=(posters.stream.shapes[0][0], config.height // 8, config.width // 8),
            zero_terminal_snr=settings.zero_terminal_snr,
            log=log,
        )
    texts = {
        *(text for one in sources for text in one.captions),
        *(text for batch in holdout_batches for text in batch.texts),
        *(drawer.prompts if drawer else ()),
    }
    return Inputs(
        Feed(settings, prediction_type, alphas_cumprod, sources),
        holdout_batches,
        drawer,
        frozenset(texts),
    )


def _noise(config: RunConfig) -> tuple[objective.PredictionType, Tensor]:
    """What the base model predicts, and its alphas_cumprod: float32 (timesteps,)."""
    schedule = load_noise_schedule(config.base_model)
    prediction_type = objective.prediction_type(schedule.config["prediction_type"])
    if not config.training.zero_terminal_snr:
        return prediction_type, schedule.alphas_cumprod
    if prediction_type != "v_prediction":
        raise BaseModelError(
            f"{config.base_model}: training.zero_terminal_snr needs a model that predicts v, and "
            f"this one predicts {prediction_type}, which in pure noise is the input itself; turn "
            "it off"
        )
    return prediction_type, objective.zero_terminal_snr(schedule.alphas_cumprod)


def _class_set(config: RunConfig) -> Path:
    if config.class_set is None:
        raise TrainingError(
            "training.prior_preservation: there are no class images; materialize class_images (by "
            "hand: name their folder as class_set), or turn it off"
        )
    return config.class_set
