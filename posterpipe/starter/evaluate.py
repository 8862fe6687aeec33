"""How good the starter models are: `python -m posterpipe.starter.evaluate` writes evaluation.json.

Everything is measured on fresh draws, with seeds that no training stage uses, and the base model
by a classifier that shares nothing with the scorer.

What belongs here: figures of the starter models themselves. What does not: what fine-tuning makes
of them, which the scores of each `make demo` say, and the words around the figures (`cards`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posterpipe.starter import architectures
from posterpipe.starter.captions import caption
from posterpipe.starter.classifier import KindClassifier
from posterpipe.starter.render import render
from posterpipe.starter.stages import crop_or_pad, draw_scenes, to_pixels, visible_caption
from posterpipe.starter.world import COLOURS, KINDS, Scene, sample_scene

SEED = 987_654
BARS = {
    "vae_psnr_posters_db": 24.0,
    "scorer_top1_of_32": 0.85,
    "captioner_object_right": 0.90,
    "captioner_background_right": 0.90,
    "base_object_named": 0.75,
}


def psnr(ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """dB per image for images in -1..1: 10 log10(2^2 / mse)."""
    return 10 * torch.log10(4 / (ours - truth).pow(2).mean(dim=(1, 2, 3)))


@torch.no_grad()
def evaluate_vae(models: Path, count: int = 300) -> dict[str, float]:
    """Mean PSNR of encoding and decoding, in dB, by style."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(models / "base" / "vae", dtype=torch.float32).eval()
    result = {}
    for index, style in enumerate(("poster", "busy", "plain")):
        scenes = draw_scenes(np.random.default_rng([SEED, 1, index]), count, {style: 1.0})
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT)
        values = []
        for batch in pixels.split(50):
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
            values.append(psnr(decoded, batch))
        result[f"vae_psnr_{style}s_db" if style == "poster" else f"vae_psnr_{style}_db"] = round(
            float(torch.cat(values).mean()), 2
        )
    return result


def _distinct(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes that differ in style, kind or colours, so that each has a caption of its own."""
    chosen: dict[tuple[str, str, str, str], Scene] = {}
    while len(chosen) < count:
        scene = sample_scene(rng)
        key = (scene.style, scene.kind, scene.object_colour, scene.background)
        chosen.setdefault(key, scene)
    return list(chosen.values())


@torch.no_grad()
def evaluate_scorer(models: Path, groups: int = 30) -> dict[str, float]:
    """Share of images whose own caption is the most similar among 32 distinct ones."""
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(models / "scorer", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(models / "scorer")
    right: dict[str, list[float]] = {"canonical": [], "varied": []}
    for group in range(groups):
        rng = np.random.default_rng([SEED, 2, group])
        scenes = _distinct(rng, 32)
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT)
        square = crop_or_pad(pixels, rng, architectures.VISION_PIXELS)
        wordings = {
            "canonical": [visible_caption(scene) for scene in scenes],
            "varied": [caption(scene, rng) for scene in scenes],
        }
        for name, texts in wordings.items():
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            logits = clip(pixel_values=square, **tokens).logits_per_image
            right[name].append(float((logits.argmax(1) == torch.arange(32)).float().mean()))
    return {
        "scorer_top1_of_32": round(float(np.mean(right["canonical"])), 4),
        "scorer_top1_of_32_free_wording": round(float(np.mean(right["varied"])), 4),
    }


@torch.no_grad()
def evaluate_captioner(models: Path, count: int = 400) -> dict[str, float]:
    """Share of fresh posters whose generated caption names the right kind and background."""
    from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    folder = models / "captioner"
    blip = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    scenes = draw_scenes(np.random.default_rng([SEED, 3]), count, {"poster": 1.0})
    kinds = backgrounds = colours = 0
    for start in range(0, count, 50):
        batch = scenes[start : start + 50]
        images = [
            render(scene, architectures.WIDTH * 4, architectures.HEIGHT * 4) for scene in batch
        ]
        small = [image.resize((architectures.WIDTH, architectures.HEIGHT), 1) for image in images]
        pixels = processor(images=small, return_tensors="pt").pixel_values
        texts = tokenizer.batch_decode(
            blip.generate(pixel_values=pixels, num_beams=3, max_new_tokens=40),
            skip_special_tokens=True,
        )
        for scene, text in zip(batch, texts, strict=True):
            kinds += f" {scene.kind}" in text
            backgrounds += f"{scene.background} background" in text
            colours += f"{scene.object_colour} {scene.kind}" in text
    return {
        "captioner_object_right": round(kinds / count, 4),
        "captioner_background_right": round(backgrounds / count, 4),
        "captioner_object_with_colour_right": round(colours / count, 4),
    }


def _prompts(count: int) -> Iterator[tuple[Scene, str]]:
    """Prompts about plain and busy scenes, every kind equally often, half of them freely worded."""
    rng = np.random.default_rng([SEED, 4])
    kinds = list(KINDS)
    for index in range(count):
        style = "plain" if index % 2 else "busy"
        scene = sample_scene(rng, style=style, kind=kinds[index % len(kinds)])
        yield scene, caption(scene, rng) if index % 4 < 2 else visible_caption(scene)


@torch.no_grad()
def evaluate_base(models: Path, count: int = 204, sheet: Path | None = None) -> dict[str, Any]:
    """Share of images in which the separate classifier names the prompted kind."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    classifier = KindClassifier.load(models / "classifier")
    scenes = draw_scenes(
        np.random.default_rng([SEED, 5]), 600, {"plain": 0.3, "busy": 0.4, "poster": 0.3}
    )
    named = classifier.name(to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT))
    accuracy = np.mean([name == scene.kind for name, scene in zip(named, scenes, strict=True)])
    pipeline = StableDiffusionPipeline.from_pretrained(
        models / "base", dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(_prompts(count))
    images: list[np.ndarray] = []
    for start in range(0, count, 34):
        batch = [text for _, text in prompts[start : start + 34]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        output = pipeline(
            batch,
            width=architectures.WIDTH,
            height=architectures.HEIGHT,
            num_inference_steps=20,
            guidance_scale=5.0,
            generator=generators,
            output_type="np",
        )
        images.extend(output.images)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() * 2 - 1
    names = classifier.name(pixels)
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for name, (scene, _) in zip(names, prompts, strict=True):
        by_kind[scene.kind].append(name == scene.kind)
    if sheet is not None:
        from PIL import Image

        from posterpipe.core.gallery import contact_sheet

        pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        labels = [visible_caption(scene) for scene, _ in prompts]
        contact_sheet(list(zip(pictures, labels, strict=True))[:72], columns=12).save(sheet)
    return {
        "base_object_named": round(float(np.mean([v for vs in by_kind.values() for v in vs])), 4),
        "base_object_named_by_kind": {k: round(float(np.mean(v)), 3) for k, v in by_kind.items()},
        "classifier_accuracy_on_drawings": round(float(accuracy), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("data/models/starter"))
    parser.add_argument("--out", type=Path, default=Path("data/models/starter/evaluation.json"))
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of base images here")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"seed": SEED, "bars": BARS, "colours": len(COLOURS)}
    for name, measure in (
        ("vae", lambda: evaluate_vae(arguments.models)),
        ("scorer", lambda: evaluate_scorer(arguments.models)),
        ("captioner", lambda: evaluate_captioner(arguments.models)),
        ("base", lambda: evaluate_base(arguments.models, sheet=arguments.sheet)),
    ):
        measured = measure()
        print(name, json.dumps(measured), flush=True)
        result.update(measured)
    result["met"] = {bar: result[bar] >= least for bar, least in BARS.items()}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
