"""BLIP's forward pass without its repeated work.

What belongs here: the attentions of `transformers`' BLIP computed at once, and captions generated
with them. What does not: loading a model, settings, words (`captioner`).

As transformers 5.23 has it, each beam of a beam search holds a copy of its image's keys and values
(BLIP-base: 577 patches x 768 numbers x 12 layers x 2, 43 MB in fp32), computes them itself, and all
copies are copied again at every step, to follow the beams. But the beams of an image look at the
same image. Here its keys and values are computed once, stay where they are, and the beams are
several queries to them. The numbers are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipForConditionalGeneration


class _ImageAttention(nn.Module):
    """Self-attention of the vision tower; takes the weights of the module it replaces."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.qkv = original.qkv
        self.projection = original.projection
        self.heads = int(original.num_heads)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden_states: (images, patches, width)."""
        images, patches, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(images, patches, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        context = scaled_dot_product_attention(query, key, value)
        return self.projection(context.transpose(1, 2).reshape(images, patches, width)), None


class _CrossAttention(nn.Module):
    """Attention of the words to the image; takes the weights of the module it replaces."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.query = original.query
        self.key = original.key
        self.value = original.value
        self.heads = int(original.num_attention_heads)
        self._image: tuple[Tensor, Tensor] | None = None

    def look_at(self, image_embeds: Tensor | None) -> None:
        """Keep keys and values of (images, patches, width); None lets go of them."""
        if image_embeds is None:
            self._image = None
        else:
            # Every step reads all of it: laid out in the order of reading.
            key = self._by_head(self.key(image_embeds)).contiguous()
            value = self._by_head(self.value(image_embeds)).contiguous()
            self._image = key, value

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden_states: (images x beams, words, width), the beams of an image side by side."""
        if self._image is None:
            raise RuntimeError("no image to attend to: call generate of this module")
        key, value = self._image
        query = self.query(hidden_states)
        query = self._by_head(query.reshape(len(key), -1, query.shape[-1]))
        context = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return context.reshape(*hidden_states.shape[:-1], -1), None

    def _by_head(self, states: Tensor) -> Tensor:
        """(batch, length, width) as (batch, heads, length, width/heads)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def without_repeated_work(
    model: BlipForConditionalGeneration,
) -> BlipForConditionalGeneration:
    """The same model with its attentions replaced; captions then come from `generate` below.

    The model is changed in place; its own `generate` does not work any more.
    """
    for layer in model.vision_model.encoder.layers:
        layer.self_attn = _ImageAttention(layer.self_attn)
    for layer in model.text_decoder.bert.encoder.layer:
        layer.crossattention.self = _CrossAttention(layer.crossattention.self)
    return model


def generate(model: BlipForConditionalGeneration, pixel_values: Tensor, **decoding: Any) -> Tensor:
    """Token ids int64 (images, tokens) of a caption for each image, start token included.

    `model`: one that `without_repeated_work` gave back; not from several threads at once.
    `pixel_values`: (images, 3, height, width); `decoding`: arguments of transformers' `generate`.
    """
    # A CPU's caches hold the activations of one image (BLIP-base: 7 MB), not those of a batch; one
    # after the other is a tenth faster there.
    at_once = 1 if pixel_values.device.type == "cpu" else max(1, len(pixel_values))
    text = model.config.text_config
    attentions = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
    with torch.inference_mode():
        parts = [model.vision_model(pixel_values=part)[0] for part in pixel_values.split(at_once)]
        image_embeds = torch.cat(parts)
        # On the model's device: beam search runs where these are.
        start = torch.full((len(image_embeds), 1), text.bos_token_id, device=image_embeds.device)
        try:
            for attention in attentions:
                attention.look_at(image_embeds)
            return model.text_decoder.generate(
                input_ids=start,
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                # That an image is there has to be said; a copy for each beam is made of this.
                encoder_hidden_states=image_embeds[:, :1, :1],
                **decoding,
            )
        finally:
            for attention in attentions:
                attention.look_at(None)
