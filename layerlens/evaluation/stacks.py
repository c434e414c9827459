"""Several fine-tunes of one frozen model at once: the arms' batches are stacked, each with LoRA or AdaLoRA of its own.

Frozen layers are applied to all arms' samples in one product. A layer that some arms adapt adds ``(alpha/r)·B_k A_k h``
to the rows of those arms k. Nothing is shared between arms: the loss is a sum over them, so every gradient is the one
of the arm alone, and Adam is element-wise. Ranks below the largest of a layer are padded with zeros, whose gradients
are zero (A's is a product with B, B's one with A), so padding stays zero.

Axes: k arms, t rows (samples × tokens) of an arm, i inputs, o outputs, r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from layerlens.integrations.torch_modules import first_input
from layerlens.rank_rules.adalora import ORTHOGONALITY, SMOOTHING, Schedule
from layerlens.tuning.baselines.measured import weight_matrix

INITIAL_DEVIATION = 0.02
"""Of AdaLoRA's first A and B, as PEFT draws them."""


@dataclass(frozen=True)
class Arm:
    """One fine-tune.

    Args:
        ranks: layer -> LoRA rank, of the layers that have one.
        seed: of adapters and data order.
        learning_rate: peak, of the adapters.
        inits: layer -> A, float [rank, n_in], where it is not drawn.
    """

    ranks: Mapping[str, int]
    seed: int
    learning_rate: float
    inits: Mapping[str, torch.Tensor] = field(default_factory=dict)


def drawn_a(seed: int, layer: str, rank: int, n_in: int) -> torch.Tensor:
    """PEFT's initial A: uniform in ±1/√n_in, float [rank, n_in]. It depends on seed and layer alone, and a smaller rank
    has the first rows of a larger one, so that arms are paired.
    """
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (2 * torch.rand(rank, n_in, generator=generator) - 1) / n_in**0.5


class LayerStack:
    """The adapters of one layer: ``arms`` int64 [k'] have one, A [k', i, r] and B [k', r, o]."""

    def __init__(self, name: str, module: Any, arms: Sequence[Arm]) -> None:
        self.name = name
        self.n_arms = len(arms)
        n_out, n_in = weight_matrix(module).shape
        having = [index for index, arm in enumerate(arms) if arm.ranks.get(name, 0)]
        self.arms = torch.tensor(having)
        largest = max(arms[index].ranks[name] for index in having)
        self.a = torch.zeros(len(having), n_in, largest)
        self.b = torch.zeros(len(having), largest, n_out)
        for position, index in enumerate(having):
            arm, rank = arms[index], arms[index].ranks[name]
            initial = arm.inits.get(name)
            drawn = drawn_a(arm.seed, name, rank, n_in) if initial is None else initial
            self.a[position, :, :rank] = drawn.T
        self.a.requires_grad_(True)
        self.b.requires_grad_(True)

    def parameters(self) -> list[torch.Tensor]:
        """What is trained, each with its arms first."""
        return [self.a, self.b]

    def add_to(self, output: torch.Tensor, h: torch.Tensor, scale: float) -> torch.Tensor:
        """``output`` [k·b, ..., o] with every arm's update of its rows."""
        h__kti = h.reshape(self.n_arms, -1, h.shape[-1])
        out__kto = output.reshape(self.n_arms, -1, output.shape[-1])
        if len(self.arms) == self.n_arms:
            added = torch.baddbmm(out__kto, self.inner(h__kti), self.b, alpha=scale)
        else:
            update = scale * torch.bmm(self.inner(h__kti[self.arms]), self.b)
            added = out__kto.index_add(0, self.arms, update)
        return added.view(output.shape)

    def inner(self, h__kti: torch.Tensor) -> torch.Tensor:
        """A h, [k', t, r]."""
        return torch.bmm(h__kti, self.a)


class HeadStack:
    """One copy of a Linear of the task head for every arm, starting from the model's own."""

    def __init__(self, module: Any, n_arms: int) -> None:
        self.weight = module.weight.detach().expand(n_arms, -1, -1).clone().requires_grad_(True)
        bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()
        self.bias = bias.expand(n_arms, -1).clone().requires_grad_(module.bias is not None)

    def parameters(self) -> list[torch.Tensor]:
        """What is trained: a head without a bias gets none."""
        return [self.weight, self.bias] if self.bias.requires_grad else [self.weight]

    def apply(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [k·b, ..., c] of the head's inputs [k·b, ..., i]."""
        h__kti = h.reshape(len(self.weight), -1, h.shape[-1])
        return torch.baddbmm(self.bias[:, None], h__kti, self.weight.mT).view(*h.shape[:-1], -1)


class LoraStack:
    """The adapters and heads of all arms on one model, whose modules are hooked while ``attached``."""

    def __init__(
        self,
        model: torch.nn.Module,
        arms: Sequence[Arm],
        *,
        scale: float,
        heads: Sequence[str] = (),
        layer_stack: Callable[[str, Any, Sequence[Arm]], Any] = LayerStack,
    ) -> None:
        self.model = model
        self.scale = scale
        names = [name for name, _ in model.named_modules() if any(arm.ranks.get(name, 0) for arm in arms)]
        self.layers = [layer_stack(name, model.get_submodule(name), arms) for name in names]
        self.heads = {name: HeadStack(model.get_submodule(name), len(arms)) for name in heads}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model's forward pass is that of the arms on stacked batches."""
        with ExitStack() as stack:
            for layer in self.layers:
                module = self.model.get_submodule(layer.name)
                stack.callback(module.register_forward_hook(self._layer_hook(layer), with_kwargs=True).remove)
            for name, head in self.heads.items():
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_hook(self._head_hook(head), with_kwargs=True).remove)
            yield

    def _head_hook(self, head: HeadStack) -> Callable[..., torch.Tensor]:
        return lambda module, args, kwargs, output: head.apply(first_input(args, kwargs))

    def _layer_hook(self, layer: Any) -> Callable[..., torch.Tensor]:
        return lambda module, args, kwargs, output: layer.add_to(output, first_input(args, kwargs), self.scale)


