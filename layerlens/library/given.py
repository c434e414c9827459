"""Turns the objects of a program into what a job measures: the module, its task, and batches with their loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerlens.exceptions import DataError, ModelSpecError
from layerlens.integrations.placement import offloaded
from layerlens.integrations.torch_modules import in_evaluation_mode
from layerlens.integrations.weight_matrices import uncompiled
from layerlens.library.decoder import with_decoder
from layerlens.models.facts import IN_MEMORY
from layerlens.registry import TASKS
from layerlens.tasks import Batch, Task
from layerlens.tasks.guess import task_of_class
from layerlens.tasks.losses import BatchLoss, Loss, logits_of, own_loss

TARGETS = ("labels", "label", "targets", "target", "y")
"""Keys under which a batch that is a mapping has its targets."""
SAME = 1e-3
"""Relative difference of two means of one loss that is taken for rounding; half precision has 2⁻⁸ for each value."""
CUSTOM = "custom"

AnyLoss = Loss | BatchLoss
RawBatch = Any
"""A batch as a data loader gives it: a mapping, (inputs, targets), or a tensor."""


@dataclass(frozen=True)
class GivenLoss:
    """The loss that LayerLens measures.

    Args:
        loss: the loss of each sample, or of whole batches.
        said: description of the loss, for the user.
    """

    loss: AnyLoss
    said: str

    @property
    def loss_name(self) -> str:
        """Name of the loss in messages."""
        return self.loss.name if isinstance(self.loss, BatchLoss) else self.said

    @property
    def by_batches(self) -> bool:
        """Whether the loss is one number for a batch."""
        return isinstance(self.loss, BatchLoss)


def bare_model(model: Any) -> torch.nn.Module:
    """The module that holds the layers, without the wrappers of compilation and data parallelism.

    Raises:
        ModelSpecError: ``model`` is not a module, has adapters already, or is sharded by a wrapper that hides its
            layers.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelSpecError(
            "model: must be a torch.nn.Module, a trainer, or the name or directory of a model, got "
            f"{type(model).__name__}"
        )
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel):
        model = model.module
    model = uncompiled(model)
    kind = type(model)
    if kind.__name__ == "FullyShardedDataParallel":
        raise ModelSpecError(
            "model: is wrapped by FSDP, which hides its layers; plan before wrapping it, or use torchrun with "
            "`layerlens run` and distributed.sharding: fsdp"
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapters = ", ".join(map(repr, model.peft_config))
        raise ModelSpecError(
            f"model: holds the PEFT adapters {adapters} already, and measuring would include them; give the base model "
            "(model.unload(), or the one from before get_peft_model)"
        )
    injected = [name for name, one in model.named_modules() if hasattr(one, "base_layer") and hasattr(one, "r")]
    if injected:
        raise ModelSpecError(
            f"model: has adapters inside already ({injected[0]}), and measuring would include them; give the base model"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and not offloaded(model):
        raise ModelSpecError("model: has weights on the meta device, which hold no values; load its weights first")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelSpecError(
            "model: was made inside torch.inference_mode, so its weights take no gradients; make or load it outside"
        )
    return model


def reference_of(model: Any) -> str:
    """The name of the model in a manifest: the place where transformers loaded it from, else ``object:CLASS``."""
    name = getattr(model, "name_or_path", "") if hasattr(model, "config") else ""
    return name if isinstance(name, str) and name else f"{IN_MEMORY}{type(model).__module__}.{type(model).__qualname__}"


def dtype_of(model: torch.nn.Module) -> str:
    """The precision that most of the weights with a point have; float32 for one that manifests have no word for."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    name = str(most).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def task_of_model(model: torch.nn.Module, wanted: str | None) -> tuple[Task | None, str]:
    """The named task, or the task of the head that the model's class has, and the reason.

    Raises:
        ConfigurationError: there is no task of this name.
    """
    if wanted is not None:
        if wanted not in TASKS:
            raise TASKS.unknown(wanted)
        return TASKS[wanted], "given"
    name = type(model).__name__
    found = task_of_class(name) if hasattr(model, "config") else None
    config: Any = getattr(model, "config", None)
    if found == "sequence-classification" and getattr(config, "num_labels", 2) == 1:
        return TASKS["regression"], f"the model is a {name} with one output"
    return (TASKS[found], f"the model is a {name}") if found else (None, "")


def as_batch(model: torch.nn.Module, raw: RawBatch, first: int, device: torch.device) -> Batch:
    """A data loader's batch, with inputs by the model's arguments and ``first`` as the number of its first sample.

    Raises:
        DataError: the batch has no tensors.
    """
    inputs, labels = _apart(raw, model)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise DataError(
            f"data: a batch is a {type(raw).__name__} without tensors; give batches (a mapping of the model's "
            "arguments with the targets under 'labels', or (inputs, targets)), or rows with a tokenizer or a collator"
        )
    n = max(1, len(next(iter(tensors.values()))) if next(iter(tensors.values())).dim() else 1)
    tensors, labels = with_decoder(model, {name: _for_gradients(one) for name, one in tensors.items()}, labels)
    return Batch(tensors, _for_gradients(labels), torch.arange(first, first + n)).to(device)


def _for_gradients(value: Any) -> Any:
    """A copy of a tensor made in ``torch.inference_mode``, which no backward pass takes; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def untaken(model: torch.nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that the model's ``forward`` does not accept."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) and not hasattr(model, "config"):
        return []
    known = {parameter.name for parameter in parameters}
    return [name for name in inputs if name not in known]


def _apart(raw: RawBatch, model: torch.nn.Module) -> tuple[dict[str, Any], Any]:
    """(inputs by argument, targets) of a batch."""
    if isinstance(raw, Mapping) or hasattr(raw, "keys"):
        inputs = {str(name): raw[name] for name in list(raw.keys())}
        target = next((name for name in TARGETS if name in inputs), None)
        return inputs, None if target is None else inputs.pop(target)
    parts = list(raw) if isinstance(raw, (tuple, list)) else [raw, None]
    if len(parts) == 1:
        parts.append(None)
    *given, labels = parts
    if len(given) == 1 and isinstance(given[0], Mapping):
        return dict(given[0]), labels
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = list(given[0])
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, given, strict=False)), labels


def loss_for(
    model: torch.nn.Module, batch: Batch, task: Task | None, own: Callable[..., Any] | None, said: str
) -> GivenLoss:
    """The loss of a program's batches: the user's own, that of the task, or that of the model.

    Args:
        model: the model, in evaluation mode.
        batch: the first batch.
        task: the task, if it is known.
        own: (output, targets) -> the loss of each sample, [b], or one number for the batch.
        said: the reason for the task.

    Raises:
        DataError: there is no loss, or the user's own loss fails.
    """
    if own is not None:
        return _own(model, batch, own)
    with torch.no_grad():
        by_model, failure = _models_loss(model, batch)
        if task is not None and batch.labels is not None:
            output = _output(model, batch)
            single = _of_samples(task, output, batch)
            if single is not None and (by_model is None or _agree(single, by_model, batch, task)):
                return GivenLoss(task.loss, f"of each sample, as for {task.name} ({said})")
    if by_model is not None:
        loss = BatchLoss(lambda model, batch: model(**with_targets(model, batch)).loss, "the model's own loss")
        return GivenLoss(loss, "the model's own, for whole batches: it is not the mean of a known per-sample loss")
    guess = _cross_entropy(model, batch)
    if guess is not None:
        return guess
    raise DataError(
        f"data: there is no loss: the model computes none on these batches{failure}, and no loss was given; give "
        "loss=function(output, targets), which returns the loss of each sample, or task= with targets under "
        "'labels'"
    )


def with_targets(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """The inputs with the targets under the model's own argument."""
    return {**batch.inputs, "labels": batch.labels} if batch.labels is not None else dict(batch.inputs)


def _own(model: torch.nn.Module, batch: Batch, own: Callable[..., Any]) -> GivenLoss:
    name = getattr(own, "__qualname__", type(own).__qualname__)
    with torch.no_grad():
        output = _output(model, batch)
        try:
            value = own(output, batch.labels)
        except Exception as error:
            raise DataError(f"loss: {name} fails on the first batch: {type(error).__name__}: {error}") from error
    n = len(batch.index)
    if isinstance(value, torch.Tensor) and value.shape == (n,) and (n > 1 or value.dim() == 1):
        return GivenLoss(own_loss(own, name), f"of each sample, by {name}")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        whole = BatchLoss(lambda model, batch: own(model(**batch.inputs), batch.labels), name)
        return GivenLoss(whole, f"of whole batches, by {name}, which returns one number")
    got = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    raise DataError(f"loss: {name} must return the loss of each sample, a tensor [{n}], or one number, got {got}")


def _output(model: torch.nn.Module, batch: Batch) -> Any:
    try:
        return model(**batch.inputs)
    except Exception as error:
        names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.inputs.items())
        raise DataError(
            f"data: the model fails on the first batch ({names}): {type(error).__name__}: {error}"
        ) from error


def _models_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor | None, str]:
    """The loss that the model itself computes of a batch, None where it does not; and how it failed, if it did."""
    if batch.labels is None or "labels" not in inspect.signature(model.forward).parameters:
        return None, ""
    try:
        loss = getattr(model(**with_targets(model, batch)), "loss", None)
    except Exception as error:  # the targets are not what the model's own loss takes, and a task's loss may take them
        return None, f" (its own fails: {type(error).__name__}: {error})"
    return (loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None), ""


