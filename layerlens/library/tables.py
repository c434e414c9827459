"""A plan as text and as HTML: what it costs, how good it provably is, and what each layer gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerlens.manifest.formats import percent, quantity, resource_name
from layerlens.manifest.grid import Blocks, Grid, grid_of
from layerlens.manifest.page import rendered
from layerlens.manifest.summary import (
    budget_facts,
    counts,
    expert_lines,
    left_out_lines,
    option_name,
    peft_holds,
    predicted_gain,
    proof,
    share_of_model,
    worth,
)
from layerlens.manifest.tables import text_table
from layerlens.models import NONE, Manifest, ManifestRow
from layerlens.models.facts import IN_MEMORY
from layerlens.registry import METHODS
from layerlens.vocabulary import RESOURCES

WIDTH = 100
"""Columns that a grid may take before it goes on below; a long name of a role is never cut."""
MOST_ROWS = 24
"""Layers in a list, and roles in a grid, that are shown."""
UNCHANGED = "·"


def plan_text(manifest: Manifest, notes: Sequence[str]) -> str:
    """The table of a plan, in about 40 lines whatever the model's depth."""
    parts = [
        "\n".join(
            line for line in (headline(manifest), proof(manifest), predicted_gain(manifest), worth(manifest)) if line
        ),
        text_table(*_budget_table(manifest)) if manifest.resources else "",
        *_layers(manifest),
        "\n".join(f"- {remark}" for remark in _remarks(manifest, notes)),
    ]
    return "\n\n".join(part for part in parts if part)


def plan_html(manifest: Manifest, notes: Sequence[str]) -> str:
    """The same for a notebook: the allocation as a heat map, and a bar for each budget.

    Self-contained, in colours that can be read on light and on dark pages, since a notebook's theme is not known.
    """
    grid = _grid(manifest, joined=False)
    several = len(counts(manifest.allocations)) > 1
    largest = {
        method: max((row.rank for row in manifest.allocations if row.method == method), default=0) for method in METHODS
    }

    def cell(row: ManifestRow | None) -> dict[str, str | int] | None:
        if row is None:
            return None
        if row.method == NONE:
            return {"text": UNCHANGED, "title": f"{row.layer}: unchanged", "colour": "", "strength": 0}
        strength = 15 + 60 * row.rank / largest[row.method]
        return {
            "text": _cell(row, several),
            "title": f"{row.layer}: {option_name(row)}, {row.cost:,} parameters",
            "colour": METHODS[row.method].colours[0],
            "strength": round(strength),
        }

    return rendered(
        "plan.html.j2",
        headline=headline(manifest),
        sentences=[line for line in (proof(manifest), predicted_gain(manifest), worth(manifest)) if line],
        budgets=[budget_facts(use) for use in manifest.resources],
        maps=[
            {
                "stack": stack if len(grid.stacks) > 1 else "",
                "blocks": [one.name for one in blocks],
                "roles": [(grid.roles[k], [cell(one.cells[k]) for one in blocks]) for k in kept],
            }
            for stack, blocks, kept in _by_stack(grid)
        ],
        outside=[(row.layer, cell(row)) for row in grid.outside],
        legend=[(METHODS[name].label, METHODS[name].colours[0]) for name in counts(manifest.allocations)],
        remarks=_remarks(manifest, notes),
    )


def headline(manifest: Manifest) -> str:
    """What is adapted, of which model, and how many parameters that trains."""
    found, layers = counts(manifest.allocations), len(manifest.allocations)
    model = _called(manifest.model.name_or_path or "the model")
    if not found:
        return f"No layer of {model} is adapted ({layers} could be): no option is worth its cost within the budgets."
    by_method = ", ".join(f"{METHODS[method].label} on {count}" for method, count in found.items())
    share = share_of_model(manifest)
    of_model = f", {share} of the model" if share else ""
    adapted = f"{sum(found.values())} of {layers} layers of {model} adapted"
    return f"{adapted} ({by_method}): {manifest.trainable_params:,} trainable parameters{of_model}."


def _called(reference: str) -> str:
    """A model that was given in memory by its class alone."""
    return reference.rpartition(".")[2] if reference.startswith(IN_MEMORY) else reference


