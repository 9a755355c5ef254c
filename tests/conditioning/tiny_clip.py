"""A CLIP that is small enough for tests."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


def tiny_clip(folder: Path) -> Path:
    """Write a tiny CLIP, text and images, in the layout of the published one."""
    letters = [*"abdeorp", *(f"{letter}</w>" for letter in "abdegorp")]
    vocabulary = [*letters, "re", "red</w>", "do", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nd o\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    text = shape | {"vocab_size": len(vocabulary), "max_position_embeddings": 10}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    images = shape | {"image_size": 8, "patch_size": 4}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=images, projection_dim=8))
    model.save_pretrained(folder)
    return folder
