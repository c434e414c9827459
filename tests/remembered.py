"""What is the same for every model of one shape is found out once in each process of the tests.

Two questions take a third of the time of a run on a tiny model: what its training step does (recorded on tensors
without data), and which of its layers PEFT refuses (asked of PEFT, on a copy without weights). Neither answer depends
on the numbers in the weights. So hundreds of runs on the same few tiny models ask once for each model. A model with
code of its own, with hooks, or with anything else that this file cannot see is always asked anew. So are the tests of
recording and asking themselves, which import the functions by name, and tests with the fixture ``afresh``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from layerlens.integrations import peft_refusals
from layerlens.profiling import step_record

KNOWN_CODE = ("torch.nn.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils")
KNOWN_FORWARD = ("trl.trainer.", "transformers.models.")
PLAIN = (int, float, bool, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shape_of(model: torch.nn.Module) -> Hashable | None:
    """All that decides what the model does, except for the numbers in its tensors; None where that cannot be seen."""
    seen: dict[int, int] = {}
    told: list[Hashable] = [torch.get_default_dtype()]
    for name, module in model.named_modules():
        kind = type(module)
        if not f"{kind.__module__}.".startswith(KNOWN_CODE) or any(getattr(module, hooks) for hooks in HOOKS):
            return None
        own = vars(module)
        if "forward" in own:
            forward = getattr(own["forward"], "__func__", own["forward"])
            if not getattr(forward, "__module__", "").startswith(KNOWN_FORWARD):
                return None
            told.append(forward.__qualname__)
        told.append((name, kind, module.extra_repr()))
        told.append(tuple((key, value) for key, value in own.items() if isinstance(value, PLAIN)))
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                    return None
                number = seen.setdefault(id(tensor), len(seen))  # one tensor may have several names
                told.append((key, tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device), number))
    config = getattr(model, "config", None)
    told.append(None if config is None else repr(sorted(vars(config).items())))
    return tuple(told)


def _like(tensors: Mapping[str, torch.Tensor]) -> Hashable:
    return tuple((name, tuple(x.shape), x.dtype, str(x.device)) for name, x in tensors.items())


class Remembered:
    """The two functions, which remember."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Any] = {}
        self.asked = self.answered = 0

    def _once(self, key: Hashable | None, find: Callable[[], Any]) -> Any:
        self.asked += 1
        if key is None:
            return find()
        if key in self.known:
            self.answered += 1
        else:
            self.known[key] = find()
        return self.known[key]

    def record_step(self, model: torch.nn.Module, spec: Any, step: Any, **how: Any) -> Any:
        """``profiling.step_record.record_step``."""
        shape = shape_of(model)
        of = getattr(step, "__self__", None)
        way = getattr(step, "__name__", "")
        if shape is None or of is None or of.real or way not in ("_models_own", "_outputs"):
            key = None  # another loss may be anything
        else:
            labels = {} if of.labels is None else {"labels": of.labels}
            task = (of.task.model_targets, of.task.synthetic_labels)
            inputs = (_like(of.inputs), _like(labels))
            key = (shape, repr(spec.layers), way, task, inputs, tuple(sorted(how.items())))
        return self._once(key, lambda: step_record.record_step(model, spec, step, **how))

    def refused_by_peft(self, model: torch.nn.Module, paths: Any) -> dict[str, str]:
        """``integrations.peft_refusals.refused_by_peft``."""
        shape = shape_of(model)
        key = None if shape is None else (shape, tuple(paths))
        return dict(self._once(key, lambda: peft_refusals.refused_by_peft(model, paths)))


PLACES = {
    "layerlens.jobs.recorded_step.record_step": "record_step",
    "layerlens.integrations.layers.refused_by_peft": "refused_by_peft",
}


@contextmanager
def remembering() -> Iterator[Remembered]:
    """While open, the product asks here."""
    remembered = Remembered()
    with pytest.MonkeyPatch.context() as patch:
        for place, name in PLACES.items():
            patch.setattr(place, getattr(remembered, name))
        yield remembered
