"""The manifest: the choice for every layer, its use of each budget, and the proof of how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from layerlens.models.choice import Choice
from layerlens.models.facts import LoraSettings, ModelFacts, Predicted, Provenance, Section
from layerlens.models.model_spec import Option
from layerlens.registry import METHODS

SCHEMA_VERSION = "1.0"
SECTIONS: dict[str, type[Section]] = {
    "model": ModelFacts,
    "lora": LoraSettings,
    "predicted": Predicted,
    "provenance": Provenance,
}


@dataclass(frozen=True)
class ManifestRow:
    """The choice for one layer, an entry of ``allocations`` in the manifest's file.

    Args:
        layer: module path.
        method: name of a PEFT method, or "none".
        rank: size of the method (LoRA rank, adapter width, number of prefix pairs); 0 for "none".
        utility: expected gain, in the manifest's ``utility_unit``.
        cost: number of trainable parameters.
        flops: forward FLOPs added to one batch.
        vram: training memory added, in GB (1e9 bytes).
        latency: forward latency added to one batch, in milliseconds.
        total_score: the score that the solver maximised: weighted utility minus weighted costs and the method's
            penalty.
    """

    layer: str
    method: str
    rank: int
    utility: float
    cost: int
    flops: float
    vram: float
    latency: float
    total_score: float


@dataclass(frozen=True)
class ResourceUse:
    """One budget: what was allowed (None: no limit), what the frozen model needs, what the choice adds, and its price.

    ``total`` = ``base`` + ``added`` is what the budget limits. ``multiplier`` is the shadow price in score per unit.
    """

    resource: str
    budget: float | None
    base: float
    added: float
    total: float
    multiplier: float
    source: str


@dataclass(frozen=True)
class Manifest:
    """Everything in ``manifest.json`` except its timestamps.

    Args:
        model: what is needed to load and to recognise the base model.
        allocations: one row for each layer, in the order of the model.
        resources: budget and use of each resource.
        score: the score that the solver maximised, summed over the layers.
        upper_bound: proved bound: no allocation within the budgets has a higher score.
        gap: (upper_bound − score) / upper_bound.
        status: "optimal" if the gap is within the tolerance, else "feasible".
        solver: the stages that found the allocation and proved the bound.
        utility_model: name of the utility model.
        utility_unit: unit of the utilities.
        lora: scale and initialisation of the LoRA layers.
        predicted: the predicted gain, and what the prediction is based on.
        provenance: fingerprints of data and statistics, versions, configuration and seed.
        checkpointed: module paths of the blocks with gradient checkpointing.

    ``choice`` is the part that is added to a model. Score, bound, gap, status and solver are its certificate.
    """

    model: ModelFacts
    allocations: tuple[ManifestRow, ...]
    resources: tuple[ResourceUse, ...]
    score: float
    upper_bound: float
    gap: float
    status: str
    solver: str
    utility_model: str
    utility_unit: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    predicted: Predicted = field(default_factory=Predicted)
    provenance: Provenance = field(default_factory=Provenance)
    checkpointed: tuple[str, ...] = ()

    @cached_property
    def choice(self) -> Choice:
        """The choice alone, without its costs and its certificate."""
        return Choice(
            tuple(Option(row.layer, row.method, row.rank) for row in self.allocations),
            seed=self.provenance.seed or 0,
            lora=self.lora,
            head_modules=self.model.heads,
            task=self.model.task or "",
            tokens=self.model.token_training,
            checkpointed=self.checkpointed,
        )

    @property
    def trainable_params(self) -> int:
        """Number of parameters that the choice trains, without the task head."""
        return sum(row.cost for row in self.allocations)

    @property
    def lora_share(self) -> float:
        """Share of ``trainable_params`` that a ``LoraConfig`` holds: LoRA or DoRA, and copied modules."""
        choice = self.choice
        copied = choice.copied_options if choice.lora_options else ()
        held = {option.layer for option in (*choice.lora_options, *copied)}
        of_lora = sum(row.cost for row in self.allocations if row.layer in held)
        return of_lora / self.trainable_params if self.trainable_params else 0.0

    @property
    def peft_share(self) -> float:
        """Share of ``trainable_params`` that PEFT's directory holds."""
        held = sum(row.cost for row in self.allocations if row.method in METHODS and METHODS[row.method].wraps)
        return held / self.trainable_params if self.trainable_params else 0.0

    def fields(self) -> dict[str, Any]:
        """The fields of the manifest's file, by name."""
        parts = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if not self.checkpointed:  # most choices have none, and readers of older versions know none
            del parts["checkpointed"]
        return {name: list(part) if name == "checkpointed" else _plain(part) for name, part in parts.items()}


def _plain(part: Any) -> Any:
    if isinstance(part, Section):
        return {name: _plain(value) for name, value in part.fields().items()}
    if isinstance(part, tuple) and part and dataclasses.is_dataclass(part[0]):
        return [_plain(each) for each in part]
    return asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part


def choice_of(given: Choice | Manifest) -> Choice:
    """The choice itself, or that of a manifest."""
    return given.choice if isinstance(given, Manifest) else given


@dataclass(frozen=True)
class RunRecord:
    """A job that ended well.

    Args:
        kind: "run", "optimize", "train", "evaluate".
        manifest: what was chosen; None for jobs that choose nothing.
        files: what was written where, by name.
        seconds: wall time of each stage.
        measured: predicted against measured figures, by resource.
        metrics: other figures, by name.
        steps: figures of every step of a training, the first before it.
        statistics_from_cache: whether profiling was spared; None for jobs that do not profile.
    """

    kind: str
    manifest: Manifest | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: Sequence[Mapping[str, float]] = ()
    statistics_from_cache: bool | None = None
