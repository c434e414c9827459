"""Draw docs/assets/choice.svg, the picture in the README, from a run's manifest: what each layer got, and every budget.

    python scripts/readme_picture.py [demos/quickstart/out/manifest.json]

The quickstart (`scripts/quickstart.sh`) makes that manifest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layerlens.manifest import read_manifest
from layerlens.manifest.figures import figure_style
from layerlens.manifest.formats import quantity, resource_name
from layerlens.manifest.grid import grid_of
from layerlens.models import NONE, Manifest
from layerlens.registry import METHODS

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/assets/choice.svg"
INK, FAINT, EMPTY, BASE = "#1f2328", "#57606a", "#f3f4f6", "#afb8c1"


def main() -> None:
    """Read the manifest, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, nargs="?", default=ROOT / "demos/quickstart/out/manifest.json")
    manifest = read_manifest(parser.parse_args().manifest)
    PICTURE.parent.mkdir(exist_ok=True)
    with figure_style():
        figure = drawn(manifest)
        figure.savefig(PICTURE, format="svg", metadata={"Date": None}, facecolor="white")
    print(PICTURE.relative_to(ROOT))


def drawn(manifest: Manifest) -> Any:
    """The heat map of the choice beside the bars of the budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.7), layout="constrained")
    cells, bars = figure.subplots(1, 2, width_ratios=(1.45, 1.0))
    _heat_map(cells, manifest)
    _budgets(bars, manifest)
    return figure


def _heat_map(axes: Any, manifest: Manifest) -> None:
    grid = grid_of(manifest.allocations, joined=False)
    largest = {
        name: max((row.rank for row in manifest.allocations if row.method == name), default=1) for name in METHODS
    }
    for down, block in enumerate(grid.blocks):
        for across, row in enumerate(block.cells):
            chosen = row is not None and row.method != NONE
            colour = METHODS[row.method].colours[0] if chosen else EMPTY
            strength = 0.35 + 0.65 * row.rank / largest[row.method] if chosen else 1.0
            axes.add_patch(_tile(across, down, colour, strength))
            if chosen:
                text = f"{METHODS[row.method].letter}{row.rank}"
                axes.text(
                    across, down, text, ha="center", va="center", fontsize=10, color="white" if strength > 0.6 else INK
                )
    axes.set_xlim(-0.5, len(grid.roles) - 0.5)
    axes.set_ylim(len(grid.blocks) - 0.5, -0.5)
    axes.set_xticks(
        range(len(grid.roles)), [role.replace("attention.output", "attention\noutput") for role in grid.roles]
    )
    axes.set_yticks(range(len(grid.blocks)), [f"block {block.name}" for block in grid.blocks])
    axes.tick_params(length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    used = [name for name in METHODS if any(row.method == name for row in manifest.allocations)]
    legend = "   ".join(f"{METHODS[name].letter} {METHODS[name].label} {METHODS[name].unit}" for name in used)
    adapted = sum(row.method != NONE for row in manifest.allocations)
    title = f"What to adapt: {adapted} of {len(manifest.allocations)} layers   ({legend})"
    axes.set_title(title, fontsize=10, loc="left", color=INK)


def _tile(across: int, down: int, colour: str, strength: float) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (across - 0.44, down - 0.42), 0.88, 0.84, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour,
        edgecolor="none", alpha=strength,
    )  # fmt: skip


def _budgets(axes: Any, manifest: Manifest) -> None:
    shown = [use for use in manifest.resources if use.budget is not None]
    for down, use in enumerate(shown):
        base, added = use.base / use.budget, use.added / use.budget
        axes.barh(down, 1.0, height=0.36, color=EMPTY)
        axes.barh(down, base, height=0.36, color=BASE)
        axes.barh(down, added, left=base, height=0.36, color=METHODS["lora"].colours[0])
        total = f"{quantity(use.resource, use.total)} of {quantity(use.resource, use.budget)}"
        axes.text(0.0, down - 0.3, resource_name(use.resource), fontsize=9, color=INK, va="bottom")
        axes.text(1.0, down - 0.3, total, fontsize=9, color=FAINT, va="bottom", ha="right")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(len(shown) - 0.5, -0.75)
    axes.axis("off")
    gap = f"proved: at most {100 * manifest.gap:.2g} % from the best"
    proof = "proved optimal" if manifest.gap < 1e-6 else gap
    title = f"What it costs: {proof}   (grey: frozen model)"
    axes.set_title(title, fontsize=10, loc="left", color=INK)


if __name__ == "__main__":
    main()
