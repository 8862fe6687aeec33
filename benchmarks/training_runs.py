"""Training runs for benchmarks, each in a process of its own: ours, and diffusers' example script.

What belongs here: running both on the same model and images and telling steps per second, peak
memory and losses. What does not: which runs are compared (`train_unet` and the others).

The peer is `examples/dreambooth/train_dreambooth.py` of diffusers. It is not part of this project:
`python -m benchmarks --peer-script PATH` names it. It runs unchanged; around it, the moment of each
step is recorded, `torchvision.transforms` is stood in for where it is not installed, and for the
comparison of losses the random numbers are ours.
"""

from __future__ import annotations

import atexit
import csv
import enum
import importlib.machinery
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from posterpipe.settings import default_root

PEER_SCRIPT = "POSTERPIPE_PEER_SCRIPT"
"""Variable with the path of diffusers' script."""

CAPTION = "a minimalist film poster"
"""Of all images: the peer knows one prompt only."""


class RunFailed(RuntimeError):
    """A run left no figures; the message is the last line that it printed."""


@dataclass(frozen=True)
class Measured:
    """One run: at the end of which steps, at what time in seconds, which losses, and peaks of the
    GPU's memory in GiB (0 on a CPU): of what was in use after the first step, in which cuDNN tries
    its algorithms, and of what torch had reserved in the whole run, that step included.
    """

    steps: list[int]
    seconds: list[float]
    losses: list[float]
    peak_gib: float
    reserved_gib: float

    def steps_per_second(self, first: int) -> float:
        """From the end of step `first` to the last one: what comes before is warming up."""
        start = self.steps.index(first)
        return (self.steps[-1] - first) / (self.seconds[-1] - self.seconds[start])


def peer_script() -> Path | None:
    """diffusers' script, None where none is named."""
    path = os.environ.get(PEER_SCRIPT)
    return Path(path).resolve() if path else None