def _budget_table(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    rows = []
    for use in manifest.resources:
        limit, used, price = "no limit", "", ""
        if use.budget is not None:
            limit = quantity(use.resource, use.budget)
            used = percent(use.total / use.budget) if use.budget else ""
            price = f"{use.multiplier:.3g} per {RESOURCES[use.resource].unit}" if use.resource in RESOURCES else (
                f"{use.multiplier:.3g}")  # fmt: skip
            price = price if use.multiplier else "0"
        amounts = [quantity(use.resource, value) for value in (use.base, use.added, use.total)]
        rows.append([resource_name(use.resource), *amounts, limit, used, price])
    return ["", "base", "added", "total", "budget", "used", "price in score"], rows


def _layers(manifest: Manifest) -> Iterator[str]:
    """The grid of every stack of blocks, or a list where there are no blocks."""
    adapted = [row for row in manifest.allocations if row.method != NONE]
    if not adapted:
        return
    several = len(counts(manifest.allocations)) > 1
    grid = _grid(manifest, joined=True)
    for stack, blocks, kept in _by_stack(grid):
        yield _grid_text(grid, stack, blocks, kept, several)
    if grid.outside:
        shown = grid.outside[:MOST_ROWS]
        rows = [[row.layer, option_name(row), f"{row.cost:,}"] for row in shown]
        more = len(grid.outside) - len(shown)
        table = text_table(["layer", "", "parameters"], rows)
        yield f"{table}\nand {more} more layers" if more else table
    if grid.blocks:
        methods = [METHODS[name] for name in counts(manifest.allocations)]
        letters = ", ".join(f"{one.letter} {one.label} {one.unit}" if several else f"{one.label} {one.unit}s"
                            for one in methods)  # fmt: skip
        yield f"({letters}; {UNCHANGED} and roles that are not shown are unchanged)"


def _grid(manifest: Manifest, *, joined: bool) -> Grid:
    """The grid; where blocks are single layers (``nn.Sequential``), all layers are a list."""
    grid = grid_of(manifest.allocations, joined=joined)
    if len(grid.roles) > 1:
        return grid
    return Grid((), (), tuple(row for row in manifest.allocations if row.method != NONE))


def _by_stack(grid: Grid) -> Iterator[tuple[str, list[Blocks], list[int]]]:
    """Every stack with its blocks and the numbers of the roles that get something in it."""
    for stack in grid.stacks:
        blocks = [one for one in grid.blocks if one.stack == stack]
        cells = [[one.cells[k] for one in blocks] for k in range(len(grid.roles))]
        yield stack, blocks, [k for k, rows in enumerate(cells) if any(row is not None and row.rank for row in rows)]


def _grid_text(grid: Grid, stack: str, blocks: Sequence[Blocks], kept: Sequence[int], several: bool) -> str:
    """A row for each role, a column for each block, in parts that are not wider than ``WIDTH``."""
    shown = list(kept)[:MOST_ROWS]
    heads = [f"block of {stack}" if len(grid.stacks) > 1 else "block", *(grid.roles[k] for k in shown)]
    columns = [[one.name, *(_cell(one.cells[k], several) for k in shown)] for one in blocks]
    widths = [max(map(len, column)) for column in columns]
    parts, room = [[heads]], WIDTH - max(map(len, heads))
    left = room
    for column, width in zip(columns, widths, strict=True):
        if width + 2 > left and len(parts[-1]) > 1:
            parts.append([heads])
            left = room
        parts[-1].append(column)
        left -= width + 2
    texts = ["\n".join(text_table(*_rows(part)).splitlines()) for part in parts]
    more = len(kept) - len(shown)
    return "\n\n".join(texts) + (f"\nand {more} more roles with adapted layers" if more else "")


def _rows(columns: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    lines = [list(line) for line in zip(*columns, strict=True)]
    return lines[0], lines[1:]


def _cell(row: ManifestRow | None, several: bool) -> str:
    if row is None:
        return ""
    if row.method == NONE:
        return UNCHANGED
    return f"{METHODS[row.method].letter}{row.rank}" if several else str(row.rank)


def _remarks(manifest: Manifest, notes: Sequence[str]) -> list[str]:
    """What else the user should know, a line each."""
    heads = manifest.model.heads
    head = f"The task head ({', '.join(heads)}) is trained too and saved with the adapter." if heads else ""
    return [
        line
        for line in (peft_holds(manifest), head, *expert_lines(manifest), *left_out_lines(manifest), *notes)
        if line
    ]
