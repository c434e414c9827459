"""Why one layer got its option: all its options with utility and costs, the runner-up, and what would make it win.

Where a choice was just made, ``explained(solution, layer)`` is all it takes. Of a choice that lies on disk,
``solution_of`` makes the solution again from the manifest and the statistics beside it, without solving::

    spec, statistics = load_statistics(Path("out/statistics.safetensors"))
    solution = solution_of(read_manifest(Path("out/manifest.json")), spec, statistics)
    print(explained(solution, "model.layers.5.self_attn.q_proj"))
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.jobs.recorded import config_of
from layerlens.jobs.solve import Solution, option_tables
from layerlens.manifest.formats import in_sentence, method_name, number, quantity, resource_name
from layerlens.manifest.tables import html_table, text_table
from layerlens.models import (
    NONE,
    RESOURCES,
    Allocation,
    AllocationProblem,
    CostTable,
    LayerExplanation,
    Manifest,
    ModelSpec,
    ModelStatistics,
    Option,
    UtilityTable,
)
from layerlens.optimization import build_problem, cheapest_problem, explain, uniform_reference
from layerlens.optimization.cheapest import SHORTFALL
from layerlens.profiling.cache import cache_key
from layerlens.vocabulary import MOST_DIGITS

TIE = 1e-12
"""Differences in score that are rounding."""


@dataclass(frozen=True)
class ScoredOption:
    """One option of a layer.

    Args:
        method, rank: what it is; "none" and 0 leave the layer alone.
        utility: expected gain, in the utility model's unit.
        score: what the solver maximises: weighted utility minus weighted costs and the method's penalty.
        net_score: the score minus what the option uses of each budget at the budget's shadow price. Of options that
            fit, the solver takes the one with the highest.
        costs: what it adds to each resource.
    """

    method: str
    rank: int
    utility: float
    score: float
    net_score: float
    costs: Mapping[str, float]

    @property
    def name(self) -> str:
        """For people: "LoRA 8"."""
        return f"{method_name(self.method)} {self.rank}" if self.rank else NONE


@dataclass(frozen=True)
class ExplainedLayer:
    """Why a layer got its option. ``str`` is a table and two sentences; a notebook shows them as HTML.

    Args:
        layer: that was asked for.
        layers: that choose together with it; all figures are those of all of them.
        options: in the order of the problem; "none" is one of them unless a rule forbids it.
        explanation: the chosen option, the runner-up, and what would make it win.
        prices: shadow price of each budget, score per unit.
        utility_model, utility_unit: which model made the utilities, and their unit.
    """

    layer: str
    layers: tuple[str, ...]
    options: tuple[ScoredOption, ...]
    explanation: LayerExplanation
    prices: Mapping[str, float]
    utility_model: str
    utility_unit: str

    @property
    def chosen(self) -> ScoredOption:
        """What the layer got."""
        return self._scored(self.explanation.chosen)

    @property
    def runner_up(self) -> ScoredOption | None:
        """The other option with the highest net score; None where there is no other."""
        other = self.explanation.runner_up
        return None if other is None else self._scored(other)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What was chosen, what comes next, and what would make it win: a sentence each."""
        found, other = self.explanation, self.runner_up
        said = [f"{self.layer} has {self.chosen.name}."]
        if len(self.layers) > 1:
            said.append(f"{len(self.layers)} layers choose alike: {', '.join(self.layers)}.")
        if other is None or found.value_to_flip is None:
            return (*said, "It has no other option.")
        if found.value_to_flip <= TIE:
            what = "would fit as well" if found.fits else "does not fit beside the choices of the other layers"
            return (*said, f"{other.name} has the same net score, and {what}.")
        cheaper = [
            f"used {_less(name, less)}"
            for name, less in found.cost_to_flip.items()
            if less <= other.costs.get(name, 0.0)
        ]
        ways = " or ".join([f"had {number(found.value_to_flip)} more score", *cheaper])
        return (*said, f"{other.name} comes next; it would win if it {ways}.")

    def __str__(self) -> str:
        return "\n".join((text_table(*self._table()), "", *self.reasons))

    def _repr_html_(self) -> str:
        told = "".join(f"<p>{escape(one)}</p>" for one in self.reasons)
        return html_table(*self._table(), caption=self.layer) + told

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        found = self.explanation
        return {
            "layer": self.layer,
            "layers": list(self.layers),
            "options": [asdict(one) for one in self.options],
            "chosen": _as_json(found.chosen),
            "runner_up": None if found.runner_up is None else _as_json(found.runner_up),
            "score_to_flip": found.value_to_flip,
            "cost_to_flip": dict(found.cost_to_flip),
            "fits": found.fits,
            "prices": dict(self.prices),
            "utility_model": self.utility_model,
            "utility_unit": self.utility_unit,
            "reasons": list(self.reasons),
        }

    def _scored(self, option: Option) -> ScoredOption:
        return next(one for one in self.options if (one.method, one.rank) == (option.method, option.rank))

    def _table(self) -> tuple[list[str], list[list[str]], str]:
        heads = ["option", "utility", "score", "net score", "parameters", "FLOPs", "memory", "latency", "step", ""]
        marks = {id(self.chosen): "chosen", id(self.runner_up): "runner-up"}
        rows = [
            [
                one.name,
                *map(number, (one.utility, one.score, one.net_score)),
                *(quantity(name, one.costs[name]) for name in RESOURCES),
                marks.get(id(one), ""),
            ]
            for one in self.options
        ]
        return heads, rows, "lrrrrrrrrl"


