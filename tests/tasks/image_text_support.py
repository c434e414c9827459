"""A tiny LLaVA with its processor, and rows of chats about drawn images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from language_support import tokenizer
from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PATCHES = 4


def save_llava(folder: Path) -> Path:
    """A random model of two blocks in each tower, whose language model sees what the first of the other puts out."""
    import transformers as hf

    torch.manual_seed(0)
    words: Any = tokenizer(TEMPLATE)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = hf.LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    image_token = words.convert_tokens_to_ids("<image>")
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token)
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    hf.LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_rows(folder: Path, n: int = 40) -> Path:
    """Questions about the colour of an image, with their answers, as JSON lines beside the images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(n):
        name = list(COLOURS)[index % len(COLOURS)]
        Image.new("RGB", (10, 10), COLOURS[name]).save(folder / f"{index}.png")
        asked = [{"type": "image"}, {"type": "text", "text": f"{index}: which colour?"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is {name}."}]
        rows.append({"messages": turns, "images": [f"{index}.png"]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
