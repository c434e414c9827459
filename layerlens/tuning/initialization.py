"""LoRA's first A from data: principal components of a layer's inputs, or singular vectors of its mean gradient.

Both keep B = 0, so step 0 changes no logit, and both give A orthonormal rows.

- ``pca``: the directions in which the layer's inputs vary most (EVA, Paischer et al. 2024, arXiv:2410.07170).
- ``gradient_svd``: the right singular vectors of the mean gradient G of the loss. The first step then moves W along
  G·Aᵀ·A, the best rank-r approximation of G (Eckart-Young), which is what LoRA-GA (Wang et al. 2024, arXiv:2407.05000)
  wants. LoRA-GA starts B away from zero too and subtracts the difference from W; with B = 0 no base weight changes, and
  stock PEFT loads the adapter onto the base model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.exceptions import ManifestError
from layerlens.integrations.experts import stack_at
from layerlens.integrations.gradients import CalibrationBatch, layer_moments
from layerlens.integrations.peft import BASE_PREFIX, default_factor, is_embedding, lora_shape, why_not_adaptable
from layerlens.integrations.torch_modules import find_module
from layerlens.models import Choice, Manifest, Option, choice_of
from layerlens.storage import local_file
from layerlens.utils.atomic import settle

if TYPE_CHECKING:
    import torch

    from layerlens.tasks import Batch, Loss

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MATRIX_BYTES = 2**30
"""Covariances or gradients held at one time; layers beyond that wait for another pass over the batches."""
RANK_TOLERANCE = 1e-6  # of the largest singular value; directions below it are rounding, not data


def initial_factors(
    model: torch.nn.Module, given: Choice | Manifest, batches: Sequence[CalibrationBatch]
) -> dict[str, torch.Tensor]:
    """A of every LoRA layer as ``lora.initialization`` says, measured on ``batches``.

    Args:
        model: the base model, without LoRA; it is left as it was.
        given: a choice, or the manifest that has it: its LoRA layers and their ranks.
        batches: gone through once, or several times where all matrices together are too large for memory.

    Returns:
        float32 [r, n_in] with orthonormal rows, by layer; empty for the default initialisation, and none for stacked
        experts and embeddings, which begin from PEFT's own. Directions that the
        data leaves open (a rank above that of the matrix) are filled from the default initialisation, made orthogonal.

    Raises:
        ManifestError: no batches, a layer that no batch reached, no loss where gradients are needed, or values that are
            not finite.
    """
    choice = choice_of(given)
    kind = choice.lora.initialization
    if kind == "default":
        return {}
    if not batches:
        raise ManifestError(f"lora.initialization: {kind!r} needs at least one batch to measure on")
    factors = {}
    multiplied = [row for row in choice.lora_options if stack_at(model, row.layer) is None]
    single = [row for row in multiplied if not is_embedding(find_module(model, row.layer))]
    for rows in _groups(model, single, kind):
        names, pca = [row.layer for row in rows], kind == "pca"
        measured = layer_moments(model, names, batches, covariances=pca, gradients=not pca)
        for row in rows:
            matrix = measured[row.layer].covariance if pca else measured[row.layer].gradient
            assert matrix is not None
            if not bool(matrix.isfinite().all()):
                raise ManifestError(f"{row.layer}: the matrix of lora.initialization {kind!r} is not finite")
            directions = _eigenvectors(matrix, row.rank) if pca else _right_vectors(matrix, row.rank)
            factors[row.layer] = _complete(directions, default_factor(row, matrix.shape[1], choice.seed))
    return factors


def measured_factors(
    model: torch.nn.Module, choice: Choice, batches: Sequence[Batch], loss: Loss, fit_head: Callable[[], None]
) -> dict[str, torch.Tensor] | None:
    """A of every LoRA layer by name; None where LoRA begins from PEFT's own.

    Args:
        model: the base model.
        choice: what was chosen.
        batches: the calibration batches.
        loss: loss of every sample.
        fit_head: fits a new task head; called where gradients are needed, since those through a random head say
            nothing.
    """
    if not choice.lora.is_measured or not choice.lora_options:
        return None
    if choice.lora.initialization == "gradient_svd":
        fit_head()

    def with_loss(batch: Batch) -> CalibrationBatch:
        return CalibrationBatch(batch.inputs, lambda output: loss(output, batch).sum())

    return initial_factors(model, choice, [with_loss(batch) for batch in batches])


def beginnings_unmeasured(model: torch.nn.Module, choice: Choice) -> str:
    """That some LoRA layers begin from PEFT's own A although a measured one is asked for; "" where none does."""
    if not choice.lora.is_measured:
        return ""
    stacks = [row.layer for row in choice.lora_options if stack_at(model, row.layer) is not None]
    if not stacks:
        return ""
    return (
        f"lora.initialization: {choice.lora.initialization} is measured for layers with one matrix each; LoRA on "
        f"{len(stacks)} stacked experts ({stacks[0]} ...) starts from PEFT's own A"
    )


