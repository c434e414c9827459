"""From utilities, costs and budgets to the allocation problem: the score formula and the budgeted resources."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from layerlens import vocabulary
from layerlens.config import OptimizationConfig
from layerlens.exceptions import ActivationCacheError, OptimizationError
from layerlens.models import RESOURCES, AllocationProblem, CostTable, ModelSpec, UtilityTable
from layerlens.models.model_spec import NONE, Option
from layerlens.optimization.charge_rows import charges_of, depth_of
from layerlens.optimization.constraints import JOIN, allowed_options, extra_rows, grouped_options, layers_alike
from layerlens.registry import METHODS

# What ``objective_weights`` calls each resource.
OBJECTIVE_OF_RESOURCE = {name: resource.objective for name, resource in vocabulary.RESOURCES.items()}
MEMORY, MOMENT = "vram_gb", "vram_gb at moment {}"
ROUNDING = 1e-9
"""Share of a budget that predictions of fewer than 10^6 terms, added up in any order, err by less: 10^6 · 2^-53."""


def build_problem(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    config: OptimizationConfig,
    *,
    weighed: Mapping[int, tuple[float, float]] | None = None,
    limits: Sequence[tuple[str, np.ndarray, float]] = (),
) -> AllocationProblem:
    """The knapsack problem of one model: a group for each layer, a resource for each budget that was given.

    The score of option o, which is what the solver maximises::

        score_o = w_utility · utility_o / max(utility) − Σ_r w_r · cost_ro / reference_r − penalty(method_o)

    - ``w`` are ``objective_weights``; a weight that is not named is 1 for the utility and 0 for a resource.
    - Where no utility is above 0, max(|utility|) takes the place of max(utility).
    - ``reference_r`` is the budget as the user gave it. A resource with a weight but without a budget is measured
      against the most that all layers together could use of it (each layer with its dearest option).
    - ``penalty`` is 0 for "none".

    A resource without a budget is no constraint. Where the costs are lower bounds (``CostTable.moments``), memory has a
    row for each moment, and what is predicted as within a budget is within its rows. ``constraints`` says how rules,
    layers that choose alike, least numbers of layers and resources of the user become options, groups and rows;
    ``problem.entries(choice)`` leads back to the tables.

    Args:
        spec, utilities, costs, config: the model, what its options gain and cost, and what is asked for.
        weighed: (w, reference) of rows of the cost table, in place of ``objective_weights``.
        limits: further resources: name, cost of each entry of the tables, and budget.

    Raises:
        ActivationCacheError: a utility is NaN or infinite (its statistics are damaged).
        OptimizationError: a cost is NaN, infinite or negative, or the tables do not describe the same options.
    """
    options = utilities.options
    offset = _group_offsets(spec, options)
    if costs.options != options:
        raise OptimizationError(
            f"the {len(costs.options)} options of the cost table are not the {len(options)} of the utility table; "
            "build both from the same enumerate_options(spec, config.ranks())"
        )
    utility = np.ascontiguousarray(utilities.utility, dtype=np.float64)
    cost__ro = np.ascontiguousarray(costs.cost__ro, dtype=np.float64)
    n_rows = len(RESOURCES) + len(costs.moments)
    if utility.shape != (len(options),) or cost__ro.shape != (n_rows, len(options)):
        raise OptimizationError(
            f"expected {len(options)} utilities and {n_rows} × {len(options)} costs, "
            f"got arrays of shape {utility.shape} and {cost__ro.shape}"
        )
    _reject_damaged(options, utility, cost__ro)
    base = np.array([costs.base[resource] for resource in RESOURCES], dtype=np.float64)
    if not np.all(np.isfinite(base) & (base >= 0.0)):
        raise OptimizationError(f"what the frozen model needs must be finite and at least 0, got {costs.base}")

    weighed = weights_of(spec, costs, config) if weighed is None else dict(weighed)
    value = scores_of(options, utility, cost__ro, config, weighed)
    # Rows of the table that the problem keeps; resources of the user, which come last, have no charges.
    kept, rows = [], []
    for row, name, budget in _budgeted(costs, config):
        kept.append(row)
        own_base = base[row] if row < len(RESOURCES) else costs.moments[row - len(RESOURCES)]
        rows.append((name, cost__ro[row], budget, float(own_base)))
    rows += [(name, cost, budget, 0.0) for name, cost, budget in (*extra_rows(spec, options, config), *limits)]
    groups = layers_alike(spec, config)
    grouped = grouped_options(groups, options, allowed_options(spec, options, config))
    members = tuple(entries for _, entries in grouped)
    names = [JOIN.join(group) for group in groups]
    sizes = Counter(option.layer for option, _ in grouped)
    grouped_offset = np.cumsum([0, *(sizes[name] for name in names)], dtype=np.int64)
    return AllocationProblem(
        layers=tuple(names),
        options=tuple(option for option, _ in grouped),
        offset=grouped_offset,
        value=np.array([exact_sum(value[list(entries)]) for entries in members]),
        cost__ro=np.array([[exact_sum(cost[list(entries)]) for entries in members] for _, cost, _, _ in rows]),
        resources=tuple(name for name, _, _, _ in rows),
        capacity=np.array([budget - base for _, _, budget, base in rows]),
        budget=np.array([budget for _, _, budget, _ in rows]),
        base=np.array([base for _, _, _, base in rows]),
        members__o=members,
        entry_value=value,
        charges=charges_of(costs, kept, len(rows), weighed, members),
        depth=depth_of(costs, kept, len(rows), weighed, members, offset, grouped_offset),
    )


def _budgeted(costs: CostTable, config: OptimizationConfig) -> Iterator[tuple[int, str, float]]:
    """(row of the table, its name, its budget) of everything with a budget."""
    loose = 1.0 + ROUNDING if costs.moments else 1.0
    for row, resource in enumerate(RESOURCES):
        budget = config.budgets()[resource]
        if budget is None:
            continue
        if costs.moments and resource == MEMORY:
            for moment in range(len(costs.moments)):
                yield len(RESOURCES) + moment, MOMENT.format(moment), loose * budget
        else:
            yield row, resource, float(budget) * (loose if resource == "step_ms" else 1.0)


def _group_offsets(spec: ModelSpec, options: tuple[Option, ...]) -> np.ndarray:
    """Where the options of each layer begin; the layers must come in the order of the specification."""
    offset = [0]
    position = 0
    for layer in spec.layers:
        while position < len(options) and options[position].layer == layer.name:
            position += 1
        if position == offset[-1]:
            found = options[position].layer if position < len(options) else "the end of the table"
            raise OptimizationError(f"layer {layer.name!r} has no options where they should be: found {found!r}")
        offset.append(position)
    if position < len(options):
        raise OptimizationError(f"the tables have options for {options[position].layer!r}; the model has no such layer")
    return np.array(offset, dtype=np.int64)


def _reject_damaged(options: tuple[Option, ...], utility: np.ndarray, cost__ro: np.ndarray) -> None:
    damaged = np.flatnonzero(~np.isfinite(utility))
    if damaged.size:
        raise ActivationCacheError(
            f"the utility of {option_name(options[damaged[0]])} is {utility[damaged[0]]}"
            f"{_and_others(damaged.size)}; its statistics are damaged, profile the model again"
        )
    rows, columns = np.nonzero(~(np.isfinite(cost__ro) & (cost__ro >= 0.0)))
    if rows.size:
        resource = (*RESOURCES, MEMORY)[min(rows[0], len(RESOURCES))]
        raise OptimizationError(
            f"the {resource} cost of {option_name(options[columns[0]])} is {cost__ro[rows[0], columns[0]]}"
            f"{_and_others(rows.size)}; costs must be finite and at least 0"
        )


def weights_of(spec: ModelSpec, costs: CostTable, config: OptimizationConfig) -> dict[int, tuple[float, float]]:
    """(weight, reference) of each row of the table that has a weight in the score."""
    offset = _group_offsets(spec, costs.options)
    budgets = config.budgets()
    found = {}
    for row, resource in enumerate(RESOURCES):
        weight, reference = config.objective_weights.get(OBJECTIVE_OF_RESOURCE[resource], 0.0), budgets[resource]
        if weight == 0.0:
            continue
        if reference is None:
            most = [*np.maximum.reduceat(costs.cost__ro[row], offset[:-1]), *(c.cost__r[row] for c in costs.charges)]
            most += [] if costs.depth is None else [costs.depth.cost__sr[:, row].max()]
            reference = exact_sum(most)
        if reference > 0.0:
            found[row] = weight, float(reference)
    return found


def scores_of(
    options: tuple[Option, ...],
    utility: np.ndarray,
    cost__ro: np.ndarray,
    config: OptimizationConfig,
    weighed: dict[int, tuple[float, float]],
) -> np.ndarray:
    """float64 [n_options], the score of each entry of the tables, as ``build_problem`` says it."""
    weights = config.objective_weights
    top = float(utility.max(initial=0.0)) or float(np.abs(utility).max(initial=0.0))
    # Two factors, because weight / top can overflow for tiny utilities although the product does not.
    value = weights.get("utility", 1.0) * (utility / top) if top > 0.0 else np.zeros_like(utility)
    for row, (weight, reference) in weighed.items():
        value = value - weight * (cost__ro[row] / reference)
    penalties = {str(method): penalty for method, penalty in config.method_penalties.items()}
    penalty = np.array([0.0 if option.method == NONE else penalties.get(option.method, 0.0) for option in options])
    value = value - penalty
    damaged = np.flatnonzero(~np.isfinite(value))
    if damaged.size:
        raise OptimizationError(
            f"the score of {option_name(options[damaged[0]])} overflows{_and_others(damaged.size)}; "
            "use smaller objective_weights or method_penalties"
        )
    return np.ascontiguousarray(value)


def option_name(option: Option) -> str:
    """What messages call an option: "lora rank 8 on encoder.layer.0"."""
    if option.method == NONE:
        return f"{NONE} on {option.layer}"
    return f"{option.method} {METHODS[option.method].unit} {option.rank} on {option.layer}"


def _and_others(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def exact_sum(values: np.ndarray | Iterable[float]) -> float:
    """math.fsum, but infinity where a total of finite numbers overflows.

    >>> exact_sum([0.1] * 10)
    1.0
    """
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    try:
        return math.fsum(values)
    except OverflowError:
        return math.copysign(math.inf, sum(math.ldexp(value, -64) for value in values))


def ldexp(number: float, exponent: int) -> float:
    """math.ldexp, but infinity where the result overflows: a loose bound may."""
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)
