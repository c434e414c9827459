"""Embeddings of sentences: pairs, triplets or scored pairs, with the losses of sentence-transformers.

A sample is an anchor, what is like it, and what is not: as many rows of the model's batch, one sample after the other.
What a directory of sentence-transformers has after its transformer (pooling ...) is frozen and part of the loss: the
model is the transformer alone, as the library itself gives it to PEFT. Losses that compare an anchor with the texts of
other samples are measured batch by batch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.config import DataConfig, ModelConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.data.values import is_number
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.sentence_models import SentenceModel, loss_of, sentence_model
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.encoded import Encoded
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, as_numpy, mean_loss
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import padded_inputs

if TYPE_CHECKING:
    import torch

ANCHORS = ("anchor", "query", "question", "sentence1", "text1", "sentence_a", "text_a", "premise")
POSITIVES = (
    "positive",
    "pos",
    "document",
    "passage",
    "answer",
    "sentence2",
    "text2",
    "sentence_b",
    "text_b",
    "hypothesis",
)
NEGATIVES = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?")
SCORES = ("score", "similarity_score", "similarity", "label")
"""Where anchors, what is like them, what is not, and how alike two texts are usually stand."""
MULTIPLE_NEGATIVES, COSENT, TRIPLET = "multiple-negatives", "cosent", "triplet"
TRIPLET_COLUMNS = 3
CUTOFF = 10
"""Places of a ranking that are judged: nDCG@10, as retrieval benchmarks have it."""
RANKED_AT_ONCE = 256


def read(table: Table, config: DataConfig) -> Dataset:
    """Anchors, positives, negatives where there are some, and scores of pairs where there are some."""
    anchor = table.find(config.text_column, "text_column", ANCHORS)
    positive = table.find(config.pair_column, "pair_column", POSITIVES)
    columns = {"text": table.texts(anchor), "pair": table.texts(positive)}
    negatives = [name for name in table.columns if NEGATIVES.fullmatch(name) and name not in (anchor, positive)]
    for place, name in enumerate(negatives, 1):
        table.parts[name] = "negative"
        columns[f"negative_{place}"] = table.texts(name)
    score = _score_column(table, config)
    if score is None:
        return Dataset(columns, (None,) * len(table.rows), (), table.place)
    if negatives:
        raise DataError(
            f"data.source: {table.place} has negatives ({', '.join(negatives)}) and scores ({score}); a sample is a "
            "pair with a score, or a pair with negatives: leave one of them out"
        )
    return Dataset({**columns, "scored": ("",) * len(table.rows)}, table.numbers_of(score), (), table.place)


def _score_column(table: Table, config: DataConfig) -> str | None:
    if config.label_column is not None:
        return table.find(config.label_column, "label_column", ())
    name = table.named(None, SCORES)
    return name if name is not None and all(map(is_number, filter(None, table.peek(name)))) else None


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Anchors or queries with a column of positives."""
    anchor, positive = table.named(config.text_column, ANCHORS[:3]), table.named(config.pair_column, POSITIVES[:2])
    if anchor is None or positive is None:
        return None
    return Claim(TRIPLET_COLUMNS, f"pairs or triplets of texts for sentence-transformers: {anchor!r}, {positive!r}")


