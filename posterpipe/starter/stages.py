"""What each starter model learns, and from which pictures.

What belongs here: a class a stage (its batches, its loss, its export). What does not: sizes of the
models (`architectures`), the loop around a step (`train`), the pictures themselves (`world`,
`render`, `captions`).
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posterpipe.starter import architectures, tokenizers
from posterpipe.starter.captions import caption, describe
from posterpipe.starter.classifier import KindClassifier
from posterpipe.starter.muon import Muon
from posterpipe.starter.render import render
from posterpipe.starter.world import KINDS, Scene, sample_scene


def draw_scenes(rng: np.random.Generator, count: int, shares: dict[str, float]) -> list[Scene]:
    """Random scenes; `shares` gives each style's probability."""
    styles = rng.choice(list(shares), size=count, p=list(shares.values()))
    return [sample_scene(rng, style=str(style)) for style in styles]


def to_pixels(scenes: list[Scene], width: int, height: int) -> Tensor:
    """float32 (batch, 3, height, width) in -1..1."""
    stack = np.stack([np.asarray(render(scene, width, height)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


class Stage(ABC):
    """One model's training. `modules` are saved and resumed by the loop."""

    name: str
    minutes: float
    peak_lr: float
    weight_decay: float = 0.01
    seed: int
    batch: int
    """Images a step."""

    def __init__(self, out: Path, work: Path) -> None:
        self.out = out
        self.work = work
        self.modules: dict[str, nn.Module] = {}
        self.device = torch.device("cpu")

    @abstractmethod
    def build(self, device: torch.device) -> None: ...

    @abstractmethod
    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        """Named losses of one batch; "loss" is the one that is minimised. Batches depend on the
        stage's seed and the step alone, so that a resumed run sees what it would have seen."""

    @abstractmethod
    def export(self) -> None:
        """Writes the model in the layout that `from_pretrained` reads, fp16."""

    muon_lr: float | None = None
    """Learning rate of the inner weight matrices under Muon; None leaves all to AdamW."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW; where `muon_lr` is set, Muon for the inner matrices and convolutions, which
        brought the VAE as far in one minute as AdamW in five."""
        parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        inner = [p for p in parameters if self.muon_lr and p.ndim > 1 and min(p.shape[:2]) >= 16]
        chosen = {id(p) for p in inner}
        rest = [p for p in parameters if id(p) not in chosen]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                rest,
                lr=self.peak_lr,
                betas=(0.9, 0.99),
                weight_decay=self.weight_decay,
                fused=True,
            )
        ]
        if self.muon_lr:
            optimizers.append(Muon(inner, lr=self.muon_lr, weight_decay=self.weight_decay))
        return optimizers

    def after_step(self, step: int) -> None:  # noqa: B027  (most stages need nothing here)
        """Called after every optimizer step, for weight averages and bounds."""

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step])

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on a GPU. On CPUs fp32 is quicker for models this small: measured 6 against 9 ms a
    sample for the U-Net, 3 against 8 ms for the scorer, 28 against 40 ms for the VAE."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def visible_caption(scene: Scene) -> str:
    """The canonical caption of what can be seen at starter size: a title's letters cannot."""
    return describe(replace(scene, title=None, title_position=None))


def varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a person might write: free wording mostly, the canonical caption at times."""
    choice = rng.random()
    if choice < 0.7:
        return caption(scene, rng)
    return visible_caption(scene) if choice < 0.85 else describe(scene)


def base_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What the base model is told of a scene. Plain drawings are at times called what posters are
    called: the base then understands such prompts, and only the posters can teach their style."""
    if scene.style == "plain" and rng.random() < 0.45:
        scene = replace(scene, style="poster")
    return varied_caption(scene, rng)


