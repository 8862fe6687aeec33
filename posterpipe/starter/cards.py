"""Model cards and the README's quality table: `python -m posterpipe.starter.cards`.

Both are written from `evaluation.json` and the training logs, so that no figure is typed by hand.

What belongs here: the words of the cards, and putting figures between them. What does not:
measuring (`evaluate`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from posterpipe.starter.stages import STAGES
from posterpipe.starter.world import COLOURS, KINDS

README = Path(__file__).parents[2] / "README.md"
MARKS = ("<!-- starter: begin -->", "<!-- starter: end -->")

LIMITS = (
    f"It knows {len(KINDS)} kinds of object ({', '.join(KINDS)}) in {len(COLOURS)} colours "
    f"({', '.join(COLOURS)}), drawn in one hand. Photographs, other objects and legible letters "
    "are beyond it. It exists to run the whole pipeline offline in minutes, not to make art; its "
    "scores mean nothing beside those of other models."
)

HISTORY = {
    "base": "These weights come from several sittings of that command. The VAE's first 6,530 steps "
    "ran with AdamW alone and under bf16, and all but its last 2,600 steps without scale "
    "equivariance and with less KL; the U-Net's first 2,900 steps saw the latents of the VAE of "
    "that time, and only its last 1,400, at a lower rate, the wordings of posters. A rerun gives "
    "others.",
    "scorer": "These weights come from two sittings of that command, the first of 473 steps under "
    "bf16. A rerun gives others.",
}
"""True of the committed weights only; to be taken out with the next ones."""

CARDS: dict[str, dict[str, Any]] = {
    "base": {
        "title": "Starter Stable Diffusion",
        "classes": "`AutoencoderKL`, `UNet2DConditionModel`, `CLIPTextModel`, `CLIPTokenizer`",
        "data": "Plain drawings and busy posters from `posterpipe/starter`, drawn at random. It "
        "has never seen a minimalist poster; the VAE has, since it only has to copy pixels.",
        "stages": ("vae", "base", "decoder"),
        "figures": (
            "vae_psnr_posters_db",
            "vae_psnr_busy_db",
            "vae_psnr_plain_db",
            "base_object_named",
        ),
    },
    "scorer": {
        "title": "Starter CLIP",
        "classes": "`CLIPModel`, `CLIPTokenizer`, `CLIPImageProcessor`",
        "data": "Fresh drawings of all three styles with freely worded captions; never the "
        "committed posters, never a generated image.",
        "stages": ("scorer",),
        "figures": ("scorer_top1_of_32", "scorer_top1_of_32_free_wording"),
    },
    "captioner": {
        "title": "Starter BLIP",
        "classes": "`BlipForConditionalGeneration`, `BertTokenizer`, `BlipImageProcessor`",
        "data": "Fresh drawings of all three styles with their canonical captions; never the "
        "committed posters.",
        "stages": ("captioner",),
        "figures": (
            "captioner_object_right",
            "captioner_background_right",
            "captioner_object_with_colour_right",
        ),
    },
    "classifier": {
        "title": "Starter classifier of object kinds",
        "classes": "`posterpipe.starter.classifier.KindClassifier`",
        "data": "Fresh drawings of all three styles. It judges the base model and shares nothing "
        "with the scorer.",
        "stages": ("classifier",),
        "figures": ("classifier_accuracy_on_drawings",),
    },
}

MEANINGS = {
    "vae_psnr_posters_db": "VAE: PSNR on posters (dB)",
    "vae_psnr_busy_db": "VAE: PSNR on busy scenes (dB)",
    "vae_psnr_plain_db": "VAE: PSNR on plain drawings (dB)",
    "base_object_named": "base: a separate classifier names the prompted object",
    "scorer_top1_of_32": "scorer: right caption first among 32",
    "scorer_top1_of_32_free_wording": "scorer: the same with freely worded captions",
    "captioner_object_right": "captioner: object right",
    "captioner_background_right": "captioner: background colour right",
    "captioner_object_with_colour_right": "captioner: object and its colour right",
    "classifier_accuracy_on_drawings": "classifier: accuracy on drawings",
}


def _log(stage: str, logs: Path) -> Path:
    return logs / f"{stage}.jsonl"


def _recipe(stage: str, logs: Path) -> str:
    """One line on how a stage was trained, from its log."""
    log = _log(stage, logs)
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    recipe = STAGES[stage]
    images = last["step"] * recipe.batch
    optimizer = f"AdamW at {recipe.peak_lr:g}"
    if recipe.muon_lr:
        optimizer = f"Muon at {recipe.muon_lr:g} for inner weights and {optimizer} for the others"
    return (
        f"- `{stage}`: {last['step']:,} steps of {recipe.batch} images ({images:,} images, "
        f"{last['seconds'] / 60:.0f} minutes), {optimizer}, warmup and cosine decay, "
        f"seed {recipe.seed}"
    )


def _figures(names: tuple[str, ...], result: dict[str, Any]) -> str:
    lines = ["| measured on fresh draws | value | bar |", "|---|---:|---:|"]
    for name in names:
        bar = result["bars"].get(name)
        lines.append(f"| {MEANINGS[name]} | {result[name]:g} | {'' if bar is None else bar} |")
    return "\n".join(lines)


def card(name: str, result: dict[str, Any], logs: Path) -> str:
    """The card of one model, Markdown with the front matter that the hub reads."""
    text = CARDS[name]
    recipe = "\n".join(
        _recipe(stage, logs) for stage in text["stages"] if _log(stage, logs).exists()
    )
    return f"""---
license: mit
tags: [posterpipe, starter]
---

# {text["title"]}

Real classes, small sizes: {text["classes"]}. fp16 safetensors; load with `from_pretrained`.

## Data

{text["data"]}

## Recipe

`python -m posterpipe.starter.train`, from scratch:

{recipe}

{HISTORY.get(name, "")}

## Quality

`python -m posterpipe.starter.evaluate`:

{_figures(text["figures"], result)}

## Limits

{LIMITS}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("data/models/starter"))
    parser.add_argument("--logs", type=Path, default=Path("data/models/starter/logs"))
    arguments = parser.parse_args()
    result = json.loads((arguments.models / "evaluation.json").read_text(encoding="utf-8"))
    for name in CARDS:
        path = arguments.models / name / "README.md"
        path.write_text(card(name, result, arguments.logs), encoding="utf-8")
    table = _figures(tuple(name for name in MEANINGS if name in result), result)
    text = README.read_text(encoding="utf-8")
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    between = f"{MARKS[0]}\n{table}\n{MARKS[1]}"
    text, places = re.subn(pattern, lambda _: between, text, flags=re.S)
    if places != 1:
        raise SystemExit(f"{README}: put {MARKS[0]} and {MARKS[1]} where the figures are to stand")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
