"""A plan as text and as HTML: what it costs, how good it provably is, and what each layer gets."""

from __future__ import annotations

from collections.abc import Sequence

from layerlens.models import Manifest

MOST_ROWS = 40


def plan_text(manifest: Manifest, notes: Sequence[str]) -> str:
    """The table of a plan."""
    chosen = [row for row in manifest.allocations if row.rank]
    lines = [f"{len(chosen)} of {len(manifest.allocations)} layers adapted, {manifest.trainable_params:,} parameters"]
    for row in chosen[:MOST_ROWS]:
        lines.append(f"  {row.layer}  {row.method} {row.rank}  {row.cost:,}")
    if len(chosen) > MOST_ROWS:
        lines.append(f"  and {len(chosen) - MOST_ROWS} more")
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def plan_html(manifest: Manifest, notes: Sequence[str]) -> str:
    """The same for a notebook."""
    return f"<pre>{plan_text(manifest, notes)}</pre>"
