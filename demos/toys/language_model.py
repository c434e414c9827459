"""A tiny causal language model for machines without a hub: trained here, in a minute, to word listed findings.

It has about 0.4 million parameters and has seen nothing but pairs of findings and report made by this file. It words
what is listed and can do nothing else: it is for trying out and timing the pipeline, not for reading images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.models import Detection
from layerlens.utils.atomic import staged_directory
from layerlens.utils.progress import Progress, silent
from layerlens.vision_language.prompt import Messages, build_messages, level, place
from toys.plates import CLASSES, SIZE

DESCRIPTION = "a demonstration model of 0.4 M parameters, trained by LayerLens on generated findings and reports"
"""Stands in the model's config.json; reports of the pipeline call the model so."""
VERSION = 3
"""Raised when examples, architecture or training change, so that older files in a cache are left alone."""
MOST_FINDINGS = 4
_STEPS, _BATCH, _LEARNING_RATE = 650, 16, 4e-3
_INITIAL = 0.08
"""Spread of the first weights. With the usual 0.02 this small model learns to copy from the list four times later."""
_GROWING = 150
"""Steps in which the number of findings grows: two are soon copied, and what was learnt goes for more."""
_VOCABULARY = 512
"""Enough for every word of findings and reports to be one token."""
_START, _REPORT, _END, _PAD = "<s>", "<report>", "</s>", "<pad>"
# The system message is the same everywhere and would only lengthen the prompt.
_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<report>' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<report>' }}{% endif %}"
)


def example(random: np.random.Generator, findings: int) -> tuple[Messages, str]:
    """A request as the pipeline makes it with so many findings, and the report that it should get."""
    detections = []
    for _ in range(findings):
        x, y = random.uniform(8, SIZE - 8, 2)
        half = random.uniform(4, 8)
        label = CLASSES[int(random.integers(len(CLASSES)))]
        confidence = float(random.uniform(0.25, 1.0))
        detections.append(Detection(label, confidence, (x - half, y - half, x + half, y + half)))
    detections.sort(key=lambda detection: -detection.confidence)
    messages = build_messages(detections, image="plate.png", size=(SIZE, SIZE))
    return messages, reference_report(detections, (SIZE, SIZE))


def reference_report(detections: list[Detection], size: tuple[int, int]) -> str:
    """The report that the model is trained to write, a line for each finding and one for their number:
    ``1. Nodule in the upper left (high confidence).``, ``In all 1 finding.``
    """
    lines = []
    for number, detection in enumerate(detections, 1):
        sure = f"({level(detection.confidence)} confidence)"
        lines.append(f"{number}. {detection.label.capitalize()} in the {place(detection.box, size)} {sure}.")
    return "\n".join([*lines, f"In all {len(detections)} finding{'s' if len(detections) > 1 else ''}."])


def cached_language_model(cache_dir: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Directory of the model in ``cache_dir``, trained the first time: about a minute on an idle core.

    Raises:
        OutputError: the cache cannot be written.
    """
    path = language_model_place(cache_dir, seed)
    return path if path.is_dir() else train_language_model(path, seed=seed, progress=progress)


def language_model_place(cache_dir: Path, seed: int = 0) -> Path:
    """Where the directory of a seed is kept."""
    return cache_dir / "models" / f"plates-language-model-v{VERSION}-seed{seed}"


def train_language_model(directory: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Train the model and write it as ``save_pretrained`` does, with tokenizer and chat template, atomically."""
    import torch

    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(np.random.default_rng((seed, 1)))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, initializer_range=_INITIAL,
        num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        description=DESCRIPTION,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.1)
    batches = _batches(tokenizer, np.random.default_rng((seed, 2)))
    model.train()
    with progress.stage("Training the language model", total=_STEPS) as advance:
        for _ in range(_STEPS):
            loss = model(**next(batches)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    model.eval()
    model.generation_config.update(max_length=None, do_sample=False)
    with staged_directory(directory) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return directory


def share_of_right_findings(model: Any, *, count: int = 20, seed: int = 12345) -> float:
    """Share of the findings in new examples that ``model`` (a ``LocalModel``) words to the letter and in their place.

    A guess of kind, place and level is right once in 81.
    """
    random, right, wanted = np.random.default_rng(seed), 0, 0
    for messages, report in (example(random, 1 + number % MOST_FINDINGS) for number in range(count)):
        lines = report.splitlines()[:-1]
        written = model.generate(messages, 160).text.splitlines()
        right += sum(one == other for one, other in zip(lines, written, strict=False))
        wanted += len(lines)
    return right / wanted


def _tokenizer(random: np.random.Generator) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = (
        messages[1]["content"] + report for messages, report in (example(random, MOST_FINDINGS) for _ in range(300))
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [_PAD, _START, _END, _REPORT]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=_START, eos_token=_END, pad_token=_PAD,
        additional_special_tokens=[_REPORT], chat_template=_TEMPLATE, model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _batches(tokenizer: Any, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Endless batches, of few findings at first; the loss is on the report alone."""
    import torch

    for step in itertools.count():
        rows = []
        most = min(MOST_FINDINGS, 2 + step * (MOST_FINDINGS - 1) // _GROWING)
        findings = int(random.integers(1, most + 1))  # the same for the batch: little is padded
        for messages, report in (example(random, findings) for _ in range(_BATCH)):
            asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            rows.append((prompt, tokenizer(report + _END, add_special_tokens=False)["input_ids"]))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        pads = [longest - len(prompt) - len(answer) for prompt, answer in rows]
        pad = tokenizer.pad_token_id
        yield {
            "input_ids": torch.tensor([p + a + [pad] * n for (p, a), n in zip(rows, pads, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in pads]),
            "labels": torch.tensor([[-100] * len(p) + a + [-100] * n for (p, a), n in zip(rows, pads, strict=True)]),
        }