def explained(solution: Solution, layer: str) -> ExplainedLayer:
    """Why ``layer`` got its option.

    Args:
        solution: of ``find_allocation`` or ``solution_of``.
        layer: its module path, or an ending of it that no other layer has.

    Raises:
        ConfigurationError: there is no such layer; names the nearest.
    """
    problem, allocation = solution.problem, solution.allocation
    known = [name for one in solution.explanations for name in one.layers]
    name = full_name(layer, known)
    group = next(index for index, one in enumerate(solution.explanations) if name in one.layers)
    prices = dict(zip(problem.resources, map(float, allocation.multipliers), strict=True))
    options = []
    for index in range(int(problem.offset[group]), int(problem.offset[group + 1])):
        option = problem.options[index]
        entries = list(problem.members__o[index]) if problem.members__o else [index]
        costs = {name: float(solution.costs.cost__ro[row, entries].sum()) for row, name in enumerate(RESOURCES)}
        used = problem.cost__ro[:, index]
        costs |= {name: float(used[row]) for row, name in enumerate(problem.resources) if name not in costs}
        options.append(
            ScoredOption(
                option.method,
                option.rank,
                utility=float(solution.utilities.utility[entries].sum()),
                score=float(problem.value[index]),
                net_score=float(problem.value[index] - allocation.multipliers @ used),
                costs=costs,
            )
        )
    found = solution.explanations[group]
    return ExplainedLayer(
        name, found.layers, tuple(options), found, prices, solution.utilities.model, solution.utilities.unit
    )


def solution_of(manifest: Manifest, spec: ModelSpec, statistics: ModelStatistics) -> Solution:
    """The solution that ``manifest`` records, from its rows and prices; nothing is solved again.

    Args:
        manifest: of a run or of ``optimize``; it records its configuration.
        spec, statistics: what it was chosen by.

    Raises:
        ActivationCacheError: the statistics are those of another model or of other options.
        ConfigurationError: the manifest does not record its configuration, or one that can be used.
    """
    own, other = manifest.model.fingerprint, spec.fingerprint
    if own and other and own != other:
        raise ActivationCacheError(
            f"the statistics are of {spec.model_name} ({other[:12]}…), the manifest is of "
            f"{manifest.model.name_or_path} ({own[:12]}…); give the statistics that the choice is based on"
        )
    measured, recorded = statistics.provenance.get("identity"), (manifest.provenance.statistics or {}).get("key")
    if measured and recorded and cache_key(measured) != recorded:
        raise ActivationCacheError(
            "the statistics were measured on other data or with other settings than the manifest's; give the "
            "statistics that the choice is based on"
        )
    config = config_of(manifest)
    if _by_score(manifest):
        config = config.by_score()
    utilities, costs = option_tables(spec, statistics, config, checkpointed=manifest.checkpointed)
    problem = problem_of(manifest, spec, utilities, costs, config.optimization)
    chosen = {Option(row.layer, row.method, row.rank) for row in manifest.allocations}
    choice = np.array([_chosen_in(problem, group, utilities.options, chosen) for group in range(len(problem.layers))])
    prices = {use.resource: use.multiplier for use in manifest.resources}
    if manifest.predicted.cheapest is not None:
        prices[SHORTFALL] = manifest.predicted.cheapest.price
    allocation = Allocation(
        choice=choice,
        value=manifest.score,
        upper_bound=manifest.upper_bound,
        used=problem.terms__rk(choice).sum(axis=1),
        multipliers=np.array([prices.get(name, 0.0) for name in problem.resources]),
        status=manifest.status,
        solver=manifest.solver,
    )
    return Solution(utilities, costs, problem, allocation, tuple(explain(problem, allocation)), ())


def _by_score(manifest: Manifest) -> bool:
    """Whether the least cost was sought and the proxy check found nothing to save: its choice was made by score."""
    saving = manifest.predicted.cheapest
    return saving is not None and not saving.saves and manifest.provenance.proxy_check is not None


def problem_of(
    manifest: Manifest, spec: ModelSpec, utilities: UtilityTable, costs: CostTable, config: OptimizationConfig
) -> AllocationProblem:
    """The problem that a manifest's choice was made in."""
    saving = manifest.predicted.cheapest
    if saving is None or _by_score(manifest):
        return build_problem(spec, utilities, costs, config)
    reference = uniform_reference(spec, utilities, costs, config, saving.law)
    return cheapest_problem(spec, utilities, costs, config, reference, saving.asked_share)


def full_name(layer: str, known: list[str]) -> str:
    """The layer in ``known`` that ``layer`` names, whole or by an ending that is unique.

    Raises:
        ConfigurationError: none, or several.
    """
    if layer in known:
        return layer
    found = [name for name in known if name.endswith(f".{layer}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigurationError(
            f"{layer!r} names {len(found)} layers: {', '.join(found[:4])} ...; give the whole name"
        )
    nearest = difflib.get_close_matches(layer, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"layers are named like {known[0]!r}"
    raise ConfigurationError(f"there is no layer {layer!r}; {hint}")


def _chosen_in(problem: AllocationProblem, group: int, entries: Sequence[Option], chosen: set[Option]) -> int:
    for index in range(int(problem.offset[group]), int(problem.offset[group + 1])):
        if all(entries[entry] in chosen for entry in (problem.members__o[index] if problem.members__o else (index,))):
            return index
    raise ActivationCacheError(
        f"{problem.layers[group]}: these statistics do not have the option that the manifest chose; give the "
        "statistics that the choice is based on"
    )


def _less(resource: str, amount: float) -> str:
    """ "28 fewer trainable parameters", "3 MB less training memory"."""
    name = in_sentence(resource_name(resource))
    return f"{math.ceil(amount):,} fewer {name}" if resource == "trainable_params" and amount < MOST_DIGITS else (
        f"{quantity(resource, amount)} less {name}"
    )  # fmt: skip


def _as_json(option: Option) -> dict[str, Any]:
    return {"method": option.method, "rank": option.rank}
