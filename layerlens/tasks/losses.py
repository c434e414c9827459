"""The loss of every sample by itself, whatever reduction the model's own loss has.

A loss takes the model's output and the batch and returns float [b]. A sample's loss over tokens is the sum over its own
tokens: divided by a number of tokens that depends on the batch, as the models' own losses are, it would change with the
samples that happen to be in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelSpecError, ProfilingError
from layerlens.tasks.batches import Batch

if TYPE_CHECKING:
    import torch

Loss = Callable[[Any, Batch], "torch.Tensor"]
IGNORED = -100
"""Label of a token that has no loss, as in transformers."""


@dataclass(frozen=True)
class BatchLoss:
    """A loss of a whole batch, which nothing divides by samples: a trainer's own, or one that compares samples.

    What is measured with it is measured by batches: a batch counts as one, and has one number in ``Batch.index``.

    Args:
        of_model: (model, batch) -> the loss, a scalar; the batch's inputs are what it reads, whatever that is.
        name: what it is called in messages.
        of_samples: whether each of its batches is one sample, so that what is measured by batches is by samples.
    """

    of_model: Callable[[torch.nn.Module, Batch], torch.Tensor]
    name: str = "the loss"
    of_samples: bool = False

    def checked(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a batch, [1].

        Raises:
            ProfilingError: what came back is not a number.
        """
        import torch

        loss = self.of_model(model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = f"a tensor {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ProfilingError(f"{self.name} must be one number for a batch, got {got}")
        return loss.reshape(1)


def classification_loss(output: Any, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each sample's class; logits [b, classes], labels int64 [b]."""
    import torch

    return torch.nn.functional.cross_entropy(
        logits_of(output), batch.labels, reduction="none", label_smoothing=label_smoothing
    )


def regression_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Squared error of each sample, summed over targets; logits [b, targets], labels float [b] or [b, targets]."""
    logits = logits_of(output)
    return (logits - batch.labels.reshape(len(logits), -1).to(logits.dtype)).square().sum(dim=1)


def token_loss(output: Any, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy summed over each sample's labelled tokens; logits [b, t, classes], labels int64 [b, t].

    For token classification, masked language models and sequence-to-sequence models. Samples without a labelled token
    have loss 0.
    """
    import torch

    logits__btc = logits_of(output)
    losses__bt = torch.nn.functional.cross_entropy(
        logits__btc.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return losses__bt.view(logits__btc.shape[:2]).sum(dim=1)


def causal_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each next token, summed over the sample; logits [b, t, vocabulary], labels int64 [b, t]."""
    import torch

    logits__btc, next__bt = logits_of(output)[:, :-1], batch.labels[:, 1:]
    losses__bt = torch.nn.functional.cross_entropy(
        logits__btc.flatten(0, 1), next__bt.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses__bt.view(next__bt.shape).sum(dim=1)


def span_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Mean of the cross-entropies of an answer's first and last token; logits [b, t, 2], labels int64 [b, 2].

    No answer begins or ends in padding: the models' own losses count it in, and change with the longest of the batch.
    """
    import torch

    logits__bts = logits_of(output)
    if "attention_mask" in batch.inputs:
        logits__bts = logits__bts.masked_fill(batch.mask[..., None] == 0, float("-inf"))
    losses__bs = torch.nn.functional.cross_entropy(logits__bts, batch.labels, reduction="none")
    return losses__bs.mean(dim=1)


def own_loss(function: Callable[[Any, Any], torch.Tensor], name: str) -> Loss:
    """The user's (output, targets) -> losses as a task's loss, checked.

    Raises:
        ProfilingError: when called: what came back is not one loss for each sample.
    """

    def loss(output: Any, batch: Batch) -> torch.Tensor:
        import torch

        losses__b = function(output, batch.labels)
        n = len(batch.index)
        if not isinstance(losses__b, torch.Tensor) or losses__b.shape != (n,):
            got = list(losses__b.shape) if isinstance(losses__b, torch.Tensor) else type(losses__b).__name__
            raise ProfilingError(
                f"model.loss: {name} must return the loss of each sample, a tensor [{n}], got {got}; do not reduce "
                "over the batch (reduction='none')"
            )
        return losses__b

    return loss


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model's output, or the output where it is a tensor itself; half precision as float32.

    Those of an answer's first and last token as [b, t, 2]. Of a model of a user's own also what stands under ``logits``
    or ``out`` in a mapping, or first in a tuple.

    Raises:
        ModelSpecError: the output has none.
    """
    import torch

    if isinstance(output, torch.Tensor):
        logits = output
    elif hasattr(output, "start_logits"):
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
    elif hasattr(output, "logits"):
        logits = output.logits
    else:
        logits = _named_logits(output)
        if not isinstance(logits, torch.Tensor):
            keys = f" of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
            raise ModelSpecError(
                f"model: its output is a {type(output).__name__}{keys}; return the scores as a tensor, as `.logits`, "
                "under 'logits' in a mapping, or first in a tuple; for other outputs, use the task custom with your "
                "own loss"
            )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _named_logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next((output[name] for name in ("logits", "out") if name in output), None)
    return output[0] if isinstance(output, (list, tuple)) and output else None


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The logits, or every floating-point tensor of an output without any (a mapping or sequence of tensors)."""
    import torch

    if hasattr(output, "logits") or hasattr(output, "start_logits"):
        return [logits_of(output)]
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in output_tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in output_tensors(value)]
    return []