def _of_samples(task: Task, output: Any, batch: Batch) -> torch.Tensor | None:
    """The task's loss of each sample; None where the targets are others."""
    try:
        losses = task.loss(output, batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None
    return losses if losses.shape == batch.index.shape else None


def has_sample_loss(model: torch.nn.Module, task: Task, batch: Batch) -> bool:
    """Whether the task has a loss of each sample for these targets."""
    with torch.no_grad():
        return _of_samples(task, _output(model, batch), batch) is not None


def _agree(single__b: torch.Tensor, whole: torch.Tensor, batch: Batch, task: Task) -> bool:
    """Whether the model's loss is the mean of these, over samples or over labelled tokens."""
    counts = [float(len(single__b))]
    if task.token_labels and isinstance(batch.labels, torch.Tensor):
        labels = batch.labels[:, task.shift :] if task.shift else batch.labels
        counts.append(float((labels != -100).sum()))
    total = float(single__b.double().sum())
    return any(abs(total / count - float(whole)) <= SAME * max(abs(float(whole)), 1e-6) for count in counts if count)


def _cross_entropy(model: torch.nn.Module, batch: Batch) -> GivenLoss | None:
    """Cross-entropy where the model puts out logits [b, classes] and the targets are classes."""
    labels = batch.labels
    if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    with torch.no_grad(), in_evaluation_mode(model):
        output = _output(model, batch)
    if not isinstance(output, torch.Tensor) and not hasattr(output, "logits"):
        return None
    logits = logits_of(output)
    if logits.dim() != 2 or len(logits) != len(labels) or int(labels.max()) >= logits.shape[1]:
        return None
    loss = TASKS["sequence-classification"].loss
    return GivenLoss(
        loss, f"cross-entropy of each sample: the model puts out {list(logits.shape)}, targets are classes"
    )


def example_of(model: torch.nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """The tensors that ``model`` is called with when ``run()`` calls it first, by argument, without targets."""
    seen: list[dict[str, torch.Tensor]] = []

    forward, own = model.forward, vars(model)
    before = own.get("forward")

    def see(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
        flat = {**bound, **bound.pop("kwargs", {})} if isinstance(bound.get("kwargs"), dict) else bound
        seen.append({name: value for name, value in flat.items() if isinstance(value, torch.Tensor)})
        return forward(*args, **kwargs)

    own["forward"] = see  # and no hook: sentence-transformers calls forward itself
    try:
        with torch.no_grad():
            run()
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
    if not seen:
        raise DataError("loss: does not call the model, so nothing can be measured")
    inputs = {name: value for name, value in seen[0].items() if name not in (*TARGETS, "num_items_in_batch")}
    return with_decoder(model, inputs, seen[0].get("labels"))[0]


def in_units(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, each counting as one sample."""
    return [replace(batch, index=torch.tensor([number])) for number, batch in enumerate(batches)]