@dataclass(frozen=True)
class EmbeddingTargets:
    """What becomes of the hidden states of a batch.

    Args:
        scores: float [b].
        texts: int64 [b, texts], which of them are the same text.
        mask: int64 [b, texts, tokens], 1 for tokens that are pooled.
        after: the modules after the transformer.
        scored: whether ``scores`` say something.
    """

    scores: torch.Tensor
    texts: torch.Tensor
    mask: torch.Tensor
    after: SentenceModel = field(repr=False)
    scored: bool

    def __len__(self) -> int:
        return len(self.scores)

    def each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor], order: Any = None) -> EmbeddingTargets:
        """The same with every tensor changed."""
        return replace(self, scores=change(self.scores), texts=change(self.texts), mask=change(self.mask))

    def embeddings(self, output: Any) -> list[torch.Tensor]:
        """Embeddings [b, d] of the anchors, of the positives, and so on."""
        hidden__rth = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        mask__rt = self.mask.flatten(0, 1).to(hidden__rth.device)
        found__btd = self.after.embed(hidden__rth, mask__rt).float().unflatten(0, self.mask.shape[:2])
        return list(found__btd.unbind(1))


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Of each sample the token ids of its texts, behind the prompts of the directory, cut to ``data.max_length``.

    Raises:
        ConfigurationError: the model has no tokenizer, or is no encoder of texts.
    """
    if pretrained.tokenizer is None:
        raise ConfigurationError("model.factory: sentence-embedding needs a tokenizer; return (model, tokenizer)")
    after = _after(pretrained)
    names = [name for name in dataset.columns if name != "scored"]
    found = Encoded(len(dataset), config.max_length)
    found.said |= dict.fromkeys(line.removeprefix("data: ") for line in after.said)
    if after.max_length is not None and after.max_length < config.max_length:
        found.said[
            f"sentence-transformers reads only {after.max_length} tokens of a text, although data.max_length is larger"
        ] = None
    of_column = {}
    for name in names:
        prompt = after.query if name == "text" else after.document
        texts = [prompt + (text.lower() if after.lower else text) for text in dataset.columns[name]]
        encoded = pretrained.tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]
        alone = len(pretrained.tokenizer(prompt)["input_ids"]) if prompt and not after.pool_prompt else 0
        # The prompt's own tokens without the closing special token, as the library counts them.
        of_column[name] = [(ids, max(0, alone - 1)) for ids in encoded]
        full = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) >= config.max_length]
        whole = pretrained.tokenizer(full, verbose=False)["input_ids"] if full else []
        found.truncated += sum(len(ids) > config.max_length for ids in whole)
    for place in range(len(dataset)):
        rows = [of_column[name][place] for name in names]
        found.append({
            "input_ids": rows[0][0],
            "rows": [ids for ids, _ in rows],
            "prompts": [prompt for _, prompt in rows],
            "texts": [_number_of(dataset.columns[name][place]) for name in names],
            "labels": dataset.labels[place] or 0.0,
            "after": after.number,
            "scored": "scored" in dataset.columns,
        })  # fmt: skip
    return found


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Inputs [b · texts, tokens] and ``EmbeddingTargets``."""
    import torch

    n = len(rows[0]["rows"])
    inputs = padded_inputs(pretrained, [{"input_ids": ids} for row in rows for ids in row["rows"]])
    mask = inputs["attention_mask"].clone()
    prompts = [length for row in rows for length in row["prompts"]]
    for one, length in zip(mask, prompts, strict=True):
        first = int(one.argmax())  # behind padding on the left
        one[first : first + length] = 0
    targets = EmbeddingTargets(
        torch.tensor([row["labels"] for row in rows]), torch.tensor([row["texts"] for row in rows]),
        mask.unflatten(0, (-1, n)), _after(pretrained), bool(rows[0]["scored"]),
    )  # fmt: skip
    return inputs, targets


def embedding_loss(output: Any, batch: Batch, *, name: str = "auto") -> torch.Tensor:
    """The library's loss, [b]: of each triplet its own; of losses that compare samples the batch's for each of them."""
    import torch

    targets: EmbeddingTargets = batch.labels
    embeddings, scores = targets.embeddings(output), targets.scores
    if name == TRIPLET:
        each = [[one[place : place + 1] for one in embeddings] for place in range(len(scores))]
        return torch.stack([loss_of(name, parts, scores[:0]) for parts in each])
    return loss_of(_loss_named(name, targets.scored), embeddings, scores).expand(len(scores))


def _loss_named(name: str, scored: bool) -> str:
    return (COSENT if scored else MULTIPLE_NEGATIVES) if name == "auto" else name