def soften(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the batches lose sharpness or gain noise, as images from a small VAE do, so that a
    model that judges drawings does not stumble over generated ones."""
    if rng.random() < 0.5:
        return pixels
    factor = float(rng.uniform(0.35, 0.9))
    small = F.interpolate(pixels, scale_factor=factor, mode="bilinear", antialias=True)
    soft = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    noise = torch.from_numpy(rng.standard_normal(soft.shape, dtype=np.float32))
    return (soft + noise.to(soft.device) * float(rng.uniform(0, 0.08))).clamp(-1, 1)


def crop_or_pad(pixels: Tensor, rng: np.random.Generator, side: int) -> Tensor:
    """Square images as the two CLIP preprocessings give them: the centre, or the whole letterboxed
    in black. (batch, 3, 96, 64) -> (batch, 3, side, side)."""
    height, width = pixels.shape[-2:]
    if rng.random() < 0.5:
        top = (height - width) // 2
        square = pixels[:, :, top : top + width]
    else:
        border = (height - width) // 2
        square = F.pad(pixels, (border, border, 0, 0), value=-1.0)
    if square.shape[-1] == side:
        return square
    return F.interpolate(square, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def forget_origin(folder: Path) -> None:
    """Removes the path a part was loaded from, which diffusers writes into its config."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_half(model: nn.Module, folder: Path) -> None:
    """fp16 safetensors: half the size, and more than precise enough for what is stored."""
    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]


class VaeStage(Stage):
    """Images to latents and back: squared error, which is what PSNR measures.

    Two terms make the latents easy for the U-Net rather than merely exact: KL, and in half of the
    steps scale equivariance (EQ-VAE, Kouzelis et al. 2025): latents averaged to a smaller grid must
    decode to the smaller image, so that neighbours that look alike lie close together.
    """

    name = "vae"
    minutes = 30
    peak_lr = 1e-3
    muon_lr = 2.5e-3
    seed = 101
    batch = 8
    kl_weight = 1.5e-3
    hue_weight = 0.5
    equivariant_share = 0.5
    shares: ClassVar[dict[str, float]] = {"plain": 0.2, "busy": 0.35, "poster": 0.45}

    def build(self, device: torch.device) -> None:
        torch.manual_seed(self.seed)
        self.device = device
        self.vae = architectures.build_vae().to(device, memory_format=torch.channels_last)
        self.modules = {"vae": self.vae}

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        rng = self.rng(step)
        scenes = draw_scenes(rng, self.batch, self.shares)
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        whole = bool(rng.random() >= self.equivariant_share)
        with self.autocast():
            posterior = self.vae.encode(pixels).latent_dist
            latents = posterior.sample(generator)
            if not whole:
                scale = (0.5, 0.75)[int(rng.integers(2))]
                latents = F.interpolate(
                    latents, scale_factor=scale, mode="bilinear", antialias=True
                )
                pixels = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
            decoded = self.vae.decode(latents).sample
        difference = decoded.float() - pixels
        error = difference.pow(2).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        loss = error + self.hue_weight * hue_error(difference) + self.kl_weight * kl
        shown = {"mse": error, "psnr": 10 * torch.log10(4 / error.detach())}
        return {"loss": loss, "kl": kl, **(shown if whole else {"mse_smaller": error})}

    def export(self) -> None:
        vae = copy.deepcopy(self.vae)
        standardize(vae, self._latents(2048))
        # Diffusion wants unit variance; the config carries the factor, as Stable Diffusion's does.
        vae.register_to_config(scaling_factor=1.0)
        save_half(vae, self.out / "base" / "vae")
        forget_origin(self.out / "base" / "vae")

    @torch.no_grad()
    def _latents(self, count: int) -> Tensor:
        scenes = draw_scenes(self.rng(10**9), count, self.shares)
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT)
        return encode(self.vae, pixels, self.device)


class DecoderStage(VaeStage):
    """The VAE's decoder alone, while what its encoder says stays as the U-Net learnt it: sharper
    images from the same latents, as Stability did with its fine-tuned VAE decoders."""

    name = "decoder"
    minutes = 15
    peak_lr = 1e-3
    seed = 606

    def build(self, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        self.device = device
        self.vae = AutoencoderKL.from_pretrained(self.out / "base" / "vae", dtype=torch.float32).to(
            device
        )
        self.vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self.vae.post_quant_conv.requires_grad_(True)
        self.modules = {"decoder": self.vae.decoder, "post": self.vae.post_quant_conv}

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        scenes = draw_scenes(self.rng(step), self.batch, self.shares)
        pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT).to(self.device)
        latents = encode(self.vae, pixels, self.device).to(self.device)
        # A little noise, so that the decoder also forgives the U-Net's small errors.
        noise = torch.from_numpy(self.rng(step).standard_normal(latents.shape, dtype=np.float32))
        latents = latents + 0.05 * noise.to(self.device) / self.vae.config.scaling_factor
        with self.autocast():
            decoded = self.vae.decode(latents).sample
        difference = decoded.float() - pixels
        error = difference.pow(2).mean()
        loss = error + self.hue_weight * hue_error(difference)
        return {"loss": loss, "mse": error, "psnr": 10 * torch.log10(4 / error.detach())}

    def export(self) -> None:
        save_half(self.vae, self.out / "base" / "vae")
        forget_origin(self.out / "base" / "vae")


