"""The manifest: what was chosen for every layer, what it uses of each budget, and how good it provably is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from layerlens.models.choice import Choice, LoraSettings
from layerlens.models.options import Option

SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class ManifestRow:
    """What was chosen for one layer (the origin's ``allocations[]`` fields).

    Args:
        layer: module path.
        method: "lora", "adapter", "prefix" or "none".
        rank: LoRA rank, adapter width or prefix pairs; 0 exactly for "none".
        utility: expected gain, in the manifest's ``utility_unit``.
        cost: trainable parameters.
        flops: forward FLOPs added for one batch.
        vram: training memory added, in GB (1e9 bytes).
        latency: forward latency added, in ms.
        total_score: what the solver maximised: weighted utility minus weighted costs and the method's penalty.
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
    """Everything that ``manifest.json`` holds, apart from its timestamps.

    Args:
        model: name, fingerprint, total_params, task, num_labels, labels (what is needed to load the base model again).
        allocations: one row for each layer, in the order of the model.
        resources: one entry for each resource.
        score: what the solver maximised, summed over the layers.
        upper_bound: no allocation within the budgets has a higher score.
        gap: (upper_bound − score) / upper_bound.
        status: "optimal" where the gap is within the tolerance, else "feasible".
        solver: the stages that found and proved it.
        utility_model: which utility model made the utilities.
        utility_unit: and their unit.
        lora: ``alpha_over_r`` (one constant for the model), ``use_rslora`` and ``initialization`` of the LoRA layers.
        predicted: predicted gain and what it rests on.
        provenance: data and statistics fingerprints, versions, configuration, seed.
    """

    model: dict[str, Any]
    allocations: tuple[ManifestRow, ...]
    resources: tuple[ResourceUse, ...]
    score: float
    upper_bound: float
    gap: float
    status: str
    solver: str
    utility_model: str
    utility_unit: str
    lora: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def choice(self) -> Choice:
        """What is put into the model, without what it costs and how good it is."""
        return Choice(
            tuple(Option(row.layer, row.method, row.rank) for row in self.allocations),
            seed=self.provenance.get("seed", 0),
            lora=LoraSettings(**self.lora),
            head_modules=tuple(self.model.get("head_modules") or ()),
            task=str(self.model.get("task") or ""),
        )


def choice_of(given: Choice | Manifest) -> Choice:
    """The choice itself, or that of a manifest."""
    return given.choice if isinstance(given, Manifest) else given
