"""What needs no measuring: how two choices differ, and what a choice costs by the model's configuration alone."""

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
    """How the choice ``b`` differs from ``a``: layers, parameters, FLOPs, memory, latency, score, and what they are of.

    Args:
        a: a plan, a manifest, or a directory or file that has one.
        b: another, of the same model or of another.

    Returns:
        what prints, and shows in a notebook, as tables. True where anything differs; ``layers``, ``settings`` and
        ``figures`` are the parts.

    Raises:
        ConfigurationError: a directory without a manifest, or something else than a choice.
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
    """What a choice, or LoRA of one rank everywhere, costs by the model's configuration, without weights or data.

    Args:
        given: a choice; or with ``rank`` a transformers model: its directory, config.json or hub name.
        rank: of LoRA on every layer that ``targets`` name.
        targets: layers by the endings of their names, as PEFT's ``target_modules``; "all" for every one.
        task: what the model is tuned for; read off the configuration's architectures when None.
        classes: outputs of a classifier's head.
        dtype: precision of the frozen weights: float32, bfloat16 or float16.
        model: base model of a choice, where it is not where its manifest says.
        batch_size: samples in a batch; 8, or what the choice was made for.
        sequence_length: tokens in a sequence; 128, or what the choice was made for.
        device: "cpu" or "gpu"; the former, or what the choice was made for.

    Returns:
        ``trainable_params``, and FLOPs, memory (GB, 1e9 bytes) and latency (ms) in ``resources``; prints as a table.

    Raises:
        LayerLensError: with one line that says what to do: no such model, no layer that takes the rank.

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