class TripletStack(LayerStack):
    """AdaLoRA's triplets λ_i b_i a_iᵀ of one layer, [k, r] of them; every arm adapts every layer."""

    def __init__(self, name: str, module: Any, arms: Sequence[Arm]) -> None:
        super().__init__(name, module, arms)
        if len(self.arms) != len(arms):
            raise ValueError("AdaLoRA starts with rank in every layer")
        k, n_in, rank = self.a.shape
        self.cost = n_in + self.b.shape[2]
        with torch.no_grad():
            for position, arm in enumerate(arms):
                generator = torch.Generator().manual_seed(arm.seed * 1_000_003 + len(name) + n_in)
                self.a[position] = INITIAL_DEVIATION * torch.randn(n_in, rank, generator=generator)
                self.b[position] = INITIAL_DEVIATION * torch.randn(rank, self.b.shape[2], generator=generator)
        self.values = torch.zeros(k, rank, requires_grad=True)
        self.mask = torch.ones(k, rank)
        self.settled = False
        """Whether importances stay as they are: what is left is only trained."""
        self._smoothed = [torch.zeros_like(parameter) for parameter in self.parameters()]
        self._uncertain = [torch.zeros_like(parameter) for parameter in self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        """Triplets' three parts; only a and b before ``values`` is made."""
        return [self.a, self.b, *([self.values] if hasattr(self, "values") else [])]

    def inner(self, h__kti: torch.Tensor) -> torch.Tensor:
        """λ A h, [k, t, r]."""
        return torch.bmm(h__kti, self.a) * self.values[:, None]

    def penalty(self) -> torch.Tensor:
        """The orthogonality loss, summed over arms."""
        eye = torch.eye(self.a.shape[2])
        of_a, of_b = self.a.mT @ self.a - eye, self.b @ self.b.mT - eye
        return ORTHOGONALITY * (of_a.square().sum() + of_b.square().sum())

    @torch.no_grad()
    def after_backward(self) -> None:
        """Smooth the sensitivities of this step's gradients."""
        if self.settled:
            return
        for parameter, smoothed, uncertain in zip(self.parameters(), self._smoothed, self._uncertain, strict=True):
            assert parameter.grad is not None
            sensitivity = (parameter * parameter.grad).abs()
            smoothed.lerp_(sensitivity, 1.0 - SMOOTHING)
            uncertain.lerp_((sensitivity - smoothed).abs(), 1.0 - SMOOTHING)

    def importance(self) -> torch.Tensor:
        """[k, r]."""
        of_a, of_b, of_values = (s * u for s, u in zip(self._smoothed, self._uncertain, strict=True))
        return of_values + of_a.mean(dim=1) + of_b.mean(dim=2)


class AdaLora:
    """Makes the layers' triplets and keeps the budget that ``layerlens.rank_rules.adalora`` schedules.

    The paper counts ranks. Arms are compared at equal parameters, so here the budget is one of parameters.

    Args:
        budget: trainable parameters at the end, λ not counted.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def __call__(self, name: str, module: Any, arms: Sequence[Arm]) -> TripletStack:
        return TripletStack(name, module, arms)

    @torch.no_grad()
    def after_step(self, layers: Sequence[TripletStack], step: int, steps: int) -> None:
        """Set λ to 0 where triplets are beyond the budget after ``step``, counted from 0; they can come back while it
        falls.
        """  # fmt: skip
        law = Schedule(steps)
        for layer in layers:
            layer.settled = law.share(step + 2) == 0.0
        share = law.share(step + 1)
        if share is None:
            return
        everything = sum(layer.cost * layer.mask.shape[1] for layer in layers)
        allowed = self.budget + (everything - self.budget) * share
        importance = torch.cat([layer.importance() for layer in layers], dim=1)
        costs = torch.cat([torch.full((layer.mask.shape[1],), float(layer.cost)) for layer in layers])
        order = importance.argsort(dim=1, descending=True)
        within = torch.zeros_like(importance)
        within.scatter_(1, order, (costs[order].cumsum(dim=1) <= allowed).float())
        for layer, mask in zip(layers, within.split([layer.mask.shape[1] for layer in layers], dim=1), strict=True):
            layer.mask = mask
            layer.values *= mask
