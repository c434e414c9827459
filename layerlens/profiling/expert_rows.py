"""Rows of a product of experts as the gradient matrices of samples: one group for each expert, rows in their samples.

Axes as in ``sample_matrices``: g are the experts, and t counts the tokens of a sample that went to one expert, padded
with zeros to the most that any expert got of any sample.
"""

from __future__ import annotations

import torch

from layerlens.integrations.expert_products import Routing


def by_expert(
    d__so: torch.Tensor, z__si: torch.Tensor, routing: Routing, batch: int, mask__n: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d__bgto, z__bgti, int64 [b, g] rows of each sample that went to each expert), padding left out.

    Args:
        d__so, z__si: gradients of the outputs, and inputs, of every row.
        routing: of the rows.
        batch: samples, whose tokens come one sample after the other.
        mask__n: 0 for tokens that are padding.
    """
    token__s, expert__s = routing.token__s.to(d__so.device), routing.expert__s.to(d__so.device)
    kept__s = torch.ones_like(token__s, dtype=torch.bool) if routing.routed__s is None else routing.routed__s
    if mask__n is not None:
        kept__s = kept__s & mask__n.to(d__so.device).bool()[token__s]
    token__s, expert__s, d__so, z__si = token__s[kept__s], expert__s[kept__s], d__so[kept__s], z__si[kept__s]
    sample__s = token__s // (routing.n_tokens // batch)
    place__s = expert__s * batch + sample__s  # ascending
    counts__p = torch.bincount(place__s, minlength=routing.n_experts * batch)
    slot__s = torch.arange(len(place__s), device=place__s.device) - (counts__p.cumsum(0) - counts__p)[place__s]
    longest = max(1, int(counts__p.max()))
    padded = []
    for rows in (d__so, z__si):
        padded.append(rows.new_zeros(batch, routing.n_experts, longest, rows.shape[1]))
        padded[-1][sample__s, expert__s, slot__s] = rows
    return padded[0], padded[1], counts__p.view(routing.n_experts, batch).T
