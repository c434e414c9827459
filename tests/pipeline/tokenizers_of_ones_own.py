"""Small tokenizers of the kinds that the listed architectures have, trained here on a few words.

What differs between them is what a run must get right: ids of padding, no padding token at all, a space before words,
tokens that every text begins or ends with.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ADJECTIVES = ("great", "lovely", "fine", "bright", "awful", "dull", "broken", "grim")
WORDS = [f"{word} thing {n}" for n, word in enumerate(ADJECTIVES)] * 3


def _trained(tokenizer: Tokenizer, trainer: Any) -> Any:
    """What training made of the model: vocabulary, and merges where there are some."""
    import json

    tokenizer.train_from_iterator(WORDS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _byte_level(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made = _trained(tokenizer, trainer)
    return made["vocab"], [tuple(pair) for pair in made["merges"]]


def roberta() -> Any:
    """Byte-level; padding is token 1, and positions count from it."""
    vocabulary, merges = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return hf.RobertaTokenizer(vocab=vocabulary, merges=merges)


def gpt2() -> Any:
    """Byte-level; no padding token, and none at the ends of a text."""
    vocabulary, merges = _byte_level(["<|endoftext|>"])
    return hf.GPT2Tokenizer(vocab=vocabulary, merges=merges)


def qwen() -> Any:
    """Byte-level; its end-of-text token pads."""
    vocabulary, merges = _byte_level(["<|endoftext|>"])
    return hf.Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def llama() -> Any:
    """Pieces with ▁ for spaces, unknown characters as bytes; no padding token, and ``<s>`` before every text."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.ByteFallback()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    made = _trained(tokenizer, trainer)
    return hf.LlamaTokenizer(vocab=made["vocab"], merges=[tuple(pair) for pair in made["merges"]])


def t5() -> Any:
    """Unigram pieces; padding is token 0, and ``</s>`` ends every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    made = _trained(tokenizer, trainer)
    return hf.T5Tokenizer(vocab=[tuple(piece) for piece in made["vocab"]], extra_ids=0)
