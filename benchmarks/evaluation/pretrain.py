"""Pre-trains the small models of the study, on the CPU in minutes, into ``models/`` (which git ignores).

    python benchmarks/evaluation/pretrain.py            # all three
    python benchmarks/evaluation/pretrain.py vit

- ``vit``: a ViT (0.2 M) on ``load_digits``, digits 0 to 4, with shifted copies.
- ``clm``: a Llama (1.0 M) on next tokens of the standard library's sources.
- ``mlm``: a ModernBERT (1.07 M) on masked tokens of the same.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import corpora
import torch
import transformers

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()  # before transformers looks for image processors
MODELS = Path(__file__).parent / "models"
VOCABULARY = 2048
LENGTH = 64
MASK_ID = 3
"""Of <mask>, the fourth special token."""
MASKED = 0.15
"""Share of the tokens that are hidden (Devlin et al. 2019, arXiv:1810.04805), each by <mask>."""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the standard library's sources; kept in ``models/tokenizer``."""
    folder = MODELS / "tokenizer"
    if not folder.is_dir():
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        special = ["<pad>", "<s>", "</s>", "<mask>"]
        bpe.train_from_iterator(corpora.python_sources()[::3], vocab_size=VOCABULARY, special_tokens=special,
                                show_progress=False)  # fmt: skip
        names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), special, strict=True))
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names).save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def windows(texts: list[str], length: int) -> torch.Tensor:
    """int64 [n, length], the texts' tokens cut into windows; the rest of each text is left out."""
    tokenize = tokenizer()
    rows = []
    for text in texts:
        ids = tokenize(text)["input_ids"]
        rows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return torch.tensor(rows)


def clm() -> None:
    """The causal language model."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    _pretrain_text(transformers.LlamaForCausalLM(config), "clm", steps=1500)


def mlm() -> None:
    """The masked language model, with norms before its layers: a BERT of this size was still at the frequencies of the
    tokens after 1,250 steps (loss 6.2)."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    _pretrain_text(transformers.ModernBertForMaskedLM(config), "mlm", steps=2000)


def masked(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids with a share of ``MASKED`` of each row's tokens hidden, labels: those tokens, elsewhere -100)."""
    n_hidden = round(MASKED * ids.shape[1])
    hidden = torch.rand(ids.shape, generator=generator).argsort(dim=1) < n_hidden
    return ids.masked_fill(hidden, MASK_ID), ids.masked_fill(~hidden, -100)


def _pretrain_text(model: Any, name: str, steps: int, batch_size: int = 32) -> None:
    ids = windows(corpora.python_sources(), LENGTH)
    generator = torch.Generator().manual_seed(0)
    held_out, ids = ids[::200], ids[torch.arange(len(ids)) % 200 != 0]
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {ids.numel()} tokens", flush=True)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        hidden, labels = masked(rows, generator) if name == "mlm" else (rows, rows)
        return model(input_ids=hidden, labels=labels).loss

    def draw() -> torch.Tensor:
        return loss_of(ids[torch.randint(len(ids), (batch_size,), generator=generator)])

    _fit(model, draw, steps, lambda: float(loss_of(held_out[:256])), peak_lr=2e-3)
    model.save_pretrained(MODELS / name)
    tokenizer().save_pretrained(MODELS / name)


def vit() -> None:
    """The digit classifier."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(digits.target)
    images, labels = images[labels < 5], labels[labels < 5]
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    held_out = torch.arange(len(images)) % 10 == 0
    train_images, train_labels = images[~held_out], labels[~held_out]

    def draw() -> torch.Tensor:
        rows = torch.randint(len(train_images), (64,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        shifted = torch.roll(train_images[rows], shift, dims=(2, 3))
        noisy = shifted + 0.1 * torch.randn(shifted.shape, generator=generator)
        return model(pixel_values=noisy, labels=train_labels[rows]).loss

    _fit(model, draw, 1500, lambda: float(model(pixel_values=images[held_out], labels=labels[held_out]).loss), 1e-3)
    model.save_pretrained(MODELS / "vit")


def _fit(model: Any, draw: Any, steps: int, held_out_loss: Any, peak_lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = draw()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                print(f"step {step} loss {loss.item():.3f} held out {held_out_loss():.3f} "
                      f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or ("vit", "clm", "mlm"):
        {"vit": vit, "clm": clm, "mlm": mlm}[chosen]()
