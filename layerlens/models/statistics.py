"""What one pass over the calibration data measured for each layer, and what trained proxies gained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from layerlens.models.model_spec import Option
from layerlens.models.step import StepRecord

Extra = Mapping[str, float | np.ndarray]
"""Results that have no field of their own, by "STATISTIC.NAME"; None where there are none."""
NUMBER, NOT_NEGATIVE, SPECTRUM, FACTOR, SKETCH = (
    {"kind": kind} for kind in ("number", "not negative", "spectrum", "factor", "sketch")
)
"""What kinds of fields MethodStatistics has: how they are kept in a file, and what can be true of them."""
EXPERT_TOKENS = "experts.tokens"
"""In ``extra`` of stacked experts: float64 [experts], the calibration tokens that went to each of them."""


def _nothing() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class FactorSketch:
    """A Kronecker factor by its leading eigenpairs: A ≈ V diag(values) Vᵀ, never above A (Nyström).

    Args:
        values: float64 [k], descending.
        vectors: float32 [n, k].
        trace: tr A, exact.
        error: share of the trace that the eigenpairs lack, exact: (tr A − Σ values) / tr A.
    """

    values: np.ndarray
    vectors: np.ndarray
    trace: float
    error: float


@dataclass(frozen=True)
class ModuleCosts:
    """What one module costs, with everything inside it; None for what was not asked for.

    Args:
        activation_bytes: bytes per token (per sample where there are no tokens) that it keeps for the backward pass of
            the frozen model.
        forward_flops: FLOPs of its forward pass, per token or sample.
        forward_ms: time of its forward pass on two sequences, milliseconds, the least of some passes; hooks included.
    """

    activation_bytes: float | None = None
    forward_flops: float | None = None
    forward_ms: float | None = None
    extra: Extra | None = None


@dataclass(frozen=True)
class MethodStatistics:
    """Statistics of the gradient matrix that one PEFT method can change on one layer.

    With output gradient d and input z of the option (z = h for LoRA, z = y for an adapter, z = (1, q/√d_head) for a
    prefix), the matrix of sample n is M_n = Σ_t d_t z_tᵀ, and M = mean_n M_n.

    A statistic that was not requested is None, or an empty spectrum.

    Args:
        energy: ‖M‖²_F.
        trace: mean_n ‖M_n‖²_F; for LoRA this is the empirical Fisher trace.
        signal: ‖M‖² − (trace − ‖M‖²)/(N − 1), the unbiased estimate of the squared norm of the true mean gradient;
            can be < 0.
        input_mean_square: mean of z² over components and tokens.
        spectrum: float64, descending, squared split-half singular values of the whitened matrix; unbiased, so single
            values can be < 0.
        plain_spectrum: the same of the matrix itself.
        sketched_spectrum: an approximation of ``plain_spectrum`` by random projections, or itself for small matrices.
        sketch_error: estimated ‖M − M̂‖_F / ‖M‖_F of the approximation, of half the samples; 0 where it is exact.
        input_factor: float32 [g, n_in, n_in], A = mean over tokens of z zᵀ.
        output_factor: float32 [g, n_out, n_out], S = mean over samples of Σ_t d dᵀ.
        input_sketch: A by its leading eigenpairs; None for several heads.
        output_sketch: S by its leading eigenpairs; None for several heads.
        extra: results of statistics that have no field here.
    """

    energy: float | None = field(default=None, metadata=NOT_NEGATIVE)
    trace: float | None = field(default=None, metadata=NOT_NEGATIVE)
    signal: float | None = field(default=None, metadata=NUMBER)
    input_mean_square: float | None = field(default=None, metadata=NOT_NEGATIVE)
    spectrum: np.ndarray = field(default_factory=_nothing, metadata=SPECTRUM)
    plain_spectrum: np.ndarray = field(default_factory=_nothing, metadata=SPECTRUM)
    sketched_spectrum: np.ndarray = field(default_factory=_nothing, metadata=SPECTRUM)
    sketch_error: float | None = field(default=None, metadata=NUMBER)
    input_factor: np.ndarray = field(default_factory=_nothing, metadata=FACTOR)
    output_factor: np.ndarray = field(default_factory=_nothing, metadata=FACTOR)
    input_sketch: FactorSketch | None = field(default=None, metadata=SKETCH)
    output_sketch: FactorSketch | None = field(default=None, metadata=SKETCH)
    extra: Extra | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MethodStatistics:
        """From values by name; those without a field go into ``extra``."""
        known = {one.name for one in fields(cls)} - {"extra"}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: value for name, value in values.items() if name in known}, extra=extra or None)

    @classmethod
    def names_of(cls, *kinds: Mapping[str, str]) -> tuple[str, ...]:
        """The fields of these kinds, in their order."""
        return tuple(one.name for one in fields(cls) if one.metadata in kinds)

    def value(self, name: str) -> Any:
        """A field, or what ``extra`` has under this name; None where there is neither."""
        return getattr(self, name) if name in self.__dataclass_fields__ else (self.extra or {}).get(name)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer: one entry for each method that the layer supports."""

    layer: str
    by_method: dict[str, MethodStatistics]


