"""Small tokenizers and models for tests on the rows of language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.integrations.pretrained import PretrainedModel

MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer(template: str | None = None, *, eos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, merged in twos where English often has them, with a token at the beginning."""
    pairs = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t"), (":", "Ġ"), ("i", "s")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *("".join(pair) for pair in pairs)]
    words = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, pairs))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(SPECIAL)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    more = {"eos_token": "</s>"} if eos else {}
    more |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", chat_template=template, **more)


def language_model(written_by: Any) -> PretrainedModel:
    """A random Llama of two blocks with this tokenizer."""
    import torch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return PretrainedModel(model, written_by, "tiny-llama", ())


def read(folder: Path, rows: list[dict[str, Any]], task: str = "causal-lm", **options: Any) -> Dataset:
    """The rows of a file as the task reads them."""
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_dataset(DataConfig(source=str(path), **options), None, task)