def training_set(folder: Path, *, images: int, side: int) -> Path:
    """A training set of square starter posters, all under one caption, and their folder for the
    peer, `images`."""
    posters = sorted((default_root() / "data" / "raw_posters").iterdir())[:images]
    (folder / "images").mkdir(parents=True)
    with open(folder / "training.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for number, poster in enumerate(posters):
            name = f"images/{number:04d}.png"
            with Image.open(poster) as image:
                image.convert("RGB").resize((side, side)).save(folder / name)
            rows.writerow([name, CAPTION])
    return folder


def in_fp32(base: Path, folder: Path) -> Path:
    """A copy of a model in fp32, as the peer wants it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    for part in ("unet", "text_encoder", "vae"):
        for path in (folder / part).glob("*.safetensors"):
            state = {name: value.float() for name, value in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
    # transformers takes the precision from here, whatever the weights say.
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "dtype": "float32"}), encoding="utf-8")
    return folder


def run_ours(
    work: Path, base: Path, data: Path, side: int, *, adam_waits: bool = False, **training: Any
) -> Measured:
    """Trains with the trainer of this project; with `adam_waits`, 8-bit Adam goes through the
    parameters as bitsandbytes does. Raises RunFailed."""
    from posterpipe.core.dreambooth.config import RunConfig, Versions
    from posterpipe.training_settings import TrainingSettings

    config = RunConfig(
        base_model=base,
        training_set=data,
        output_dir=work / "out",
        work_dir=work / "work",
        cache_dir=data / "cache",
        width=side,
        height=side,
        # Not measured: hashing gigabytes of a model that was made for this is no part of training.
        versions=Versions(training_set=str(data), base_model=str(base)),
        training=TrainingSettings(
            holdout_every_steps=None, lr_scheduler="constant", save_every_steps=10**6, **training
        ),
    )
    adam = "waits" if adam_waits else ""
    return _in_process("ours", str(config.to_toml(work / "run.toml")), adam, work=work)


def run_peer(
    script: Path,
    work: Path,
    base: Path,
    data: Path,
    side: int,
    *,
    same_draws: bool = False,
    **training: Any,
) -> Measured:
    """Trains with diffusers' script; `training` are names and values of our settings.

    Raises RunFailed.
    """
    arguments = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": data / "images",
        "instance_prompt": CAPTION,
        "output_dir": work / "out",
        "resolution": side,
        "train_batch_size": training["train_batch_size"],
        "max_train_steps": training["max_train_steps"],
        "learning_rate": training["learning_rate"],
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": 10**6,
        "seed": training.get("seed", 777),
        "mixed_precision": {"fp32": "no"}.get(
            training["mixed_precision"], training["mixed_precision"]
        ),
    }
    flags = ["--train_text_encoder"] if training["train_text_encoder"] else []
    flags += ["--use_8bit_adam"] if training["optimizer"] == "adamw_8bit" else []
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    draws = str(data) if same_draws else ""
    return _in_process("peer", str(script), draws, *words, *flags, work=work)


def _in_process(*arguments: str, work: Path) -> Measured:
    work.mkdir(parents=True, exist_ok=True)
    result = work / "measured.json"
    words = [str(result), *arguments]
    process = _ready.pop() if _ready else _start()
    if len(os.sched_getaffinity(0)) >= _CORES_TO_SPARE:
        _ready.append(_start())
    stdout, stderr = process.communicate(json.dumps(words))
    if not result.exists():
        print(f"{' '.join(words)} failed:\n{stdout}\n{stderr}", file=sys.stderr)
        said = [line.strip() for line in stderr.splitlines() if line.strip()]
        raise RunFailed(said[-1] if said else f"it ended with status {process.returncode}")
    return Measured(**json.loads(result.read_text(encoding="utf-8")))


_CORES_TO_SPARE = 8
"""With so many, the next run's process imports its libraries, seconds, while a model is loaded for
this one; on a GPU machine, whose time is dear, that is a third of a short run."""

_ready: list[subprocess.Popen[str]] = []
"""Processes that wait for their run."""


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.training_runs"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=default_root(),
    )  # fmt: skip


@atexit.register
def _end_what_waits() -> None:
    for process in _ready:
        process.communicate("")


# -- in the process of a run ----------------------------------------------------------------------


class _Recorder:
    def __init__(self, result: Path) -> None:
        self._result = result
        self._values: dict[str, Any] = {"steps": [], "seconds": [], "losses": []}
        self._reserved_gib = 0.0

    def add(self, step: int, loss: float | None) -> None:
        for name, value in (("steps", step), ("seconds", time.perf_counter()), ("losses", loss)):
            self._values[name].append(value)
        if step == 1:
            _, self._reserved_gib = _peaks()
            _forget_peaks()

    def write(self) -> None:
        peak, reserved = _peaks()
        peaks = {"peak_gib": peak, "reserved_gib": max(reserved, self._reserved_gib)}
        self._result.write_text(json.dumps({**self._values, **peaks}), encoding="utf-8")


def _peaks() -> tuple[float, float]:
    """GiB in use and GiB reserved, at most since they were forgotten."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def _forget_peaks() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class _Enough(BaseException):
    """Ends a run after its last step: writing the finished model is not measured."""


def _ours(recorder: _Recorder, config_file: Path, *, adam_waits: bool) -> None:
    from posterpipe.core.dreambooth.config import RunConfig
    from posterpipe.core.dreambooth.reports import StepReport
    from posterpipe.core.dreambooth.train import train

    config = RunConfig.from_toml(config_file)
    if adam_waits:
        from posterpipe.core.dreambooth.adamw_8bit import QueuedAdamW8bit

        del QueuedAdamW8bit.step  # bitsandbytes' own is left

    def report(row: StepReport) -> None:
        recorder.add(row.step, row.loss)
        if row.step == row.total:
            raise _Enough

    train(config, report)


def _peer(recorder: _Recorder, script: Path, draws: str, arguments: Sequence[str]) -> None:
    import accelerate
    import diffusers  # noqa: F401  (looks for torchvision before it is stood in for)
    import transformers  # noqa: F401

    if importlib.util.find_spec("torchvision") is None:
        _stand_in_for_torchvision()
    total = int(arguments[arguments.index("--max_train_steps") + 1])

    def log(self: Any, values: dict[str, float], step: int, **_: Any) -> None:
        recorder.add(step, values["loss"])
        if step == total:
            raise _Enough

    accelerate.Accelerator.log = log
    if draws:
        _use_our_draws(Path(draws), arguments)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _stand_in_for_torchvision() -> None:
    """The five transforms that the script uses, on PIL images."""
    import numpy as np
    import torch

    class Compose:
        def __init__(self, parts: Sequence[Any]) -> None:
            self.parts = parts

        def __call__(self, value: Any) -> Any:
            for part in self.parts:
                value = part(value)
            return value

    class Resize:
        def __init__(self, size: int, interpolation: Any = None) -> None:
            self.size = size

        def __call__(self, image: Image.Image) -> Image.Image:
            scale = self.size / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            return image.resize(size, Image.Resampling.BILINEAR)

    class RandomCrop:
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, image: Image.Image) -> Image.Image:
            # The benchmark's images are square: there is one place to crop.
            return image.crop((0, 0, self.size, self.size))

    class ToTensor:
        def __call__(self, image: Image.Image) -> torch.Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    class Normalize:
        def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
            self.mean, self.std = mean[0], std[0]

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return (pixels - self.mean) / self.std

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("transforms")
    for part in (Compose, Resize, RandomCrop, ToTensor, Normalize):
        setattr(transforms, part.__name__, part)
    modes = enum.Enum("modes", {"BILINEAR": "bilinear"})
    transforms.InterpolationMode = modes  # type: ignore[attr-defined]
    transforms.CenterCrop = RandomCrop  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    sys.modules["torchvision"], sys.modules["torchvision.transforms"] = package, transforms