@torch.no_grad()
def standardize(vae: Any, latents: Tensor) -> None:
    """Gives each latent channel mean 0 and variance 1, without changing what is decoded.

    The 1x1 convolutions around the latents take the change up. Unequal channels would teach the
    U-Net the loud ones and drown the faint ones in noise. `latents`: (count, channels, ...).
    """
    axes = (0, 2, 3)
    mean, std = latents.mean(axes), latents.std(axes)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the second half is the logarithm of the variance
    post.bias += post.weight.flatten(1) @ mean
    post.weight *= std[None, :, None, None]


def hue_error(difference: Tensor) -> Tensor:
    """Squared error after averaging over blocks of 2, 4 and 8 pixels: edges cancel out, wrong
    hues remain, which plain squared error corrects last."""
    return torch.stack([F.avg_pool2d(difference, side).pow(2).mean() for side in (2, 4, 8)]).sum()


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor, device: torch.device, batch: int = 64) -> Tensor:
    """Means of the latents, unscaled, float32 (count, 12, 12, 8) on the CPU."""
    parts = []
    for start in range(0, len(pixels), batch):
        with autocast(device):
            mean = vae.encode(pixels[start : start + batch].to(device)).latent_dist.mean  # type: ignore[operator]
        parts.append(mean.float().cpu())
    return torch.cat(parts)


class ReaderStage(Stage):
    """A model that reads texts and sees squares. What it is made of, and how it learns, the
    subclasses say."""

    module: str
    """The model's name among what is saved and resumed."""
    processor: str
    """The class of transformers that prepares its images."""
    tokenizer: Any
    model: Any

    @abstractmethod
    def make(self) -> tuple[Any, nn.Module]:
        """Its tokenizer, and the model, untrained."""

    def build(self, device: torch.device) -> None:
        torch.manual_seed(self.seed)
        self.device = device
        self.tokenizer, model = self.make()
        self.model = model.to(device)
        self.modules = {self.module: self.model}

    def export(self) -> None:
        folder = self.out / self.name
        save_half(self.model, folder)
        tokenizers.save(self.tokenizer, folder)
        tokenizers.image_processor(self.processor, architectures.VISION_PIXELS).save_pretrained(
            folder
        )


class ScorerStage(ReaderStage):
    """CLIP: images and captions of the same scene meet, all others part (Radford et al. 2021)."""

    name, module, processor = "scorer", "clip", "CLIPImageProcessorPil"
    minutes = 14
    peak_lr = 1e-3
    weight_decay = 0.05
    seed = 202
    batch = 96
    shares: ClassVar[dict[str, float]] = {"plain": 0.2, "busy": 0.35, "poster": 0.45}

    def make(self) -> tuple[Any, nn.Module]:
        tokenizer = tokenizers.clip_tokenizer()
        return tokenizer, architectures.build_scorer(
            len(tokenizer), **tokenizers.clip_ids(tokenizer)
        )

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        rng = self.rng(step)
        scenes = draw_scenes(rng, self.batch, self.shares)
        pixels = soften(to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT), rng)
        pixels = crop_or_pad(pixels, rng, architectures.VISION_PIXELS).to(self.device)
        tokens = self.tokenizer(
            [varied_caption(scene, rng) for scene in scenes], padding=True, return_tensors="pt"
        ).to(self.device)
        with self.autocast():
            output = self.model(pixel_values=pixels, **tokens)
        logits = output.logits_per_image.float()
        target = torch.arange(len(scenes), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        top1 = (logits.argmax(1) == target).float().mean()
        return {"loss": loss, "top1": top1}

    def after_step(self, step: int) -> None:
        # CLIP's own bound: without it the temperature runs away and training with it.
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)


