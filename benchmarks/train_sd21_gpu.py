"""`train_sd21_gpu`: Stable Diffusion 2.1 size at 512 px on a GPU, against diffusers' script.

Both sides: random weights of the real size, bf16, 8-bit Adam, batch 1 and 4, the U-Net alone and
with the text encoder, ours with its defaults. Then what each measure contributes: CUDA graphs are
left out; without them, since they hide what the others save the processor, each other one is left
out, or added, alone. No rows without a GPU.

With `--file`, each row is filed when it is there, and a run that fails is a row too. `--part`
measures some of the runs and `--keep` leaves the model for the next command, so that all of them
can be made in several short ones, in this order: `--part unet.batch1.plain` and
`--part unet.batch1.without_cuda_graphs`, with which the others of that batch are compared, in less
than a minute; then the peer, the measures, and batch 4.

One run of each side is one sample. With `--rounds 3` the parts `peer` measure both sides anew, in
turn, and give the medians.

`--rehearse` runs every line of it on a tiny model and whatever device there is, so that the command
is known to work before a GPU is paid for; its figures mean nothing and are not filed.
"""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.real_model import stable_diffusion
from benchmarks.rows import Row, filed
from benchmarks.training_runs import (
    CAPTION,
    Measured,
    RunFailed,
    peer_script,
    run_ours,
    run_peer,
    training_set,
)

if TYPE_CHECKING:
    import torch

THESIS_STEPS = 1000
BF16_PEAK_TFLOPS = {
    "h100": 989, "h100 pcie": 756, "h100 nvl": 835, "h200": 989, "a100": 312, "l4": 121, "l40": 181,
    "l40s": 362, "4090": 165, "3090": 71,
}  # fmt: skip
"""Dense bf16, from the makers' data sheets; by whole words of the device's name, of which the
longest row counts."""

PEER_NAME = "diffusers train_dreambooth.py"

_LONGEST_REASON = 160


@dataclass(frozen=True)
class Scale:
    """How large the comparison is: pixels a side, batches, steps before and in all."""

    side: int
    batches: tuple[int, ...]
    warm: int
    steps: int


FULL = Scale(side=512, batches=(1, 4), warm=10, steps=40)
REHEARSAL = Scale(side=32, batches=(2,), warm=1, steps=3)

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "mixed_precision": "bf16",
    "optimizer": "adamw_8bit",
}
WITHOUT_GRAPHS = "without CUDA graphs"
OF_THE_PLAIN_RUN: dict[str, dict[str, Any]] = {
    WITHOUT_GRAPHS: {"cuda_graphs": False},
    "with compile and CUDA graphs": {"compile": True, "cuda_graphs": True},
}
"""Runs that are compared with the one that has all defaults."""
MEASURES: dict[str, dict[str, Any]] = {
    "with channels_last": {"channels_last": True},
    "with compile": {"compile": True},
    "with compiled blocks": {"compile": True, "compile_blocks": True},
    "with fused AdamW in place of 8-bit": {"optimizer": "adamw_fused"},
    "with plain AdamW in place of 8-bit": {"optimizer": "adamw"},
    "with a sync each step": {"log_every_steps": 1},
    "with gradient checkpointing": {"gradient_checkpointing": True},
    "with LoRA": {"method": "lora"},
}
"""Runs without CUDA graphs, compared with the one that has all other defaults."""


class Figures(NamedTuple):
    """Of a run, or the medians of several: steps per second, and peaks of the memory in GiB, see
    `Measured`."""

    speed: float
    memory: float
    reserved: float


def run(
    *,
    rehearse: bool = False,
    part: Sequence[str] = (),
    keep: Path | None = None,
    rounds: int = 1,
) -> Iterator[Row]:
    """Rows as they are measured, so that each can be filed before the next is begun.

    part: only runs with one of them in their names, such as `unet.batch1` or `with_compile`. keep:
    folder in which the model that is trained is left for the next command, gigabytes. rounds: how
    often ours and the peer are measured in turn; once, ours is the figure of the plain run.
    """
    import torch

    from posterpipe.core.devices import give_memory_back

    if not rehearse and not torch.cuda.is_available():
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scale = REHEARSAL if rehearse else FULL
        base = stable_diffusion(keep or folder, rehearse=rehearse)
        data = training_set(folder / "data", images=16, side=scale.side)
        known = {} if rehearse else _known_figures()
        for name, measure in _Comparison(folder, base, data, scale, rounds, known).runs():
            if not part or any(f".{words}." in f"{name}." for words in part):
                yield from _rows_or_failure(name, measure)
                give_memory_back()  # the runs are processes of their own