@dataclass(frozen=True)
class KernelStatistics:
    """The empirical neural tangent kernel of the measured layers: K[n, m] = ⟨g_n, g_m⟩, g_n the gradient of sample n.

    Args:
        gram: float64 [n, n], in the order of the samples in the calibration set.
        trace: tr K.
        effective_rank: (tr K)² / ‖K‖²_F, between 1 (all gradients parallel) and n (all orthogonal, of one length).
        target_alignment: centred alignment of K with the kernel that is 1 for samples of one class and 0 for others
            (Cortes et al. 2012), between -1 and 1; None where the targets are no classes.
        relative_error: estimated ‖K̂ − K‖_F / ‖K‖_F where K is sketched (more than 256 samples); 0 where it is exact.
    """

    gram: np.ndarray
    trace: float
    effective_rank: float
    target_alignment: float | None
    relative_error: float = 0.0


@dataclass(frozen=True)
class Footprint:
    """What a step of the frozen model costs; ``ModelStatistics`` has the same fields.

    Args:
        activation_bytes: bytes per token (per sample where there are no tokens) kept for the backward pass.
        forward_flops: FLOPs of one forward pass, per token or sample.
        step: a recorded training step; None where none could be recorded.
    """

    activation_bytes: float
    forward_flops: float
    step: StepRecord | None = None


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of all layers, and their provenance.

    Args:
        layers: one entry for each layer of ``spec``, in its order.
        n_samples: number of measured calibration samples.
        n_tokens: number of their tokens, without padding.
        mean_loss: mean loss of the frozen model per sample.
        activation_bytes: bytes per token that the frozen model keeps for the backward pass (saved-tensor hooks).
        forward_flops: FLOPs of one forward pass of the frozen model, per token.
        provenance: fingerprints, settings and versions, as JSON values.
        kernel: the neural tangent kernel; None if it was not requested.
        other_weights: parameter name -> statistics of weights outside the layers of ``spec`` (embeddings, convolutions,
            heads); empty if they were not requested.
        left_out: parameter name -> reason, for parameters without statistics.
        unmeasured: layer -> reason, for layers of the loaded model that could not be measured. They are not in
            ``spec``.
        coverage: share of the model's parameters that have statistics, between 0 and 1.
        modules: module name -> costs; empty if they were not requested.
        proxies: measured gains of options that were trained briefly; None if none were trained.
        extra: results of statistics that have no field here.
        head: parameter name -> weight of the new task head that LayerLens fitted before measuring (half precision
            as float32); empty if no head is new.
        step: a recorded training step of the frozen model; None if none could be recorded.
    """

    layers: tuple[LayerStatistics, ...]
    n_samples: int
    n_tokens: int
    mean_loss: float
    activation_bytes: float
    forward_flops: float
    provenance: dict[str, Any] = field(default_factory=dict)
    kernel: KernelStatistics | None = None
    other_weights: dict[str, MethodStatistics] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    coverage: float = 0.0
    modules: dict[str, ModuleCosts] = field(default_factory=dict)
    proxies: ProxyStudy | None = None
    extra: Extra | None = None
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    step: StepRecord | None = None

    def by_name(self) -> dict[str, LayerStatistics]:
        """The statistics by layer name."""
        return {layer.layer: layer for layer in self.layers}


@dataclass(frozen=True)
class ProxyGain:
    """What one option gained when it alone was trained.

    Args:
        option: what was trained.
        gain: mean drop of the held-out loss, per sample (nats where the loss is a log-likelihood); below 0 where
            training made it worse.
        standard_error: of ``gain``, from the paired differences of the held-out samples.
    """

    option: Option
    gain: float
    standard_error: float


@dataclass(frozen=True)
class ProxyStudy:
    """The proxies of one model: all from the same start, on the same batches, judged on the same held-out samples.

    Args:
        gains: one entry for each option that was trained, in the order of the plan.
        planned: options of the plan; more than ``gains`` has where the time limit ended the study.
        steps, learning_rate: of each training (AdamW).
        held_out_samples: samples that the losses are means over; none of them was trained or measured on.
        base_loss: mean loss of the frozen model on them.
    """

    gains: tuple[ProxyGain, ...]
    planned: int
    steps: int
    learning_rate: float
    held_out_samples: int
    base_loss: float


@dataclass(frozen=True)
class Prediction:
    """How well a utility ranks measured gains.

    Args:
        n_options: options compared.
        spearman: rank correlation of utility and gain; None where either is constant.
        interval: 95 % bootstrap interval of it; None with ``spearman``, or for fewer than 4 options.
    """

    n_options: int
    spearman: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Calibration:
    """How theoretical utilities became predicted loss drops, and how well they had ranked the measured ones.

    Args:
        study: the measured gains.
        theoretical: utility of each of the study's options before calibration.
        fitted: predicted loss drop of each of them.
        overall: all options together.
        by_method: each method alone.
        curves: for each method the knots (utility, loss drop) of its monotone fit; linear in between.
        leave_one_out_rmse: root mean square of (measured − predicted from the other proxies), per sample.
        replicates__bo: float64 [n_replicates, n_options], the utilities of the table under fits to resampled proxies.
    """

    study: ProxyStudy
    theoretical: tuple[float, ...]
    fitted: tuple[float, ...]
    overall: Prediction
    by_method: dict[str, Prediction]
    curves: dict[str, tuple[tuple[float, float], ...]]
    leave_one_out_rmse: float
    replicates__bo: np.ndarray