class CaptionerStage(ReaderStage):
    """BLIP: the canonical caption of an image, token by token (Li et al. 2022)."""

    name, module, processor = "captioner", "blip", "BlipImageProcessorPil"
    minutes = 12
    peak_lr = 1e-3
    seed = 303
    batch = 48
    shares: ClassVar[dict[str, float]] = {"plain": 0.2, "busy": 0.25, "poster": 0.55}

    def make(self) -> tuple[Any, nn.Module]:
        tokenizer = tokenizers.blip_tokenizer()
        return tokenizer, architectures.build_captioner(
            len(tokenizer), **tokenizers.blip_ids(tokenizer)
        )

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        rng = self.rng(step)
        scenes = draw_scenes(rng, self.batch, self.shares)
        pixels = soften(to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT), rng)
        # BLIP's processor squashes to a square, whatever the aspect ratio.
        side = architectures.VISION_PIXELS
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
        tokens = self.tokenizer(
            [visible_caption(scene) for scene in scenes], padding=True, return_tensors="pt"
        ).to(self.device)
        ids = tokens.input_ids
        ids[:, 0] = self.model.config.text_config.bos_token_id
        labels = ids.masked_fill(tokens.attention_mask == 0, -100)
        with self.autocast():
            loss = self.model(
                pixel_values=pixels.clamp(-1, 1).to(self.device),
                input_ids=ids,
                attention_mask=tokens.attention_mask,
                labels=labels,
            ).loss
        return {"loss": loss.float()}


class ClassifierStage(Stage):
    """A small convolutional network that names the kind of object: the judge of the base model,
    which shares nothing with the scorer."""

    name = "classifier"
    minutes = 4
    peak_lr = 2e-3
    seed = 404
    batch = 64
    shares: ClassVar[dict[str, float]] = {"plain": 0.3, "busy": 0.4, "poster": 0.3}

    def build(self, device: torch.device) -> None:
        torch.manual_seed(self.seed)
        self.device = device
        self.classifier = KindClassifier(tuple(KINDS)).to(device)
        self.modules = {"classifier": self.classifier}

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        rng = self.rng(step)
        scenes = draw_scenes(rng, self.batch, self.shares)
        pixels = soften(to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT), rng)
        kinds = list(KINDS)
        target = torch.tensor([kinds.index(s.kind) for s in scenes], device=self.device)
        with self.autocast():
            logits = self.classifier(pixels.to(self.device)).float()
        accuracy = (logits.argmax(1) == target).float().mean()
        return {"loss": F.cross_entropy(logits, target), "accuracy": accuracy}

    def export(self) -> None:
        self.classifier.save(self.out / "classifier")