def _known_figures() -> dict[str, float]:
    """What was filed: ours by the row's name, the peer's by that name and `.peer`."""
    rows = filed()
    ours = {row["name"]: row["ours"] for row in rows}
    peers = {f"{row['name']}.peer": row["peer"] for row in rows}
    return {name: figure for name, figure in {**ours, **peers}.items() if figure}


def _rows_or_failure(name: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a run; one that does not go through is a row itself, in place of the first."""
    try:
        yield from measure()
    except RuntimeError as error:  # RunFailed, and what torch raises in this process
        yield Row(name.removesuffix(".plain"), f"failed ({_reason(error)})", None)


def _reason(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST_REASON]


class _Comparison:
    """All runs of the benchmark, each by its name.

    known: figures that were filed before, by name; a measure alone is compared with the plain run
    of this command or, where that is not among its runs, of an earlier one.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        data: Path,
        scale: Scale,
        rounds: int,
        known: dict[str, float],
    ) -> None:
        self._folder = folder
        self._base = base
        self._data = data
        self._scale = scale
        self._rounds = rounds
        self._known = dict(known)
        self._numbers = itertools.count()

    def runs(self) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
        for text_encoder, batch in itertools.product((False, True), self._scale.batches):
            parts = "unet_text_encoder" if text_encoder else "unet"
            name = f"train_sd21_gpu.{parts}.batch{batch}"
            training = {
                **SETTINGS,
                "max_train_steps": self._scale.steps,
                "train_batch_size": batch,
                "train_text_encoder": text_encoder,
            }
            yield f"{name}.plain", partial(self._plain, name, training)
            without, *others = (
                self._changed(name, "the plain run", {**training, **changes}, measure)
                for measure, changes in OF_THE_PLAIN_RUN.items()
            )
            yield without
            yield f"{name}.peer", partial(self._peer, name, training)
            if text_encoder:
                continue
            yield from others
            eager, base = without[0], {**training, **OF_THE_PLAIN_RUN[WITHOUT_GRAPHS]}
            for measure, changes in MEASURES.items():
                yield self._changed(eager, WITHOUT_GRAPHS, {**base, **changes}, measure, name)
            waits = "with bitsandbytes own Adam step"
            yield self._changed(eager, WITHOUT_GRAPHS, base, waits, name, adam_waits=True)
            for words, seconds in (
                ("vae_at_each_step", _vae_seconds),
                ("captions_at_each_step", _text_encoder_seconds),
            ):
                yield f"{name}.{words}", partial(self._saved, f"{name}.{words}", seconds, batch)

    def _changed(
        self,
        other: str,
        title: str,
        training: dict[str, Any],
        measure: str,
        plain: str | None = None,
        *,
        adam_waits: bool = False,
    ) -> tuple[str, Callable[[], Iterator[Row]]]:
        """The run of one of the measures, and its name. It is compared with the run named `other`,
        `title` in words, and belongs to the plain one, which is the same if none is given."""
        plain = plain or other
        name = f"{plain}.{re.sub(r'[^a-z0-9]+', '_', measure.lower())}"
        compare = partial(self._measure, plain, other, title, name)
        return name, partial(compare, training, adam_waits=adam_waits)

    def _ours(self, training: dict[str, Any], *, adam_waits: bool = False) -> Figures:
        work = self._folder / f"ours-{next(self._numbers)}"
        settings = {"log_every_steps": self._scale.warm, **training}
        side = self._scale.side
        measured = run_ours(work, self._base, self._data, side, adam_waits=adam_waits, **settings)
        shutil.rmtree(work)
        return self._figures(measured)

    def _theirs(self, script: Path, training: dict[str, Any]) -> Figures:
        work = self._folder / f"peer-{next(self._numbers)}"
        measured = run_peer(script, work, self._base, self._data, self._scale.side, **training)
        shutil.rmtree(work)
        return self._figures(measured)

    def _figures(self, measured: Measured) -> Figures:
        speed = measured.steps_per_second(self._scale.warm)
        return Figures(speed, measured.peak_gib, measured.reserved_gib)

    def _plain(self, name: str, training: dict[str, Any]) -> Iterator[Row]:
        """Ours, and how it stands to what the GPU can do."""
        mine = self._ours(training)
        self._known |= zip(_rows_of(name), mine, strict=True)
        yield Row(name, "steps/s", round(mine.speed, 3), required="needs --peer-script")
        yield from _memory_rows(name, mine)
        batch = training["train_batch_size"]
        yield Row(f"{name}.images", "images/s", round(mine.speed * batch, 2))
        seconds = round(THESIS_STEPS / mine.speed)
        yield Row(f"{name}.thesis_run", "s for 1,000 steps, saves not counted", seconds)
        peak = _peak_tflops()
        rate = f"{name}.of_bf16_peak" if peak else f"{name}.rate"
        yield from _rows_or_failure(rate, partial(self._rate, rate, mine.speed, peak, training))

    def _rate(
        self, name: str, speed: float, peak: int | None, training: dict[str, Any]
    ) -> Iterator[Row]:
        text_encoder = training["train_text_encoder"]
        batch, side = training["train_batch_size"], self._scale.side
        rate = speed * _step_flops(self._base, batch, side, text_encoder) / 1e12
        if peak:
            yield Row(name, "%", round(100 * rate / peak, 1))
        else:
            yield Row(name, "TFLOP/s (no peak known)", round(rate, 2))

    def _peer(self, name: str, training: dict[str, Any]) -> Iterator[Row]:
        """diffusers' script beside ours, in turn: their medians take the place of ours alone."""
        script = peer_script()
        if script is None:
            return
        mine, theirs = list[Figures](), list[Figures]()
        for _ in range(self._rounds):
            mine.append(self._ours(training) if self._rounds > 1 else self._known_run(name))
            try:
                theirs.append(self._theirs(script, training))
            except RunFailed as error:
                failed = f"the script failed: {_reason(error)}"
                yield Row(name, "steps/s", round(mine[0].speed, 3), required=failed)
                return
        ours, peer = _medians(mine), _medians(theirs)
        self._known |= zip(_rows_of(name), ours, strict=True)
        self._known[f"{name}.peer"] = peer.speed
        yield from _compared(name, ours, peer, self._rounds)

    def _measure(
        self,
        plain: str,
        other: str,
        title: str,
        name: str,
        training: dict[str, Any],
        *,
        adam_waits: bool = False,
    ) -> Iterator[Row]:
        speed = self._known_figure(other)
        changed = self._ours(training, adam_waits=adam_waits)
        self._known[name] = changed.speed
        yield Row(
            name, "steps/s", round(changed.speed, 3), round(speed, 3), title,
            round(changed.speed / speed, 2),
        )  # fmt: skip
        if name.endswith(".without_cuda_graphs"):  # which small GPUs go without
            yield from _memory_rows(name, changed)
        peer = self._known.get(f"{plain}.peer")
        if training.get("compile") and peer:
            yield Row(
                f"{name}.to_peer", "steps/s", round(changed.speed, 3), round(peer, 3), PEER_NAME,
                round(changed.speed / peer, 2),
            )  # fmt: skip

    def _saved(
        self, name: str, seconds: Callable[[Path, int, int], float], batch: int
    ) -> Iterator[Row]:
        """What is done once in place of at each step."""
        saved = seconds(self._base, batch, self._scale.side)
        yield Row(name, "ms saved a step", round(1000 * saved, 1))

    def _known_run(self, name: str) -> Figures:
        return Figures(*map(self._known_figure, _rows_of(name)))

    def _known_figure(self, name: str) -> float:
        """A figure of the plain run."""
        figure = self._known.get(name)
        if figure is None:
            raise RunFailed(
                f"no figure of {name} to compare with; measure its part plain first, with --file"
            )
        return figure


