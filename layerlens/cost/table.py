"""The cost table of a model: one column for each option, one row for each resource."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.methods import Operation
from layerlens.models import NONE, RESOURCES, CostTable, Footprint, ModelSpec, ModelStatistics, Option
from layerlens.registry import METHODS

FLOAT_BYTES = 4

NOMINAL = {"cpu": (100.0, 20.0, 5.0), "gpu": (150_000.0, 1500.0, 5.0)}
"""Device type -> (GFLOP/s, GB/s, µs for each operation): about half of what data sheets say of a two-core server slice
and of an A100. Used where the latency profile does not give the user's own figures."""

OPTIMIZER_STATE = {"adamw": 2, "sgd": 0}
"""Values of optimiser state for each trained parameter."""


@dataclass(frozen=True)
class Roofline:
    """Time of an operation = max(FLOPs / peak, bytes / bandwidth) + fixed overhead (Williams et al. 2009)."""

    peak_gflops: float
    bandwidth_gb_s: float
    overhead_us: float

    @classmethod
    def of(cls, profile: LatencyProfile) -> Roofline:
        """The profile's own figures, nominal ones of its device type where it has none."""
        peak, bandwidth, overhead = NOMINAL[profile.device_type]
        return cls(
            profile.peak_gflops if profile.peak_gflops is not None else peak,
            profile.memory_bandwidth_gb_s if profile.memory_bandwidth_gb_s is not None else bandwidth,
            profile.op_overhead_us if profile.op_overhead_us is not None else overhead,
        )

    def time_ms(self, flops: float, n_bytes: float) -> float:
        """Milliseconds for one operation."""
        seconds = max(flops / (self.peak_gflops * 1e9), n_bytes / (self.bandwidth_gb_s * 1e9))
        return 1e3 * seconds + 1e-3 * self.overhead_us

    def operation_ms(self, operation: Operation, tokens: int) -> float:
        """Milliseconds for one operation on a batch of ``tokens``."""
        n_bytes = FLOAT_BYTES * (operation.elements * tokens + operation.weights)
        return self.time_ms(operation.flops * tokens + operation.call_flops, n_bytes)


def cost_table(
    spec: ModelSpec,
    statistics: ModelStatistics | Footprint | None,
    options: Sequence[Option],
    config: OptimizationConfig,
) -> CostTable:
    """Costs of every option for one batch of the latency profile.

    Args:
        spec: the model.
        statistics: footprint of the frozen model; None when only its parameter count is known.
        options: the options.
        config: latency profile and optimiser.

    Returns:
        rows trainable_params, flops, vram_gb, latency_ms, as in ``RESOURCES``.
    """
    profile = config.latency_profile
    roofline = Roofline.of(profile)
    layers = {layer.name: layer for layer in spec.layers}
    bytes_per_parameter = FLOAT_BYTES * (2 + OPTIMIZER_STATE[config.optimizer])  # the weight, its gradient, its state
    cost__ro = np.zeros((len(RESOURCES), len(options)))
    for column, option in enumerate(options):
        if option.method == NONE:
            continue
        layer, method = layers[option.layer], METHODS[option.method]
        steps = method.operations(layer, option.rank)
        params = method.trainable_params(layer, option.rank)
        tokens = profile.batch_size * (layer.positions or profile.sequence_length)
        kept = method.kept_elements(layer, option.rank) * tokens + method.kept_once(layer, option.rank)
        cost__ro[:, column] = (
            params,
            sum(tokens * step.flops + step.call_flops for step in steps),
            1e-9 * (bytes_per_parameter * params + FLOAT_BYTES * kept),
            sum(roofline.operation_ms(step, tokens) for step in steps),
        )
    figures = "given" if profile.peak_gflops and profile.memory_bandwidth_gb_s else "nominal"
    source = {
        "trainable_params": "exact",
        "flops": "exact, from shapes",
        "vram_gb": "parameters, gradients, optimiser state and kept activations; activations are an upper bound",
        "latency_ms": f"roofline with {figures} {profile.device_type} figures",
    }
    return CostTable(tuple(options), cost__ro, base_use(spec, statistics, config), source)


def base_use(
    spec: ModelSpec, statistics: ModelStatistics | Footprint | None, config: OptimizationConfig
) -> dict[str, float]:
    """What the frozen model needs of each resource before any option.

    Parameters and FLOPs budgets limit what options add, so their base is 0, but for rows of embeddings that are trained
    beside them: these count as parameters, with gradient, optimiser state and what they keep.

    Without measured statistics, FLOPs are
    taken as 2 for each parameter and token, and activations as one hidden state for each layer and token.
    """
    profile = config.latency_profile
    tokens = profile.batch_size if spec.per_sample and statistics is not None else profile.tokens
    if statistics is not None:
        flops_per_token, kept_per_token = statistics.forward_flops, statistics.activation_bytes
    else:
        flops_per_token = 2.0 * spec.total_params
        kept_per_token = float(FLOAT_BYTES * sum(layer.hidden_size for layer in spec.layers))
    n_bytes = spec.weight_bytes + kept_per_token * tokens
    trained = spec.tokens.trainable_params if spec.tokens else 0
    if spec.tokens:  # the weights of modules that are trained whole are there anyway, and PEFT copies them
        n_bytes += FLOAT_BYTES * spec.tokens.kept_elements(profile.tokens)
        n_bytes += FLOAT_BYTES * (2 + OPTIMIZER_STATE[config.optimizer]) * trained
    overhead_ms = 1e-3 * Roofline.of(profile).overhead_us * len(spec.layers)
    return {
        "trainable_params": float(trained),
        "flops": 0.0,
        "vram_gb": 1e-9 * n_bytes,
        "latency_ms": Roofline.of(profile).time_ms(flops_per_token * tokens, n_bytes) + overhead_ms,
    }