class BaseStage(Stage):
    """Stable Diffusion's U-Net on plain and busy scenes: posters it never sees.

    v-prediction, nearly clean steps weighted down (after min-SNR, Hang et al. 2023, gamma 5),
    captions dropped in one of ten for classifier-free guidance (Ho & Salimans 2022), weights
    averaged (EMA). The text encoder is the scorer's text tower and stays as it is, as Stable
    Diffusion's is CLIP's: what it says of each caption is computed once.
    """

    name = "base"
    minutes = 60
    peak_lr = 1e-3
    muon_lr = 2.5e-3
    seed = 505
    batch = 48
    pool = 32_000
    wordings = 3
    """Captions of each scene, drawn once."""
    drop_caption = 0.1
    plain_share = 0.6
    """Share of plain drawings in a batch: they teach what an object's word means."""
    ema_decay = 0.999
    shares: ClassVar[dict[str, float]] = {"plain": 0.45, "busy": 0.55}

    def build(self, device: torch.device) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPModel, CLIPTokenizer

        torch.manual_seed(self.seed)
        self.device = device
        self.tokenizer = CLIPTokenizer.from_pretrained(self.out / "scorer")
        self.vae = AutoencoderKL.from_pretrained(self.out / "base" / "vae", dtype=torch.float32).to(
            device
        )
        self.scheduler = architectures.build_noise_scheduler()
        self.unet = architectures.build_unet().to(device, memory_format=torch.channels_last)
        self.text_encoder = architectures.build_text_encoder(
            len(self.tokenizer), **tokenizers.clip_ids(self.tokenizer)
        )
        scorer = CLIPModel.from_pretrained(self.out / "scorer", dtype=torch.float32)
        self.text_encoder.load_state_dict(_text_tower(scorer, self.text_encoder))
        self.text_encoder.to(device).eval()
        self.ema_unet = copy.deepcopy(self.unet).requires_grad_(False)
        self.modules = {"unet": self.unet, "ema_unet": self.ema_unet}
        self.scenes = draw_scenes(self.rng(10**9), self.pool, self.shares)
        self.latents, self.hidden = self._pool()
        self.nothing = self._embed([""])
        signal = self.scheduler.alphas_cumprod
        snr = (signal / (1 - signal)).float()
        # Hang et al. weigh the noisiest steps down as well; in latents of 8x12 those decide what
        # the object is, so only the nearly clean steps count less here.
        self.weights = (5 / snr).clamp(max=1).to(device)
        plain = np.array([scene.style == "plain" for scene in self.scenes])
        share = np.where(
            plain, self.plain_share / plain.sum(), (1 - self.plain_share) / (~plain).sum()
        )
        self.cumulative = np.cumsum(share)

    def _pool(self) -> tuple[Tensor, Tensor]:
        """What the steps draw from, computed once: latents of the pool's scenes, scaled, fp16
        (pool, 12, 12, 8), and the text encoder's hidden states, fp16 (pool, wordings, 48, 128)."""
        from posterpipe.starter.files import folder_digest

        digest = folder_digest(self.out / "base" / "vae")[:12]
        path = self.work / f"pool-{digest}-{self.pool}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        rng = self.rng(10**9 + 1)
        latents, hidden = [], []
        for start in range(0, self.pool, 1000):
            scenes = self.scenes[start : start + 1000]
            pixels = to_pixels(scenes, architectures.WIDTH, architectures.HEIGHT)
            latents.append(encode(self.vae, pixels, self.device).half())
            texts = [base_caption(scene, rng) for scene in scenes for _ in range(self.wordings)]
            hidden.append(self._embed(texts).half().unflatten(0, (len(scenes), self.wordings)))
            print(f"base: encoded {start + len(scenes)} of {self.pool}", flush=True)
        pool = torch.cat(latents) * self.vae.config.scaling_factor, torch.cat(hidden)
        torch.save(pool, path)
        return pool

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        """Hidden states of captions, float32 (count, 48, 128) on the CPU."""
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        parts = []
        for part in ids.split(100):
            with self.autocast():
                parts.append(self.text_encoder(part.to(self.device)).last_hidden_state)
        return torch.cat(parts).float().cpu()

    def losses(self, step: int, progress: float) -> dict[str, Tensor]:
        rng = self.rng(step)
        chosen = np.searchsorted(self.cumulative, rng.random(self.batch)).clip(max=self.pool - 1)
        wording = rng.integers(self.wordings, size=self.batch)
        latents = self.latents[torch.from_numpy(chosen)].float().to(self.device)
        hidden = self.hidden[torch.from_numpy(chosen), torch.from_numpy(wording)].float()
        dropped = torch.from_numpy(rng.random(self.batch) < self.drop_caption)
        hidden = torch.where(dropped[:, None, None], self.nothing, hidden).to(self.device)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        noise = noise.to(self.device)
        # Stratified timesteps: every batch covers the whole range, which steadies the loss.
        spread = (np.arange(self.batch) + rng.random(self.batch)) / self.batch
        timesteps = torch.from_numpy((spread * 1000).astype(np.int64)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        with self.autocast():
            predicted = self.unet(noisy, timesteps, hidden).sample
        error = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
        return {"loss": (error * self.weights[timesteps]).mean(), "mse": error.mean()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        averages, weights = list(self.ema_unet.parameters()), list(self.unet.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def export(self) -> None:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(self.vae).half(),
            text_encoder=copy.deepcopy(self.text_encoder).half(),
            tokenizer=self.tokenizer,
            unet=copy.deepcopy(self.ema_unet).half(),
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(self.out / "base", safe_serialization=True)
        tokenizers.save(self.tokenizer, self.out / "base" / "tokenizer")
        forget_origin(self.out / "base")


def _text_tower(scorer: Any, text_encoder: nn.Module) -> dict[str, Tensor]:
    """The scorer's text weights under the names of `text_encoder`."""
    tower = scorer.text_model.state_dict()
    names = text_encoder.state_dict().keys()
    return {name: tower[name.removeprefix("text_model.")] for name in names}


STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        VaeStage,
        ScorerStage,
        BaseStage,
        DecoderStage,
        CaptionerStage,
        ClassifierStage,
    )
}
