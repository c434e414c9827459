"""Short trainings are AdamW's steps, with a constant rate or one that warms up and decays."""

from __future__ import annotations

import pytest
import torch

from layerlens.tuning.short_training import train_steps


@pytest.mark.parametrize("decay", [False, True])
def test_steps_are_those_of_adamw(decay: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(10, 6, 4, generator=generator)
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    twin.load_state_dict(model.state_dict())
    losses = [lambda m, x=batch: m(x).square().flatten() for batch in data]
    train_steps(model, losses, learning_rate=0.1, decay=decay)

    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0)
    # One step of warm-up, the tenth of ten; then linearly down to a tenth of the peak.
    rates = [0.1, *(0.1 * left / 10 for left in range(9, 0, -1))] if decay else [0.1] * 10
    for rate, batch in zip(rates, data, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        twin(batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)
