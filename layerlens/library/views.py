"""What needs no measurement: the difference of two choices, and the costs of a choice from a model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from layerlens.exceptions import ConfigurationError
from layerlens.jobs.estimate import ALL, Estimate
from layerlens.jobs.estimate import estimate as estimate_costs
from layerlens.jobs.recorded import manifest_at
from layerlens.library.plan import Plan
from layerlens.manifest import read_manifest
from layerlens.manifest.difference import Difference
from layerlens.models import Manifest

Chosen: TypeAlias = Plan | Manifest | str | Path
"""A choice: a plan, a manifest, or the directory or file that has one."""


def diff(a: Chosen, b: Chosen) -> Difference:
    """Compare two choices: layers, parameters, FLOPs, memory, latency, score, model and data.

    Args:
        a: the first choice: a plan, a manifest, or a directory or file that holds one.
        b: the second choice, for the same model or another one.

    Returns:
        the difference, with the fields ``layers``, ``settings`` and ``figures``. It is true if anything differs, and
        prints as tables, in a notebook too.

    Raises:
        ConfigurationError: a directory has no manifest, or an argument is not a choice.
        ManifestError: a manifest cannot be read.

    >>> smaller = layerlens.choose(statistics, max_trainable_params=500)
    >>> found = layerlens.diff(smaller, plan)
    >>> bool(found), found.only_first
    (True, ())
    """
    (first, one), (second, two) = _manifest(a, "first"), _manifest(b, "second")
    return Difference.of(first, second, (one, two))


def estimate(
    given: Chosen,
    *,
    rank: int | None = None,
    targets: Sequence[str] = (ALL,),
    task: str | None = None,
    classes: int | None = None,
    dtype: str = "float32",
    model: str | Path | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str | None = None,
) -> Estimate:
    """Estimate the costs of a choice, or of LoRA with one rank, from the model's configuration alone.

    This needs neither weights nor data.

    Args:
        given: a choice (a plan, a manifest, or a directory or file that holds one). With ``rank``, a transformers
            model: its directory, config.json or hub name.
        rank: LoRA rank of every layer in ``targets``.
        targets: endings of layer names, as in PEFT's ``target_modules``; "all" for every layer.
        task: the task to tune for; by default, LayerLens reads it from the configuration's architectures.
        classes: number of outputs of a classification head.
        dtype: precision of the frozen weights: float32, bfloat16 or float16.
        model: base model of the choice, if it is not at the location in the manifest.
        batch_size: samples in a batch; by default that of the choice, else 8.
        sequence_length: tokens in a sequence; by default that of the choice, else 128.
        device: "cpu" or "gpu"; by default that of the choice, else "cpu".

    Returns:
        the estimate: ``trainable_params``, and FLOPs, memory (GB, 1e9 bytes) and latency (ms) in ``resources``. It
        prints as a table.

    Raises:
        ConfigurationError: an unknown task, precision or device, or no layer matches ``targets``.
        ModelNotFoundError: there is no such model.
        LayerLensError: every other error, with one line that says what to do.

    >>> model.save_pretrained("my-model")
    >>> layerlens.estimate("my-model", rank=8, targets=["q_proj", "v_proj"]).trainable_params
    2048
    """
    chosen: Manifest | str
    if rank is None or isinstance(given, (Plan, Manifest)):
        chosen, name = _manifest(given, "the plan")
    else:
        chosen, name = str(given), ""
    return estimate_costs(
        chosen, rank=rank, targets=targets, task=task, classes=classes, dtype=dtype,
        model=None if model is None else str(model), batch_size=batch_size, sequence_length=sequence_length,
        device=device, base_dir=Path.cwd(), name=name,
    )  # fmt: skip


def _manifest(given: Chosen, name: str) -> tuple[Manifest, str]:
    """The manifest of a choice, and what to call it."""
    if isinstance(given, Plan):
        return given.manifest, name
    if isinstance(given, Manifest):
        return given, name
    if not isinstance(given, (str, Path)):
        raise ConfigurationError(
            f"{name}: must be a Plan, a Manifest, or the directory or file with one, got {type(given).__name__}"
        )
    return read_manifest(manifest_at(Path(given).expanduser())), str(given)
