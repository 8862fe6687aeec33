"""The settings of the fine-tuning.

What belongs here: each with its meaning, unit, default, bounds, and where the default comes from.
What does not: all others, and how they are read (`settings`), these in words (`setting_words`),
and what they do (`core.dreambooth`).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from posterpipe.setting_types import Group, Positive, Precision

# Where the defaults come from.
_THESIS = "the thesis"
_NOT_IN_THESIS = "off, as in the thesis"
_OWN = "our choice"


def knob(default: Any, description: str, *, unit: str, source: str, **bounds: Any) -> Any:
    """A field that also tells its unit ("" for none) and where its default comes from."""
    return Field(
        default,
        description=description,
        json_schema_extra={"unit": unit, "source": source},
        **bounds,
    )


class TrainingSettings(Group):
    """DreamBooth fine-tuning. The defaults are the thesis's table but for the precision, and what
    goes beyond it is off.

    Each setting tells its meaning, its unit, and where its default comes from; the launchpad and
    docs/training.md show all of it (`setting_words`). A number is finite unless its setting allows
    another one: most would train nothing but NaN.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    seed: int = knob(
        777, "of the order of samples, their noise and their timesteps", unit="", source=_THESIS
    )

    # ---- how long, how fast
    train_batch_size: Positive = knob(
        1, "images that go through the models at once", unit="images a process", source=_THESIS
    )
    gradient_accumulation_steps: Positive = knob(
        1,
        "batches whose gradients are added up for one optimizer step",
        unit="batches",
        source=_THESIS,
    )
    max_train_steps: Positive = knob(
        1000, "how long to train", unit="optimizer steps", source=_THESIS
    )
    learning_rate: float = knob(
        1e-6,
        "peak rate of the U-Net; LoRA wants about 1e-4",
        unit="weight change a step",
        source=_THESIS,
        gt=0,
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = knob(
        "constant_with_warmup",
        "the rate over the steps; linear and cosine fall to 0 at max_train_steps",
        unit="",
        source="the thesis; it writes `constant`, which ignores its own 80 warmup steps",
    )
    lr_warmup_steps: int = knob(
        80,
        "the rate rises from 0 to its peak over so many; not with `constant`",
        unit="optimizer steps",
        source=_THESIS,
        ge=0,
    )
    time_limit_minutes: float | None = knob(
        None,
        "minutes of training, over all its processes, after which the run ends as if these were "
        "all its steps; none: no limit. To pause a run and go on later, send it SIGTERM",
        unit="minutes",
        source=_NOT_IN_THESIS,
        gt=0,
        allow_inf_nan=True,
    )

    # ---- what is trained
    method: Literal["full", "lora"] = knob(
        "full",
        "full trains every weight; lora (arXiv:2106.09685) trains small matrices beside them and "
        "leaves pytorch_lora_weights.safetensors and kohya_lora.safetensors as well",
        unit="",
        source=_THESIS,
    )
    lora_rank: Positive = knob(
        16,
        "rows of the small matrices; diffusers' script has 4",
        unit="rows",
        source="the middle of what kohya's guides use, 8 to 64",
    )
    lora_alpha: float | None = knob(
        None,
        "the matrices count alpha / rank; none: alpha is the rank, so they count 1",
        unit="",
        source="diffusers' train_dreambooth_lora.py",
        gt=0,
    )
    lora_targets: tuple[str, ...] = knob(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "ends of names of the U-Net's linear and convolution layers that get LoRA; the attention's",
        unit="names",
        source="diffusers' train_dreambooth_lora.py",
        min_length=1,
    )
    lora_text_encoder_targets: tuple[str, ...] = knob(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        "the same for the text encoder, used with train_text_encoder",
        unit="names",
        source="diffusers' train_dreambooth_lora.py",
        min_length=1,
    )
    train_text_encoder: bool = knob(
        True, "trains the text encoder beside the U-Net", unit="", source=_THESIS
    )
    text_encoder_learning_rate: float | None = knob(
        None,
        "peak rate of the text encoder; none: the U-Net's. A lower one keeps what it knows",
        unit="weight change a step",
        source="the thesis has one rate",
        gt=0,
    )
    text_encoder_stop_step: int | None = knob(
        None,
        "step from which the text encoder stays as it is; none: never. At full rate it can ruin a "
        "model within 1,000 steps (diffusers issue 3475)",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
        ge=0,
    )
    ema_decay: float | None = knob(
        None,
        "the finished model is a moving average of the weights, which keeps this share of itself "
        "each step (less in the first ones); 0.9999 in diffusers' scripts; none: no average",
        unit="share a step",
        source=_NOT_IN_THESIS,
        gt=0,
        lt=1,
    )

    # ---- on what
    prior_preservation: bool = knob(
        False,
        "trains on class_images drawn by the base model as well, so that it keeps what it knows of "
        "class_prompt (arXiv:2208.12242, section 3.2); matters for faces and objects, less for a "
        "style",
        unit="",
        source=_NOT_IN_THESIS,
    )
    prior_loss_weight: float = knob(
        1.0, "weight of the class images' loss", unit="", source="arXiv:2208.12242", ge=0
    )
    class_prompt: str = knob(
        "a movie poster",
        "what the class images are drawn from",
        unit="",
        source=_OWN,
        min_length=1,
    )
    class_image_count: Positive = knob(
        100, "how many class images", unit="images", source="diffusers' train_dreambooth.py"
    )
    caption_dropout: float = knob(
        0.0,
        "how many samples are trained without their caption, which keeps classifier-free guidance "
        "working; 0.1 in Stable Diffusion's own training",
        unit="share of samples",
        source=_NOT_IN_THESIS,
        ge=0,
        le=1,
    )
    caption_shuffling: bool = knob(
        False,
        "the parts of a caption between separators come in another order each time, as kohya's "
        "shuffle_caption does; for captions that are lists of tags",
        unit="",
        source=_NOT_IN_THESIS,
    )
    caption_separator: str = knob(
        ",", "stands between the parts of a caption", unit="", source="kohya's", min_length=1
    )
    caption_kept_parts: int = knob(
        1,
        "parts that stay in front when the others are shuffled, such as the trigger phrase",
        unit="parts",
        source=_OWN,
        ge=0,
    )

    # ---- the loss
    snr_gamma: float | None = knob(
        None,
        "min-SNR-gamma weights of the loss, arXiv:2303.09556, whose authors use 5; none: all "
        "timesteps weigh the same",
        unit="signal-to-noise ratio",
        source=_NOT_IN_THESIS,
        gt=0,
        allow_inf_nan=True,
    )
    offset_noise: float = knob(
        0.0,
        "standard deviation of a noise that is one number a channel, added to the noise, so that "
        "very dark and very bright images can be learnt; 0.1 in its author's post (N. Guttenberg "
        "2023, Diffusion with Offset Noise)",
        unit="of the noise's",
        source=_NOT_IN_THESIS,
        ge=0,
    )
    zero_terminal_snr: bool = knob(
        False,
        "rescales the noise schedule so that its last step is pure noise (arXiv:2305.08891, "
        "algorithm 1); needs a base model with v_prediction",
        unit="",
        source=_NOT_IN_THESIS,
    )

    # ---- optimizer and precision
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = knob(
        "adamw_8bit",
        "adamw is torch's, adamw_fused the same in one kernel, adamw_8bit bitsandbytes' AdamW8bit "
        "with a quarter of the memory",
        unit="",
        source=_THESIS,
    )
    adam_beta1: float = knob(
        0.9, "how much of the gradients' mean is kept", unit="share a step", source="torch", ge=0,
        lt=1,
    )  # fmt: skip
    adam_beta2: float = knob(
        0.999, "the same for their squares", unit="share a step", source="torch", ge=0, lt=1
    )
    adam_weight_decay: float = knob(
        1e-2,
        "how much weights shrink, times the learning rate",
        unit="share a step",
        source="torch",
        ge=0,
    )
    adam_epsilon: float = knob(
        1e-8, "keeps Adam's division finite", unit="of a gradient", source="torch", gt=0
    )
    max_grad_norm: float = knob(
        1.0,
        "longer gradients are scaled down to this norm",
        unit="norm of all gradients",
        source="diffusers' train_dreambooth.py",
        gt=0,
        allow_inf_nan=True,
    )
    mixed_precision: Precision = knob(
        "bf16",
        "of the computation; trained weights stay fp32. bf16 needs an Ampere GPU or newer; fp16 "
        "runs on older ones, and Stable Diffusion 2.1 can overflow with it",
        unit="",
        source="our choice; the thesis and the profile sd21 have fp16",
    )
    tf32: bool = knob(
        False,
        "fp32 of linear layers and attention as TF32, which convolutions are anyway: GPUs from "
        "Ampere on multiply its ten bits several times as fast",
        unit="",
        source="diffusers' train_dreambooth.py, where it is allow_tf32",
    )
    gradient_checkpointing: bool = knob(
        False,
        "computes activations twice instead of keeping them: less memory, slower",
        unit="",
        source=_NOT_IN_THESIS,
    )
    channels_last: bool | None = knob(
        None,
        "memory layout of the U-Net's images in which convolutions are quicker; none: where the "
        "rest is not slower for it, which is on CPUs, and on GPUs if the whole U-Net is compiled",
        unit="",
        source="PyTorch's tuning guide; [measured](benchmarks.md) on a GPU",
    )
    compile: bool = knob(
        False,
        "torch.compile of the U-Net: minutes at the start, quicker steps after",
        unit="",
        source=_NOT_IN_THESIS,
    )
    compile_blocks: bool = knob(
        False,
        "compiles the U-Net's transformer blocks alone, those of one width once: less time at the "
        "start, and less gained at each step",
        unit="",
        source=_NOT_IN_THESIS,
    )
    cuda_graphs: bool | None = knob(
        None,
        "records on a GPU what a step starts there, and replays it: quicker wherever the processor "
        "is slower than the GPU, with the same numbers; none: without compile, where memory is "
        "ample. Not with buckets, gradient_checkpointing or several processes",
        unit="",
        source="PyTorch's notes on CUDA; [measured](benchmarks.md) on a GPU",
    )
    halve_batch_on_out_of_memory: bool = knob(
        False,
        "halves the batch and doubles the accumulation where memory runs out, instead of ending "
        "the run; with one process only",
        unit="",
        source=_OWN,
    )

    # ---- watching
    holdout_every_steps: Positive | None = knob(
        100,
        "between two measurements of the loss on the held-out posters; none: never",
        unit="optimizer steps",
        source=_OWN,
    )
    holdout_timesteps: Positive = knob(
        4,
        "noise levels at which each held-out poster is measured, evenly spread, always the same",
        unit="timesteps a poster",
        source=_OWN,
    )
    early_stop_patience: Positive | None = knob(
        None,
        "measurements of the held-out loss without a new lowest one after which the run ends, with "
        "the weights of the lowest; none: never",
        unit="measurements",
        source=_NOT_IN_THESIS,
    )
    early_stop_min_gain: float = knob(
        0.0,
        "how much lower a held-out loss must be to put the stop off; the lowest is kept anyway",
        unit="share of the loss",
        source=_OWN,
        ge=0,
        lt=1,
    )
    sample_every_steps: Positive | None = knob(
        None,
        "between two sets of sample images; none: no samples",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
    )
    sample_prompts: tuple[str, ...] = knob(
        (),
        "prompts of the samples; none: the first four captions trained on",
        unit="prompts",
        source=_OWN,
    )
    sample_seed: int = knob(
        1,
        "of the first sample's noise; each next one counts one up",
        unit="",
        source=_OWN,
        ge=0,
        le=2**63 - 1,
    )
    log_every_steps: Positive = knob(
        10, "between two reports of the loss", unit="optimizer steps", source=_OWN
    )
    save_every_steps: Positive = knob(
        100,
        "between two saves to go on from; more where one takes over 2 seconds, since the next then "
        "waits for 20 times that long, so that saving takes at most 5 % of the time",
        unit="optimizer steps",
        source=_OWN,
    )
    keep_saves: Positive = knob(
        2, "how many saves of a run in progress are kept on disk", unit="saves", source=_OWN
    )
    export_every_steps: Positive | None = knob(
        None,
        "between two models from the middle of the run, which the finished checkpoint keeps in its "
        "folder `exports`: diffusers directories, with LoRA the small files; none: no such models",
        unit="optimizer steps",
        source=_NOT_IN_THESIS,
    )

    @model_validator(mode="after")
    def _stopping_needs_measuring(self) -> Self:
        if self.early_stop_patience is not None and self.holdout_every_steps is None:
            raise ValueError("early_stop_patience needs holdout_every_steps; set both or neither")
        return self
