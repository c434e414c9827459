"""Classes of a detector of ultralytics: its head for those of the data, as ultralytics makes it before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layerlens.exceptions import ModelSpecError

BRANCHES = ("cv3", "one2one_cv3")
"""The parts of a head that score classes; the second of models that need no suppression of boxes."""


def is_detector(model: Any) -> bool:
    """Whether it is a model of ultralytics that finds boxes."""
    return any(
        kind.__module__ == "ultralytics.nn.tasks" and kind.__name__ == "DetectionModel" for kind in type(model).mro()
    )


def knows(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether a detector with ``names`` has all of ``classes``, without regard to case."""
    return {_spelled(name) for name in classes} <= {_spelled(name) for name in names}


def take_classes(module: Any, classes: Sequence[str], seed: int) -> tuple[str, ...]:
    """Give the detector an output for each of ``classes`` in place of its own; names of the parameters that are new.

    The last convolution of each class branch is replaced, and everything else stays. A class that the detector knows
    keeps its weights; the others are drawn from ``seed``, with the biases that ultralytics starts training with.

    Args:
        module: ultralytics' DetectionModel; it is changed.
        classes: in the order of the outputs.

    Raises:
        ModelSpecError: its head is of another kind (open vocabularies, RT-DETR), or its layers are fused.
    """
    import torch
    from ultralytics.nn.modules import head as heads

    head = module.model[-1]
    if not isinstance(head, heads.Detect) or isinstance(head, (heads.WorldDetect, heads.YOLOEDetect)):
        raise ModelSpecError(
            f"model.name_or_path: the detector does not know the classes {', '.join(classes)}, and a head of the kind "
            f"{type(head).__name__} cannot be given other classes here; give a YOLO detector, or data with its classes "
            f"({', '.join(map(str, module.names.values()))})"
        )
    own = {_spelled(str(name)): place for place, name in module.names.items()}
    rows = [own.get(_spelled(name)) for name in classes]
    new = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for branch in BRANCHES:
            for level, layers in enumerate(getattr(head, branch, None) or ()):
                old = layers[-1]
                layers[-1] = _widened(old, rows, _prior(len(classes), float(head.stride[level])))
                new += [
                    f"model.{len(module.model) - 1}.{branch}.{level}.{len(layers) - 1}.{x}" for x in ("weight", "bias")
                ]
    head.nc, head.no = len(classes), len(classes) + 4 * head.reg_max
    module.nc, module.names = len(classes), dict(enumerate(classes))
    if isinstance(getattr(module, "yaml", None), dict):
        module.yaml["nc"] = len(classes)
    module.__dict__.pop("criterion", None)
    return tuple(new)


def _widened(old: Any, rows: Sequence[int | None], prior: float) -> Any:
    """A convolution with an output for each of ``rows``: the old one's row, or a new one."""
    import torch

    fresh: Any = torch.nn.Conv2d(old.in_channels, len(rows), old.kernel_size).to(old.weight)
    with torch.no_grad():
        fresh.bias.fill_(prior)
        for place, row in enumerate(rows):
            if row is not None:
                fresh.weight[place], fresh.bias[place] = old.weight[row], old.bias[row]
    return fresh.requires_grad_(False).train(old.training)


def _prior(n_classes: int, stride: float) -> float:
    """The bias of a class that few of the places in an image are of (ultralytics' ``Detect.bias_init``)."""
    return math.log(5 / n_classes / (640 / stride) ** 2)


def _spelled(name: str) -> str:
    return name.strip().casefold()
