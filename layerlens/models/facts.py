"""The typed sections of a manifest: base model, LoRA settings, predictions and provenance.

A field that is None is not in the file. ``extra`` keeps the fields of other writers, and ``order`` the order of the
file, so a manifest that is read and written again is the same text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from layerlens.exceptions import ManifestError
from layerlens.models.tokens import TokenTraining

INITIALIZATIONS = ("default", "pca", "gradient_svd")
"""How LoRA's A begins; B is zero with each of them. ``tuning.initialization`` says what they are."""


IN_MEMORY = "object:"
"""How a reference begins that is no place: the class of a model that a program had in memory."""
Part = TypeVar("Part", bound="Section")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a manifest.

    Args:
        extra: fields of other writers, by name.
        order: names of the fields in the file that it was read from.
    """

    extra: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls: type[Part], values: Mapping[str, Any], order: tuple[str, ...] = ()) -> Part:
        """The section with these values by name; lists become tuples."""
        own = {each.name for each in dataclasses.fields(cls)} - {"extra", "order"}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(
            **{name: value for name, value in known.items() if name in own},
            extra={name: value for name, value in values.items() if name not in own},
            order=order,
        )

    def fields(self) -> dict[str, Any]:
        """What the section says by name: in the order of its file, or as its fields are declared."""
        said = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            left_out = value is None or (self.order and each.name not in self.order and value == each.default)
            if each.name not in ("extra", "order") and not left_out:
                said[each.name] = value
        said |= self.extra
        return {name: said[name] for name in dict.fromkeys((*(name for name in self.order if name in said), *said))}


@dataclass(frozen=True)
class ModelFacts(Section):
    """The base model: what is needed to load it and to recognise it.

    Args:
        name_or_path: directory, hub name or package:NAME.
        fingerprint: SHA-256 of the weights.
        total_params: number of parameters.
        task: the task to tune for.
        dtype: precision of the weights that were measured. The fingerprint is of these weights.
        num_labels: number of classes.
        labels: names of the classes, in the order of the logits.
        head_modules: module paths of the task head, which is trained in full.
        model_type: name of the architecture in transformers.
        weights: the file of weights that the configuration names.
        loss: the user's loss function that the configuration names.
        left_out: layer -> reason, for layers that no method can adapt.
        quantization: how the configuration quantizes the weights; None if they are loaded as saved.
        new_parameters: parameters outside the head that the checkpoint lacks; they keep their random initialisation.
        tokens: embedding rows that are trained, as ``TokenTraining`` describes them; None if there are none.
        parameters: sums of the base model's parameters: "offered" (in layers that can be adapted), "head" (trained in
            full), and "left_out" by reason.

    Raises:
        ManifestError: ``head_modules`` is not a list of names, or ``tokens`` is not such a description.
    """

    name_or_path: str | None = None
    fingerprint: str | None = None
    total_params: int | None = None
    task: str | None = None
    dtype: str | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] | None = None
    head_modules: tuple[str, ...] | None = None
    model_type: str | None = None
    weights: str | None = None
    loss: str | None = None
    left_out: Mapping[str, str] | None = None
    quantization: Mapping[str, Any] | None = None
    new_parameters: tuple[str, ...] | None = None
    tokens: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.head_modules, str) or not all(isinstance(name, str) for name in self.heads):
            raise ManifestError(f"model.head_modules: must be a list of module names, got {self.head_modules!r}")
        if self.tokens is not None:
            TokenTraining.of(self.tokens)
        if self.parameters is not None:
            given = self.parameters if isinstance(self.parameters, Mapping) else {}
            by_reason = given.get("left_out")
            counts = [given.get("offered"), given.get("head")]
            counts += by_reason.values() if isinstance(by_reason, Mapping) else [None]
            if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in counts):
                raise ManifestError(
                    "model.parameters: must have whole numbers offered and head, and left_out with one for each "
                    f"reason, got {str(self.parameters)[:80]}"
                )

    @property
    def token_training(self) -> TokenTraining | None:
        """The rows of the embeddings that are trained; None for none."""
        return None if self.tokens is None else TokenTraining.of(self.tokens)

    @property
    def new_heads(self) -> tuple[str, ...]:
        """Modules of the task head that the checkpoint lacks: those trained in full without embeddings."""
        tokens = self.token_training
        return tuple(name for name in self.heads if tokens is None or name not in tokens.modules)

    @property
    def place(self) -> str | None:
        """Where the base model can be loaded from; None where a program had it in memory alone."""
        name = self.name_or_path
        return None if name is None or name.startswith(IN_MEMORY) else name

    @property
    def heads(self) -> tuple[str, ...]:
        """Module paths of the task head; empty if the manifest names none."""
        return self.head_modules or ()


@dataclass(frozen=True)
class LoraSettings(Section):
    """Scale and initialisation of LoRA layers.

    Args:
        alpha_over_r: the scale alpha/r of every layer; required if a layer has LoRA.
        use_rslora: True: scale by alpha/√r, where alpha is alpha_over_r times the largest rank.
        initialization: how A is initialised, one of ``INITIALIZATIONS``.
        generator: name of the generator that computes A and B during training; None or "": A and B are trained.

    Raises:
        ManifestError: a value that LoRA does not support.
    """

    alpha_over_r: float | None = None
    use_rslora: bool = False
    initialization: str = "default"
    generator: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.use_rslora, bool):
            raise ManifestError(f"lora.use_rslora: must be true or false, got {self.use_rslora!r}")
        if self.initialization not in INITIALIZATIONS:
            known = ", ".join(INITIALIZATIONS)
            raise ManifestError(f"lora.initialization: {self.initialization!r} is not known; known: {known}")
        if self.alpha_over_r is not None and not 0 < self.alpha_over_r < math.inf:
            raise ManifestError(f"lora.alpha_over_r: must be a number above 0, got {self.alpha_over_r!r}")

    @property
    def is_measured(self) -> bool:
        """Whether A begins from what was measured on data."""
        return self.initialization != "default"


@dataclass(frozen=True)
class CalibrationSummary:
    """How proxies turned utilities into loss drops; ``models.Calibration`` in numbers that a file can hold.

    Args:
        proxies, planned: options that were trained, and that were to be.
        steps, learning_rate: of each training.
        held_out_samples, base_loss: what was judged on, and the frozen model's mean loss there.
        mean_standard_error: of the measured gains.
        leave_one_out_rmse: of an option predicted from the others, per sample.
        options, spearman, spearman_interval: how utilities ranked the gains; None where that cannot be said.
        by_method: the same three by method.
        curves: knots (utility, loss drop) by method.
    """

    proxies: int
    planned: int
    steps: int
    learning_rate: float
    held_out_samples: int
    base_loss: float
    mean_standard_error: float
    leave_one_out_rmse: float
    options: int
    spearman: float | None
    spearman_interval: tuple[float, float] | None
    by_method: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, list[list[float]]]


@dataclass(frozen=True)
class Saving:
    """What ``objective: cheapest`` found against uniform LoRA, by prediction.

    Args:
        minimised: weight of each resource; they sum to 1.
        asked_share: of uniform LoRA's improvement that was to be kept at least.
        kept_share: of it that the cheapest choice is predicted to keep; above 1 where it is predicted to gain more.
        cost_share: what the cheapest choice costs, as a share of uniform LoRA.
        least_cost_share: no choice that keeps as much costs less (proved).
        saves: whether it is written; else uniform LoRA is.
        reason: why not; "" where it is.
        law: the gain of a set is the sum of its utilities to this power.
        price: cost for each unit of the sum of utilities, as shares of uniform LoRA's.
        uniform_lora: what uniform LoRA uses, by resource.
        measured: "kept", "kept_low" and "kept_high" where it was trained against uniform LoRA: its share of the
            held-out loss drop, and the 95 % interval; "asked", which share was to be within it.
        written: what is: "cheapest", "uniform-lora", or "score", the best score within the budgets.
        kept_interval: where the kept share lay in nine of ten cases of the study; None where that was not measured.
    """

    minimised: Mapping[str, float]
    asked_share: float
    kept_share: float
    cost_share: float
    least_cost_share: float
    saves: bool
    reason: str
    law: float
    price: float
    uniform_lora: Mapping[str, float]
    measured: Mapping[str, float] | None = None
    written: str = "cheapest"
    kept_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Predicted(Section):
    """The predicted gain of the choice, in ``unit``, with its 95 % interval where proxies were trained.

    ``uniform_lora`` has what uniform LoRA of as many parameters would use, by resource, where a step was recorded, and
    ``cheapest`` what was sought and found where the least cost was the objective.
    ``rank_32`` has the choice's "share" of the gain that LoRA of rank 32 on every layer would have, that choice's
    "trainable_params", and the ends "low" and "high" of the share's 95 % interval where proxies were trained.
    """

    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    unit: str | None = None
    calibrated: bool | None = None
    calibration: CalibrationSummary | None = None
    uniform_lora: Mapping[str, float] | None = None
    cheapest: Saving | None = None
    rank_32: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Provenance(Section):
    """What the numbers rest on.

    Args:
        seed: of every new weight.
        config: the configuration of the run, as it was recorded.
        threads: that measured and solved.
        statistics: the identity of the data and of what was measured on it.
        versions: of LayerLens, Python and the packages behind the numbers.
        memory_mode, memory_mode_why: how the model was measured within a memory limit.
        proxy_check: what the proxy check found.

    Raises:
        ManifestError: the seed is not a whole number.
    """

    seed: int | None = None
    config: Mapping[str, Any] | None = None
    threads: int | None = None
    statistics: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    memory_mode: str | None = None
    memory_mode_why: str | None = None
    proxy_check: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool | str | float):
            raise ManifestError(f"provenance.seed: must be a whole number, got {self.seed!r}")
