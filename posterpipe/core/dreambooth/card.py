"""The model card of a finished checkpoint, README.md.

What belongs here: its words, all from the record. What does not: the record itself (`checkpoint`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posterpipe.core.dreambooth.config import RunConfig
from posterpipe.core.dreambooth.holdout import lowest
from posterpipe.core.dreambooth.lora import KOHYA_NAME
from posterpipe.core.dreambooth.reports import METRICS_NAME, PICTURE_NAME
from posterpipe.core.progress import duration

CARD_NAME = "README.md"

_ENDS = {
    "max_train_steps": "all steps were made",
    "early_stop": "the held-out loss had stopped falling",
    "time_limit": "the time limit was reached",
}


def write_card(path: Path, config: RunConfig, record: Mapping[str, Any]) -> None:
    """Writes the card into the folder of the checkpoint, whose pictures it shows."""
    path.write_text(card(config, record, path.parent), encoding="utf-8")


def card(config: RunConfig, record: Mapping[str, Any], folder: Path) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    settings = config.training
    base = str(record["base_model_name"])
    licence = base_licence(config.base_model)
    tags = ["stable-diffusion", "text-to-image", "diffusers", "dreambooth"]
    front = {
        "base_model": base,
        "library_name": "diffusers",
        "license": licence or "other",
        "tags": [*tags, "lora"] if settings.method == "lora" else tags,
    }
    made = record["reports"][-1]["step"]
    taken = ""
    lost = record["lost_lowest_step"]
    if lost is not None:
        taken = (
            f" The held-out loss was lowest at step {lost}, but the weights of that step were lost "
            f"(their save was damaged); these are those of step {record['steps']} of {made}."
        )
    elif record["steps"] < made:
        lowest_at = f"step {record['steps']} of {made}"
        taken = f" The weights are those of {lowest_at}, where the held-out loss was lowest."
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {base}, fine-tuned with DreamBooth", ""]
    lines += [
        f"Checkpoint `{record['checkpoint_id']}`: {_what(settings.method)} of "
        f"{'U-Net and text encoder' if settings.train_text_encoder else 'the U-Net'}, "
        f"{made} optimizer steps of {_images(settings, record['processes'])} in "
        f"{duration(record['seconds'])}; {_ENDS[record['ended_by']]}.{taken}{_skipped(record)}",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        'pipeline = StableDiffusionPipeline.from_pretrained("this folder")',
        "```",
        "",
    ]
    if settings.method == "lora":
        lines += [
            "The weights are merged. To put them on the base model instead: "
            '`pipeline.load_lora_weights("this folder")`. For kohya\'s scripts and the interfaces '
            f"that follow them there is `{KOHYA_NAME}`.",
            "",
        ]
    if settings.method == "lora" and settings.zero_terminal_snr:
        lines += [
            "The noise schedule ended in pure noise (zero terminal SNR). On the base model that is "
            "to be set: `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, "
            'rescale_betas_zero_snr=True, timestep_spacing="trailing")`, or what other programs '
            "have for it.",
            "",
        ]
    lines += ["## Curves", "", f"![Loss over the steps]({PICTURE_NAME})", ""]
    lines += [f"Smoothed loss at the end: {record['final_loss']:.4f}. {_holdout(record)}"]
    lines += [f"All numbers are in `{METRICS_NAME}`.", ""]
    if (folder / "samples.png").exists():
        lines += ["## Samples", "", "![Prompts by steps, the same noise](samples.png)", ""]
    lines += ["## Data", ""]
    lines += _table(
        {
            "training set": record["training_set"],
            "class images": record["class_set"] or "none",
            "held-out set": record["holdout_set"] or "none",
            "base model": f"{base}, {record['base_model']}",
            **({"goes on from": record["continued"]} if record.get("continued") else {}),
            "image size": f"{record['width']}x{record['height']} pixels"
            + (" (aspect-ratio buckets of that area)" if config.buckets else ""),
        }
    )
    lines += ["## Settings", "", *_table(record["settings"])]
    lines += ["## Versions", "", *_table({"trainer": record["trainer"], **record["packages"]})]
    lines += [
        "## Licence and limits",
        "",
        f"The weights are derived from {base} and stay under its licence"
        + (f" (`{licence}`)." if licence else "; its card names it.")
        + " Whoever passes them on has to have the right to the posters that they were trained on: "
        "a model trained on few images can repeat them closely. Compare with the training set "
        "before publishing what it draws.",
        "",
    ]
    return "\n".join(lines)


def base_licence(base_model: Path) -> str:
    """The licence that the base model's card names in its front matter; "" for none."""
    try:
        text = (base_model / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(r"^license:\s*(\S+)", front.group(1), re.M) if front else None
    return found.group(1).strip("\"'") if found else ""


def _what(method: str) -> str:
    return "LoRA" if method == "lora" else "full fine-tuning"


def _images(settings: Any, processes: int) -> str:
    count = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    shared = f" (in {processes} processes)" if processes > 1 else ""
    return f"{count} image{'s' if count > 1 else ''}{shared}"


def _skipped(record: Mapping[str, Any]) -> str:
    last = record["reports"][-1]
    if not last["skipped_steps"]:
        return ""
    return (
        f" Of {last['step']} steps, {last['skipped_steps']} changed nothing: their gradients "
        "overflowed in fp16."
    )


def _holdout(record: Mapping[str, Any]) -> str:
    losses = record["holdout"]
    if not losses:
        return "No held-out loss was measured."
    best = losses[lowest([row["loss"] for row in losses], 0.0)]
    return (
        f"Held-out loss: {losses[0]['loss']:.4f} at step {losses[0]['step']}, lowest "
        f"{best['loss']:.4f} at step {best['step']}, last {losses[-1]['loss']:.4f}."
    )


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, value in values.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
        text = str(shown).replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {name} | {text} |")
    return ["| | |", "|---|---|", *rows, ""]
