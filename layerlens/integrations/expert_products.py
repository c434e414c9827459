"""A seam in transformers' mixtures of experts: their products as plain matrix products, and a view of each.

transformers 5 finds the function that computes the experts by ``config._experts_implementation``, so one function of
ours serves every architecture of that interface. It is needed for two things. Statistics see every product with the
token and the expert of each row. Costs can be counted: torch counts no FLOPs of its grouped products, and has none for
tensors without data. Experts that are no part of the interface (Llama 4) have a forward pass of their own here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

OF_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
LLAMA4 = "Llama4TextExperts"
_NAME = "layerlens_products"


@dataclass(frozen=True)
class Routing:
    """Which rows of a product are which.

    Args:
        token__s: int64 [s], the token of each row, counted over all samples; ascending for each expert.
        expert__s: int64 [s], its expert; ascending.
        n_tokens: tokens of the batch, padding included.
        n_experts: experts, those without a row too.
        routed__s: bool [s], rows that the router sends to the expert; None where all are.
    """

    token__s: torch.Tensor
    expert__s: torch.Tensor
    n_tokens: int
    n_experts: int
    routed__s: torch.Tensor | None = None


Tap = Callable[[torch.nn.Module, str, torch.Tensor, torch.Tensor, Routing], torch.Tensor]
"""(experts, name of the parameter, inputs [s, i], outputs [s, o], routing) -> outputs to use instead."""

_taps: dict[int, Tap] = {}
"""Experts module -> its tap now. transformers' table never forgets a function, so that must not hold one."""


def of_interface(module: Any) -> bool:
    """Whether the module computes its experts through transformers' interface."""
    return all(hasattr(module, name) for name in OF_INTERFACE) and hasattr(module, "config")


def weight_names(module: Any) -> tuple[str, ...]:
    """Names of the stacked weights of an experts module whose products can be seen; none for any other module."""
    if type(module).__name__ == LLAMA4:
        return "gate_up_proj", "down_proj"
    if not of_interface(module) or getattr(module, "_is_expert_parallel", False):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def is_transposed(module: Any) -> bool:
    """Whether the weights are [experts, inputs, outputs]; else [experts, outputs, inputs]."""
    return bool(getattr(module, "is_transposed", type(module).__name__ == LLAMA4))


@contextmanager
def plain_products(model: torch.nn.Module, tap: Tap | None = None) -> Iterator[None]:
    """While open, experts are computed by plain products, each of which goes through ``tap``."""
    experts: list[Any] = [module for module in model.modules() if weight_names(module)]
    configs: dict[int, Any] = {id(module.config): module.config for module in experts if of_interface(module)}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    own = [module for module in experts if not of_interface(module)]
    taps = dict(_taps)
    if configs:
        _register()
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        if tap is not None:
            _taps.update({id(module): tap for module in experts})
        for module in own:
            module.forward = _BoundForward(module)
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        _taps.clear()
        _taps.update(taps)
        for module in own:
            del module.forward


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)


def _experts(module: Any, hidden__nh: torch.Tensor, index__nk: torch.Tensor, weights__nk: torch.Tensor) -> torch.Tensor:
    """What transformers' ``grouped_mm_experts_forward`` computes, on one device that has all experts."""
    n, k = index__nk.shape
    expert__s, order__s = index__nk.reshape(-1).sort(stable=True)
    routing = Routing(order__s // k, expert__s, n, module.num_experts)
    rows = hidden__nh[routing.token__s]
    if module.has_gate:
        rows = module._apply_gate(_product(module, "gate_up_proj", rows, routing))
    else:
        rows = module.act_fn(_product(module, "up_proj", rows, routing))
    rows = _product(module, "down_proj", rows, routing)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    rows = rows * weights__nk.reshape(-1)[order__s].unsqueeze(-1)
    back__s = torch.empty_like(order__s)
    back__s[order__s] = torch.arange(n * k, device=order__s.device)
    return rows[back__s].view(n, k, -1).sum(dim=1).to(hidden__nh.dtype)


def _product(module: Any, name: str, rows__si: torch.Tensor, routing: Routing) -> torch.Tensor:
    weight = getattr(module, name)
    rows__si = rows__si.to(weight.dtype)
    matrices = weight if module.is_transposed else weight.mT
    if isinstance(rows__si, FakeTensor) or rows__si.is_meta:  # as many FLOPs, and as much is kept, for any routing
        out__so = rows__si @ matrices[0]
    else:
        counts = torch.bincount(routing.expert__s, minlength=routing.n_experts).tolist()
        each = zip(rows__si.split(counts), matrices, strict=True)
        out__so = torch.cat([rows @ matrix for rows, matrix in each if len(rows)])
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    if bias is not None:
        out__so = out__so + bias[routing.expert__s]
    return _seen(module, name, rows__si, out__so, routing)


def _seen(module: Any, name: str, rows: torch.Tensor, out: torch.Tensor, routing: Routing) -> torch.Tensor:
    tap = _taps.get(id(module))
    return out if tap is None else tap(module, name, rows, out, routing)


class _BoundForward:
    """Llama 4's forward pass of an experts module, whose inputs are all tokens for each expert, 0 where not routed."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        module = self.module
        rows__esi = hidden_states.view(module.gate_up_proj.shape[0], -1, module.hidden_size)
        n_experts, n = rows__esi.shape[:2]
        token = torch.arange(n, device=hidden_states.device)
        routing = Routing(
            token.repeat(n_experts), torch.arange(n_experts, device=token.device).repeat_interleave(n), n, n_experts,
            hidden_states.detach().ne(0).any(dim=-1).flatten(),
        )  # fmt: skip
        out__eso = torch.bmm(rows__esi, module.gate_up_proj)
        out = _seen(module, "gate_up_proj", hidden_states.view(-1, module.hidden_size), out__eso.flatten(0, 1), routing)
        gate, up = out.view_as(out__eso).chunk(2, dim=-1)
        inner = up * module.act_fn(gate)
        last = torch.bmm(inner, module.down_proj).view(-1, module.hidden_size)
        return _seen(module, "down_proj", inner.flatten(0, 1), last, routing)
