"""The ridge of a new head: strong where labels are noise, weak where they follow from the features."""

from __future__ import annotations

import torch

from layerlens.profiling.ridge import LEAST_SAMPLES, RIDGES, ridge_of


def _chosen(x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.nn.Linear]:
    head = torch.nn.Linear(x.shape[1], 2)
    parameters = list(head.parameters())

    def losses() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(x), y, reduction="none")

    before = [parameter.detach().clone() for parameter in parameters]
    ridge = ridge_of(losses, parameters)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    return ridge, head


def test_the_ridge_follows_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 40)
    noise = torch.randint(0, 2, (96,))
    separable = (x[:, 0] > 0).long()
    strong, _ = _chosen(x, noise)
    weak, _ = _chosen(5.0 * x[:, :3], separable)
    assert strong == RIDGES[-1]  # equal odds are the best that can be said
    assert weak == RIDGES[0]
    assert _chosen(x, noise)[0] == strong  # the same again
    few = LEAST_SAMPLES - 1
    assert _chosen(x[:few], noise[:few])[0] == RIDGES[0]


def test_labels_that_go_round_are_no_fold_of_their_own() -> None:
    torch.manual_seed(0)
    y = torch.arange(64) % 4 // 2
    x = torch.randn(64, 3) + 4.0 * y[:, None]
    assert _chosen(x, y)[0] <= RIDGES[1]
