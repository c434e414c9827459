"""What the user should know of the options and budgets of a choice: sizes not offered, budgets that cannot bind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from layerlens.manifest.formats import quantity
from layerlens.models import NONE, AllocationProblem, ModelSpec
from layerlens.registry import METHODS
from layerlens.vocabulary import RESOURCES

MOST_NAMED = 3


def told_of_offers(spec: ModelSpec, sizes: Mapping[str, Sequence[int]], problem: AllocationProblem) -> Iterator[str]:
    """Lines on sizes that layers do not take, layers that take none, and budgets that cannot bind.

    Args:
        spec: the layers.
        sizes: those on offer for each method on offer.
        problem: the options that were chosen among.
    """
    yield from sizes_not_offered(spec, sizes)
    yield from budgets_that_cannot_bind(problem)


def sizes_not_offered(spec: ModelSpec, sizes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """A line for each method with a size that some of its layers do not take."""
    for name, offered in sizes.items():
        method = METHODS[name]
        takers = [layer for layer in spec.layers if name in layer.methods]
        refused = {size: [layer for layer in takers if not method.takes_size(layer, size)] for size in sorted(offered)}
        parts = [f"{size} in {len(layers)} of {len(takers)} layers" for size, layers in refused.items() if layers]
        if not parts:
            continue
        size, layers = next((size, layers) for size, layers in refused.items() if layers)
        why = method.why_not_size(layers[0], size)
        yield f"{method.label}: not offered: {method.unit} {', '.join(parts)}, such as {layers[0].name}: {why}"
        bare = [layer.name for layer in takers if all(layer in refused[one] for one in refused)]
        if bare:
            more = f" and {len(bare) - MOST_NAMED} more" if len(bare) > MOST_NAMED else ""
            yield f"{method.label}: no {method.unit} on offer fits {', '.join(bare[:MOST_NAMED])}{more}"


def budgets_that_cannot_bind(problem: AllocationProblem) -> Iterator[str]:
    """A line for each budget that even the dearest option of every layer, and all that is paid once, stays within."""
    if all(option.method == NONE for option in problem.options):
        return
    for row, resource in enumerate(problem.resources):
        once = sum(float(charge.cost__r[row]) for charge in problem.charges)
        once += 0.0 if problem.depth is None else float(problem.depth.cost__sr[:, row].max(initial=0.0))
        dearest = float(np.maximum.reduceat(problem.cost__ro[row], problem.offset[:-1]).sum()) + once
        if dearest <= float(problem.capacity[row]):
            known = RESOURCES.get(resource)
            key = f"optimization.{known.budget}" if known else f"the budget of {resource}"
            used, limit = (
                quantity(resource, float(problem.base[row]) + dearest),
                quantity(resource, problem.budget[row]),
            )
            yield f"{key}: {limit} cannot bind: the dearest option of every layer together needs {used}"
