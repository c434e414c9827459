"""Why the backward pass ends where it does: what going deeper would cost, and what it would add to the score."""

from __future__ import annotations

from collections.abc import Sequence

from layerlens.manifest.formats import percent, quantity
from layerlens.manifest.layer_names import Position, positions
from layerlens.models import NONE, FrozenStage, Manifest

MOST_NAMES = 3


def why_no_deeper(manifest: Manifest, frozen: Sequence[FrozenStage]) -> str:
    """What keeps the backward pass from going deeper, as a sentence; "" where no budget limits depth.

    It is about the frozen block that is the nearest below the lowest adapted layer (the layers that are frozen in the
    same block come first), entered as deep as it is worth the most at the budgets' prices.

    Args:
        manifest: what was chosen.
        frozen: stages below the lowest adapted layer, the nearest first.

    >>> from layerlens.models import ManifestRow, ModelFacts, ResourceUse
    >>> def row(layer, method):
    ...     return ManifestRow(layer, method, 4, 0.0, 9, 0.0, 0.0, 0.0, 0.0)
    >>> rows = (row("layer.3.up", "none"), row("layer.4.up", "lora"))
    >>> use = ResourceUse("step_ms", 90.0, 50.0, 40.0, 90.0, 0.5, "")
    >>> found = Manifest(ModelFacts(), rows, (use,), 0.0, 0.0, 0.0, "optimal", "", "", "")
    >>> why_no_deeper(found, [FrozenStage("layer.3.up", {"step_ms": 4.1}, 0.01, 0.002)])
    'Block 3 is frozen because going deeper costs 4.1 ms for 0.2 % of the score.'
    """
    if not frozen or all(row.method == NONE for row in manifest.allocations):
        return ""
    price = {use.resource: use.multiplier for use in manifest.resources}
    place = positions([row.layer for row in manifest.allocations])
    block = _blocks(frozen[0], place)
    found: list[tuple[float, FrozenStage, list[str]]] = []
    layers: list[str] = []
    for stage in frozen:
        if _blocks(stage, place) != block:
            break
        layers = [*layers, *_layers(stage)]
        paid = sum(price.get(name, 0.0) * cost for name, cost in stage.cost.items())
        found.append((stage.gain - paid, stage, layers))
    _, stage, layers = max(found, key=lambda each: each[0])
    what = _name(manifest, place, layers)
    costs = {name: cost for name, cost in stage.cost.items() if cost > 0.0}
    if stage.gain <= 0.0 or not costs:
        return f"{what} frozen: at the budgets' prices, no option there is worth its cost."
    amounts = " and ".join(quantity(name, cost) for name, cost in costs.items())
    if any(price.get(name, 0.0) > 0.0 for name in costs):
        return f"{what} frozen because going deeper costs {amounts} for {percent(stage.share)} of the score."
    room = {use.resource: use.budget - use.total for use in manifest.resources if use.budget is not None}
    over = any(cost > room.get(name, cost) for name, cost in costs.items())
    fits = ", and does not fit into the budgets with the other layers" if over else ""
    return f"{what} frozen; going deeper would cost {amounts} for {percent(stage.share)} of the score{fits}."


def _layers(stage: FrozenStage) -> list[str]:
    return stage.name.split(", ")


def _blocks(stage: FrozenStage, place: dict[str, Position]) -> set[tuple[str, int | None, str]]:
    return {_block(layer, place) for layer in _layers(stage)}


def _block(layer: str, place: dict[str, Position]) -> tuple[str, int | None, str]:
    """The layer's block; a layer outside of the blocks is one of its own."""
    at = place.get(layer, Position("", None, layer))
    return at.stack, at.block, layer if at.block is None else ""


def _name(manifest: Manifest, place: dict[str, Position], layers: Sequence[str]) -> str:
    """ "Block 3 is", "Layers a, b are"."""
    block = _block(layers[0], place)
    rows = [row for row in manifest.allocations if _block(row.layer, place) == block]
    alone = all(_block(layer, place) == block for layer in layers)
    if alone and block[1] is not None and all(row.method == NONE for row in rows):
        stacks = {at.stack for at in place.values() if at.block is not None}
        return f"Block {block[1]}{f' of {block[0]}' if len(stacks) > 1 else ''} is"
    more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
    return f"{', '.join(layers[:MOST_NAMES])}{more} {'is' if len(layers) == 1 else 'are'}"
