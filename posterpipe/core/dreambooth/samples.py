"""Images drawn while training, always from the same prompts and noise.

What belongs here: drawing them with the models as they are now, and the grid over the steps. What
does not: the prompt suite's images, which `core.sampler` draws from finished models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor

from posterpipe.core.gallery import grid
from posterpipe.core.sampler import initial_latents, make_scheduler, to_images
from posterpipe.settings import SamplerSettings

PROMPTS_NAME = "prompts.txt"
SAMPLING_NAME = "sampling.json"
"""All that tells two runs' samples apart which share a run's id: prompts, noise, the sampler."""

DEFAULT_PROMPTS = 4
"""Captions of the training set that are drawn when no prompts are given."""

_CELL = (128, 192)
_COLUMNS_AT_MOST = 12


class SampleDrawer:
    """Draws sample images of a model in training.

    folder: where the images go, one a step and prompt. base_model: its noise schedule is used.
    seed: of the first prompt's noise; each next one counts one up. shape: (channels, height/8,
    width/8) of the latents. log: called when images are removed.
    """

    def __init__(
        self,
        folder: Path,
        base_model: Path,
        load_vae: Callable[[], AutoencoderKL],
        settings: SamplerSettings,
        *,
        prompts: Sequence[str],
        seed: int,
        shape: tuple[int, int, int],
        zero_terminal_snr: bool,
        log: Callable[[str], None],
    ) -> None:
        self.prompts = [" ".join(prompt.split()) for prompt in prompts]
        self._folder = folder
        self._base_model = base_model
        self._load_vae = load_vae
        self._settings = settings
        self._seed = seed
        self._shape = shape
        self._zero_terminal_snr = zero_terminal_snr
        self._log = log

    @torch.no_grad()
    def draw(self, step: int, predict: Callable[[Tensor, Tensor, Sequence[str]], Tensor]) -> None:
        """Draws all prompts one by one and writes them when all are there. At step 0, and where the
        images there are of other prompts, noise or sampling, it begins anew.

        predict: latents float32 (2, *shape), timestep and two texts -> what the U-Net predicts, in
        the shape of the latents.
        """
        self._make_room(step)
        vae = self._load_vae()
        images = []
        for number, prompt in enumerate(self.prompts):
            latents = self._denoise(prompt, self._seed + number, predict, vae.device)
            pixels = vae.decode(latents / vae.config["scaling_factor"], return_dict=False)[0]
            images += to_images(pixels)
        for number, image in enumerate(images):
            image.save(self._folder / f"step-{step:08d}-{number}.png")

    def _make_room(self, step: int) -> None:
        """The folder is there, with such images only as are drawn now."""
        sampling = {
            "prompts": self.prompts,
            "seed": self._seed,
            "scheduler": self._settings.scheduler,
            "num_inference_steps": self._settings.num_inference_steps,
            "guidance_scale": self._settings.guidance_scale,
        }
        text = json.dumps(sampling, indent=1)
        written = self._folder / SAMPLING_NAME
        same = written.exists() and written.read_text("utf-8") == text
        if same and step > 0:
            return
        if step > 0 and any(self._folder.glob("*.png")):
            self._log(
                f"{self._folder}: the samples of other prompts, noise or sampling are removed; "
                f"new ones begin at step {step}"
            )
        shutil.rmtree(self._folder, ignore_errors=True)  # at step 0: of a run that has no save
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / PROMPTS_NAME).write_text("\n".join(self.prompts) + "\n", "utf-8")
        written.write_text(text, "utf-8")

    def _denoise(
        self,
        prompt: str,
        seed: int,
        predict: Callable[[Tensor, Tensor, Sequence[str]], Tensor],
        device: torch.device,
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022) with the empty prompt."""
        scheduler = make_scheduler(
            self._base_model, self._settings.scheduler, zero_terminal_snr=self._zero_terminal_snr
        )
        scheduler.set_timesteps(self._settings.num_inference_steps, device=device)
        latents = initial_latents([seed], self._shape).to(device) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            x = scheduler.scale_model_input(latents, timestep)
            without, wanted = predict(torch.cat([x, x]), timestep, ["", prompt]).float().chunk(2)
            predicted = without + self._settings.guidance_scale * (wanted - without)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents


def draw_grid(path: Path, folder: Path) -> None:
    """One picture of all samples in `folder`: a row a prompt, a column a step; of many steps, some
    spread evenly."""
    prompts = (folder / PROMPTS_NAME).read_text("utf-8").splitlines()
    steps = sorted({int(file.name.split("-")[1]) for file in folder.glob("step-*.png")})
    if len(steps) > _COLUMNS_AT_MOST:
        last = _COLUMNS_AT_MOST - 1
        steps = [steps[round(n * (len(steps) - 1) / last)] for n in range(_COLUMNS_AT_MOST)]
    rows = [f"{number + 1}. {prompt}" for number, prompt in enumerate(prompts)]
    cells = {
        (row, f"step {step}"): folder / f"step-{step:08d}-{number}.png"
        for number, row in enumerate(rows)
        for step in steps
    }
    grid(rows, [f"step {step}" for step in steps], dict(cells), cell=_CELL).save(path)
