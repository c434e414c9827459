"""The cost table of a model: one column for each option, one row for each resource, and what is paid once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.cost.rates import FLOAT_BYTES, Device, DeviceProfile, Roofline
from layerlens.cost.step import StepCosts, step_costs, typical
from layerlens.models import NONE, RESOURCES, CostTable, Footprint, ModelSpec, ModelStatistics, Option
from layerlens.models.step import StepRecord
from layerlens.registry import METHODS

OPTIMIZER_STATE = {"adamw": 2, "sgd": 0}
"""Values of optimiser state for each trained parameter."""
VRAM, STEP = RESOURCES.index("vram_gb"), RESOURCES.index("step_ms")


def cost_table(
    spec: ModelSpec,
    statistics: ModelStatistics | Footprint | None,
    options: Sequence[Option],
    config: OptimizationConfig,
    *,
    accumulates: bool = False,
    checkpointed: Collection[str] = (),
) -> CostTable:
    """Costs of every option for one batch of the latency profile.

    Args:
        spec: the model.
        statistics: footprint of the frozen model; None when only its parameter count is known.
        options: the options.
        config: latency profile and optimiser.
        accumulates: gradients of several batches are added up in a step of the optimiser.
        checkpointed: names of the blocks whose activations are computed again in the backward pass.

    Returns:
        rows as in ``RESOURCES``. Where the statistics have a recorded step, memory and ``step_ms`` follow from it, and
        part of them is paid once (``charges``, ``depth``). Elsewhere activations are an upper bound, those of the whole
        model are in the base, and ``step_ms`` is not predicted: it has no source.
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
            sum(roofline.added_ms(step, tokens) for step in steps),
            0.0,
        )
    figures = "given" if profile.peak_gflops and profile.memory_bandwidth_gb_s else "nominal"
    source = {
        "trainable_params": "exact",
        "flops": "exact, from shapes",
        "vram_gb": "parameters, gradients, optimiser state and kept activations; activations are an upper bound",
        "latency_ms": f"roofline with {figures} {profile.device_type} figures",
    }
    table = CostTable(tuple(options), cost__ro, base_use(spec, statistics, config), source)
    step = None if statistics is None else statistics.step
    return table if step is None else _with_step(table, spec, step, config, accumulates, checkpointed)


def _with_step(
    table: CostTable,
    spec: ModelSpec,
    step: StepRecord,
    config: OptimizationConfig,
    accumulates: bool,
    checkpointed: Collection[str],
) -> CostTable:
    """The table with memory and time of the recorded step."""
    profile = config.latency_profile
    device: Device = Roofline.of(profile) if step.rates is None else DeviceProfile.of(step.rates)
    found = step_costs(
        spec,
        step,
        table.options,
        device.operation_ms,
        1e-3 * device.parameter_us,
        samples=profile.batch_size,
        sequence_length=profile.sequence_length,
        state_values=OPTIMIZER_STATE[config.optimizer],
        accumulates=accumulates,
        checkpointed=checkpointed,
    )
    cost__ro = table.cost__ro.copy()
    cost__ro[[VRAM, STEP]] = found.own__xo

    def row(pair: np.ndarray) -> np.ndarray:
        placed = np.zeros((*pair.shape[:-1], len(RESOURCES)))
        placed[..., [VRAM, STEP]] = pair
        return placed

    depth = found.depth
    figures = "given" if profile.peak_gflops and profile.memory_bandwidth_gb_s else "nominal"
    without_base = replace(
        table,
        cost__ro=cost__ro,
        base=table.base | {"vram_gb": 0.0, "step_ms": found.base_ms},
        source=table.source
        | {
            "vram_gb": step.memory_source,
            "step_ms": "a recorded training step, "
            + (
                f"{figures} {profile.device_type} figures"
                if step.rates is None
                else f"measured on {step.rates['device']}"
            ),
        },
        charges=tuple(replace(charge, cost__r=row(charge.cost__r)) for charge in found.charges),
        depth=None if depth is None else replace(depth, cost__sr=row(depth.cost__sr)),
    )
    return replace(
        without_base,
        base=without_base.base | {"vram_gb": _base_gb(without_base, spec, found)},
        least={"vram_gb": found.least_gb},
        step=found.use,
        checkpointed=tuple(name for name in step.blocks if name in checkpointed),
    )


def _base_gb(table: CostTable, spec: ModelSpec, found: StepCosts) -> float:
    """What every choice is charged, so that none of many needs more than the sum says or any step needs."""
    amount, per_parameter = found.least_gb
    base = 0.0
    for entries in typical(table.options, [layer.name for layer in spec.layers]):
        bound, needed = table.bound(entries), found.use.gb(entries)
        if needed > amount + per_parameter * bound["trainable_params"]:
            base = max(base, needed - bound["vram_gb"])
    return base


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
    if spec.tokens:  # the weights of modules that are trained in full are there anyway, and PEFT copies them
        n_bytes += FLOAT_BYTES * spec.tokens.kept_elements(profile.tokens)
        n_bytes += FLOAT_BYTES * (2 + OPTIMIZER_STATE[config.optimizer]) * trained
    overhead_ms = 1e-3 * Roofline.of(profile).overhead_us * len(spec.layers)
    return {
        "trainable_params": float(trained),
        "flops": 0.0,
        "vram_gb": 1e-9 * n_bytes,
        "latency_ms": Roofline.of(profile).time_ms(flops_per_token * tokens, n_bytes) + overhead_ms,
        "step_ms": 0.0,
    }
