"""Run by ``test_head_recipes.py`` in a Python that refuses to import layerlens: what guides say of ``peft/``.

Usage: recipes_without_layerlens.py CASES, a JSON list; prints what it saw of each case as one JSON line.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NoLayerLens:
    """Refuses layerlens, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "layerlens":
            raise ModuleNotFoundError("layerlens is not installed here")


sys.meta_path.insert(0, NoLayerLens())  # type: ignore[arg-type]
try:
    import layerlens  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("layerlens can be imported, so this proves nothing")


def import_torchvision() -> None:
    """PyPI's torchvision beside a CPU torch cannot be imported, and transformers imports it where it is installed."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        NoLayerLens.library = library  # type: ignore[attr-defined]


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    """All outputs of the model in evaluation mode, as one vector."""
    import torch

    with torch.no_grad():
        found = model.eval()(**inputs)
    parts = [found] if isinstance(found, torch.Tensor) else [x for x in found.values() if isinstance(x, torch.Tensor)]
    return torch.cat([part.flatten() for part in parts])


def head_of(model: Any, heads: list[str]) -> dict[str, Any]:
    """The trained copies of the head's parameters."""
    inside = tuple(f"base_model.model.{head}.modules_to_save.default." for head in heads)
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}


def followed(case: dict[str, Any], base_model: Callable[[int], Any]) -> dict[str, Any]:
    """Load, train, save and load again, as the README of ``peft/`` says."""
    import torch
    from peft import PeftModel

    inputs, wanted, directory = torch.load(case["expected"]), torch.load(case["logits"]), case["peft"]
    model = PeftModel.from_pretrained(base_model(1), directory, is_trainable=True)
    delta = (logits(model, inputs) - wanted).abs().max().item()
    head = head_of(model, case["heads"])
    begun = sum(x.detach().double().sum().item() for x in head.values())
    lora = [name for name, x in model.named_parameters() if x.requires_grad and ".lora_" in name]
    others = [name for name, x in model.named_parameters() if x.requires_grad and ".lora_" not in name]
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        found = model.train(case["class"] != "timm")(**inputs)  # no statistics of batches, which PEFT does not save
        values = [found] if isinstance(found, torch.Tensor) else found.values()
        sum((x.float() ** 2).mean() for x in values if isinstance(x, torch.Tensor)).backward()
        optimizer.step()
    trained, wanted = copy.deepcopy({name: x.detach() for name, x in head.items()}), logits(model, inputs)
    model.save_pretrained(case["saved"])
    again = PeftModel.from_pretrained(base_model(2), case["saved"])
    return {
        "kind": case["kind"],
        "step zero": delta,
        "lora": len(lora),
        "others are the head": sorted(others) == sorted(head),
        "begun": begun,
        "trained": sum(x.double().sum().item() for x in trained.values()),
        "again": sum(x.detach().double().sum().item() for x in head_of(again, case["heads"]).values()),
        "after": (logits(again, inputs) - wanted).abs().max().item(),
        "task_type": json.loads((Path(case["saved"]) / "adapter_config.json").read_text())["task_type"],
    }


def loader_of(case: dict[str, Any]) -> Callable[[int], Any]:
    """The base model afresh, its new head drawn from another seed each time."""
    import torch

    def load(seed: int) -> Any:
        torch.manual_seed(seed)
        if case["class"] == "timm":
            import timm

            model = timm.create_model(case["base"], pretrained=False, num_classes=3, **case["more"])
            own = torch.load(case["weights"])
            model.load_state_dict(own, strict=False)
            return model
        import transformers

        return getattr(transformers, case["class"]).from_pretrained(case["base"], **case["more"])

    return load


if __name__ == "__main__":
    import_torchvision()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(followed(one, loader_of(one))))
