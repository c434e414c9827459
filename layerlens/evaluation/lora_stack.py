"""Several fine-tunes of one frozen model at once: the arms' batches are stacked, each with adapters of its own.

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
        n_out, n_in = module.weight.shape
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
    """One copy of the task head for every arm, starting from the model's own."""

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
        head: str | None,
        scale: float,
        layer_stack: Callable[[str, Any, Sequence[Arm]], Any] = LayerStack,
    ) -> None:
        self.model = model
        self.scale = scale
        names = [name for name, _ in model.named_modules() if any(arm.ranks.get(name, 0) for arm in arms)]
        self.layers = [layer_stack(name, model.get_submodule(name), arms) for name in names]
        self.head_name = head
        self.head = HeadStack(model.get_submodule(head), len(arms)) if head else None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model's forward pass is that of the arms on stacked batches."""
        with ExitStack() as stack:
            for layer in self.layers:
                module = self.model.get_submodule(layer.name)
                stack.callback(module.register_forward_hook(self._layer_hook(layer)).remove)
            if self.head is not None:
                head, module = self.head, self.model.get_submodule(str(self.head_name))
                stack.callback(module.register_forward_hook(lambda _, args, __: head.apply(args[0])).remove)
            yield

    def _layer_hook(self, layer: Any) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        return lambda module, args, output: layer.add_to(output, args[0], self.scale)