def _rows_of(name: str) -> tuple[str, str, str]:
    """The names of the rows with the figures of a plain run."""
    return name, f"{name}.memory", f"{name}.memory_reserved"


def _memory_rows(name: str, run: Figures) -> Iterator[Row]:
    yield Row(f"{name}.memory", "GiB", round(run.memory, 2))
    yield Row(f"{name}.memory_reserved", "GiB, step 1 included", round(run.reserved, 2))


def _medians(runs: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(figures) for figures in zip(*runs, strict=True)))


def _compared(name: str, ours: Figures, peer: Figures, rounds: int) -> Iterator[Row]:
    title = PEER_NAME if rounds == 1 else f"{PEER_NAME}, medians of {rounds} in turn"
    yield Row(
        name, "steps/s", round(ours.speed, 3), round(peer.speed, 3), title,
        round(ours.speed / peer.speed, 2), "ours / peer at least 1.5",
    )  # fmt: skip
    yield Row(
        f"{name}.memory", "GiB", round(ours.memory, 2), round(peer.memory, 2), title,
        round(peer.memory / max(ours.memory, 1e-9), 2), "peer / ours at least 1",
    )  # fmt: skip
    yield Row(
        f"{name}.memory_reserved", "GiB, step 1 included", round(ours.reserved, 2),
        round(peer.reserved, 2), title, round(peer.reserved / max(ours.reserved, 1e-9), 2),
    )  # fmt: skip