def configured(task: Task, config: ModelConfig, dataset: Dataset | None) -> Task:
    """The task with the loss that ``model.embedding_loss`` names.

    Raises:
        ConfigurationError: the samples are not what the loss is of.
    """
    name = config.embedding_loss
    if dataset is not None:
        scored, n = "scored" in dataset.columns, len([one for one in dataset.columns if one != "scored"])
        needs = {
            COSENT: ("a score for each pair", scored),
            TRIPLET: ("an anchor, a positive and one negative", n == TRIPLET_COLUMNS),
            MULTIPLE_NEGATIVES: ("pairs without scores, with or without negatives", not scored),
        }
        if name in needs and not needs[name][1]:
            raise ConfigurationError(
                f"model.embedding_loss: {name} needs {needs[name][0]}; the data have {n} texts in a sample"
                f"{' and scores' if scored else ''}; set it to auto"
            )
    return replace(task, loss=partial(embedding_loss, name=name), coupled=name != TRIPLET)


def _after(pretrained: PretrainedModel) -> SentenceModel:
    if pretrained.sentence is not None:
        return pretrained.sentence
    config: Any = getattr(pretrained.model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or getattr(config, "dim", None)
    if width is None:
        raise ConfigurationError(
            "model.name_or_path: sentence-embedding takes text encoders of transformers, which have a hidden_size"
        )
    return sentence_model(pretrained.path, int(width))


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """The embeddings, which texts they are of, and the scores."""
    targets: Any = batch[TARGETS]
    found = np.stack([as_numpy(one) for one in targets.embeddings(output.output)], axis=1)
    return {**mean_loss(output, len(targets)), "embeddings": found, "texts": as_numpy(targets.texts),
            "scores": as_numpy(targets.scores), "scored": targets.scored}  # fmt: skip


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Of scored pairs the correlations of cosines with scores; else how well each anchor finds its positive among the
    texts of all samples (nDCG@10 and mean reciprocal rank, by scikit-learn).
    """
    found__btd, texts = (np.concatenate([record[key] for record in records]) for key in ("embeddings", "texts"))
    found__btd = found__btd / np.maximum(np.linalg.norm(found__btd, axis=-1, keepdims=True), 1e-12)
    if records[0]["scored"]:
        return _correlations(found__btd, np.concatenate([record["scores"] for record in records]))
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    numbers, places = np.unique(texts[:, 1:], return_index=True)
    documents = found__btd[:, 1:].reshape(-1, found__btd.shape[-1])[places]
    sums = {"ndcg_at_10": 0.0, "mrr": 0.0}
    for start in range(0, len(texts), RANKED_AT_ONCE):
        part = slice(start, start + RANKED_AT_ONCE)
        scores, right = found__btd[part, 0] @ documents.T, texts[part, 1:2] == numbers
        if len(numbers) > 1:
            sums["ndcg_at_10"] += len(scores) * float(ndcg_score(right, scores, k=CUTOFF))
            sums["mrr"] += len(scores) * float(label_ranking_average_precision_score(right, scores))
    metrics = {name: value / len(texts) for name, value in sums.items()}
    if found__btd.shape[1] >= TRIPLET_COLUMNS:
        near, far = ((found__btd[:, 0] * found__btd[:, place]).sum(-1) for place in (1, 2))
        metrics["triplet_accuracy"] = float((near > far).mean())
    return metrics


def _correlations(found__btd: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    cosines = (found__btd[:, 0] * found__btd[:, 1]).sum(-1)
    constant = len(scores) < 2 or np.ptp(cosines) == 0 or np.ptp(scores) == 0
    return {
        "spearman_cosine": 0.0 if constant else float(spearmanr(cosines, scores).statistic),
        "pearson_cosine": 0.0 if constant else float(pearsonr(cosines, scores).statistic),
    }


TASK = Task(
    name="sentence-embedding",
    description="embeddings of texts: pairs, triplets (`anchor`, `positive`, `negative`) or scored pairs, with losses "
    "of sentence-transformers; evaluated by nDCG@10 among the texts of the test split, or by correlation with the "
    "scores",
    inputs="text",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=embedding_loss,
    metrics=Metrics(record, finish, ("ndcg_at_10", "spearman_cosine")),
    auto_class="AutoModel",
    model_targets=(),
    row_names=("anchor", "positive", "negative"),
    coupled=True,
    configure=configured,
    no_study="the loss of a sample depends on the others in its batch",
)