def _use_our_draws(data: Path, arguments: Sequence[str]) -> None:
    """Gives the script our order, noise and timesteps, batch by batch."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from posterpipe.core.dreambooth.base_model import load_unet
    from posterpipe.core.dreambooth.draws import Stream

    def value(name: str) -> str:
        return arguments[arguments.index(f"--{name}") + 1]

    batch, steps, side = (
        int(value(name)) for name in ("train_batch_size", "max_train_steps", "resolution")
    )
    names = sorted(path.name for path in (data / "images").iterdir())
    unet = load_unet(Path(value("pretrained_model_name_or_path")))
    shape = (int(unet.config["in_channels"]), side // 8, side // 8)
    stream = Stream(int(value("seed")), "posters", (shape,) * len(names), timesteps=1000)
    draws = [stream.draw(position) for position in range(steps * batch)]
    batches = [draws[start : start + batch] for start in range(0, len(draws), batch)]

    class InOurOrder(torch.utils.data.Sampler):
        """Goes on where the last epoch ended."""

        def __init__(self, dataset: Any) -> None:
            places = {path.name: n for n, path in enumerate(dataset.instance_images_path)}
            self.order = iter([places[names[draw.index]] for draw in draws])
            self.length = len(names)

        def __len__(self) -> int:
            return self.length

        def __iter__(self) -> Any:
            for _ in range(self.length):
                yield next(self.order, 0)

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, dataset: Any, *, shuffle: bool = False, **options: Any) -> None:
            super().__init__(dataset, sampler=InOurOrder(dataset), **options)

    torch.utils.data.DataLoader = Loader  # type: ignore[misc,assignment]
    latent_noise = iter([torch.stack([d.latent_noise for d in b]) for b in batches])
    noise = iter([torch.stack([d.noise for d in b]) for b in batches])
    timesteps = iter([torch.tensor([d.timestep for d in b]) for b in batches])

    def sample(self: Any, generator: Any = None) -> torch.Tensor:
        return self.mean + self.std * next(latent_noise).to(self.mean)

    DiagonalGaussianDistribution.sample = sample
    torch.randn_like = lambda like, **_: next(noise).to(like)  # type: ignore[assignment]
    torch.randint = lambda *_, device=None, **__: next(timesteps).to(device)


def main() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    import posterpipe.core.dreambooth.train  # noqa: F401

    words = sys.stdin.read()
    if not words:  # no run came
        return
    result, side, *arguments = json.loads(words)
    recorder = _Recorder(Path(result))
    try:
        if side == "ours":
            _ours(recorder, Path(arguments[0]), adam_waits=arguments[1] == "waits")
        else:
            _peer(recorder, Path(arguments[0]), arguments[1], arguments[2:])
    except _Enough:
        recorder.write()


if __name__ == "__main__":
    main()
