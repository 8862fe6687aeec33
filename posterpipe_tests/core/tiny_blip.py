"""A tiny random BLIP in a folder, of the layout that `from_pretrained` reads.

What belongs here: a captioner for tests that need a model and not what it knows. What does not:
Stable Diffusion and CLIP.
"""

from __future__ import annotations

from pathlib import Path

WORDS = ("a", "red", "blue", "rocket", "castle", "poster", "of", "in", "the", "centre", "one")


def build_tiny_blip(folder: Path, *, seed: int = 0) -> Path:
    """Writes a `BlipForConditionalGeneration` of about 50,000 random weights in fp16, a WordPiece
    tokenizer and a PIL image processor for 32x32 pixels. Returns `folder`."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate((*specials, *WORDS))})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    config = BlipConfig(
        text_config={
            **size,
            # So large that different images get different words.
            "initializer_range": 0.6,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 32,
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        # BLIP's own default of 1e-10 is nothing at all in fp16.
        vision_config={**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.3},
        projection_dim=32,
        image_text_hidden_size=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    ).save_pretrained(folder)
    return folder