def read_factors(peft_directory: Path, given: Choice | Manifest) -> dict[str, torch.Tensor]:
    """A of every LoRA layer as the exported adapter has it; empty where the initialisation needs none.

    Raises:
        ManifestError: there is no such file, or it lacks a layer.
    """
    from safetensors import SafetensorError, safe_open

    choice = choice_of(given)
    kind = choice.lora.initialization
    if kind == "default" or not choice.lora_options:
        return {}
    path = local_file(peft_directory) / ADAPTER_WEIGHTS
    settle(path.parent)
    try:
        with safe_open(path, framework="pt") as file:
            keys = {row.layer: f"{BASE_PREFIX}{row.layer}.lora_A.weight" for row in choice.lora_options}
            there = set(file.keys())  # stacked experts and embeddings begin from PEFT's own and have other names
            return {layer: file.get_tensor(key).flatten(1) for layer, key in keys.items() if key in there}
    except (SafetensorError, OSError) as error:
        raise ManifestError(
            f"lora.initialization: {kind!r} starts from factors that the run measured and wrote to {path}, which "
            f"cannot be read ({error}); keep the peft directory beside the manifest, or run again"
        ) from error


def _groups(model: torch.nn.Module, rows: Sequence[Option], kind: str) -> Iterator[list[Option]]:
    """Rows whose matrices together fit into ``MATRIX_BYTES``, at least one at a time."""
    group: list[Option] = []
    held = 0
    for row in rows:
        module = find_module(model, row.layer)
        if reason := why_not_adaptable(row.layer, module):
            raise ManifestError(f"{row.layer}: {reason}")
        n_in, n_out, groups = lora_shape(module)
        if groups > 1:
            raise ManifestError(
                f"{row.layer}: lora.initialization: {kind!r} is not available for a convolution of {groups} groups; "
                "choose default"
            )
        size = 4 * n_in * (n_in if kind == "pca" else n_out)
        if group and held + size > MATRIX_BYTES:
            yield group
            group, held = [], 0
        group.append(row)
        held += size
    if group:
        yield group


def _eigenvectors(covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """[≤ rank, n] eigenvectors of the largest eigenvalues, largest first."""
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    kept = values.flip(0)[:rank] > RANK_TOLERANCE**2 * values[-1].clamp(min=0)
    return vectors.flip(1)[:, :rank].T[kept]


def _right_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """[≤ rank, n_in] right singular vectors, from the Gram matrix of the smaller side in float64."""
    n_out, n_in = matrix.shape
    if n_in <= n_out:
        return _eigenvectors(matrix.T @ matrix, rank)
    rows = _eigenvectors(matrix @ matrix.T, rank) @ matrix
    return rows / rows.norm(dim=1, keepdim=True)


def _complete(directions: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows: ``directions``, signs fixed, then what ``default`` has beside them.

    A rank above n_in cannot be orthonormal; the rows beyond keep their default values.
    """
    import torch

    default = default.to(directions)
    rank, n_in = default.shape
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()  # eigenvectors have no sign of their own
    missing = min(rank, n_in) - len(directions)
    q, r = torch.linalg.qr(torch.cat([directions, default[:missing]]).T)
    rows = (q * r.diagonal().sign()).T
    return torch.cat([rows, default[len(rows) :]]).float().cpu().contiguous()