def _peak_tflops() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return peak_tflops(torch.cuda.get_device_name())


def peak_tflops(device_name: str) -> int | None:
    """The peak of a device such as "NVIDIA H100 PCIe"; None for one that is not known."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    named = [name for name in BF16_PEAK_TFLOPS if words.issuperset(name.split())]
    return BF16_PEAK_TFLOPS[max(named, key=len)] if named else None


def _step_flops(base: Path, batch: int, side: int, text_encoder: bool) -> float:
    """Floating-point operations of one step: three times those forward, since the backward pass
    computes two products for each of the forward's. Nothing is computed, shapes are enough."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, CLIPTextModel

    from posterpipe.core.dreambooth.texts import Tokens

    tokens = Tokens(base)([CAPTION] * batch).to("meta")
    with torch.device("meta"), torch.no_grad():
        config = UNet2DConditionModel.load_config(base / "unet")
        unet: Any = UNet2DConditionModel.from_config(config)
        encoder: Any = CLIPTextModel(AutoConfig.from_pretrained(base / "text_encoder"))
        latents = torch.randn(batch, int(unet.config["in_channels"]), side // 8, side // 8)
        with FlopCounterMode(display=False) as counted:
            embeds = encoder(tokens)[0]
        encoded = counted.get_total_flops() if text_encoder else 0
        with FlopCounterMode(display=False) as counted:
            unet(latents, torch.zeros(batch, dtype=torch.long), embeds)
    return 3.0 * (encoded + counted.get_total_flops())


def _vae_seconds(base: Path, batch: int, side: int) -> float:
    """What encoding a batch in bf16 takes, as a trainer does that caches no latents."""
    import torch

    from posterpipe.core.devices import best_device
    from posterpipe.core.dreambooth.base_model import load_vae

    device = best_device()
    vae: Any = load_vae(base).to(device, torch.bfloat16)
    pixels = torch.randn(batch, 3, side, side, device=device, dtype=torch.bfloat16)
    return _seconds(partial(vae.encode, pixels), device)


def _text_encoder_seconds(base: Path, batch: int, side: int) -> float:
    """What a batch of captions takes in bf16, as a trainer does that keeps no hidden states."""
    import torch

    from posterpipe.core.devices import best_device
    from posterpipe.core.dreambooth.base_model import load_text_encoder
    from posterpipe.core.dreambooth.texts import Tokens

    device = best_device()
    encoder: Any = load_text_encoder(base).to(device, torch.bfloat16)
    tokens = Tokens(base)([CAPTION] * batch).to(device)
    return _seconds(partial(encoder, tokens), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes, without gradients."""
    import torch

    seconds = 0.0
    with torch.no_grad():
        for times in (3, 20):  # the first ones prepare memory and kernels
            _wait(device)
            started = time.perf_counter()
            for _ in range(times):
                call()
            _wait(device)
            seconds = (time.perf_counter() - started) / times
    return seconds


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
