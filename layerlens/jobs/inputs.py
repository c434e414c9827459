"""What a run measures and on what: samples, limits of the model, the statistics asked for, and what identifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerlens.config import DataConfig, ModelConfig, RunConfig
from layerlens.config.optimization import UNIFORM_LORA
from layerlens.data import Dataset
from layerlens.data.dataset import TEST_SHARE
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.model_code import READERS
from layerlens.integrations.parameter_account import account_of
from layerlens.integrations.placement import offloaded
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import longest_sequence
from layerlens.jobs.job import Warnings
from layerlens.models import ModelFacts, ModelSpec
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks import TASKS
from layerlens.tasks.lengths import LENGTHS, refuse_longer
from layerlens.utility import needed_statistics
from layerlens.utils.code_identity import CodeIdentity, code_identity
from layerlens.utils.user_code import REFERENCE, load_function

CALIBRATION_SAMPLES, FEWEST_CALIBRATION_SAMPLES = 256, 16
TRAINED_FOR_EACH_MEASURED = 50
"""A measured sample costs about as much as a trained one, and what does not depend on samples as much again: together
less than 5 % of the fine-tune (docs/decisions/utility.md)."""
MIN_HELD_OUT = 8
"""Samples that a mean with a standard error can be trusted from."""


def calibration_samples(config: RunConfig, n_samples: int) -> int:
    """How many of ``n_samples`` to measure: what was asked for, or as few as the statistics and the fine-tune allow."""
    asked, training = config.data.calibration_samples, config.training
    if asked is not None:
        return asked
    if (
        TASKS[config.model.task].coupled
        or config.profiling.proxies.options
        or not all(x.steady for x in statistics_request(config).statistics)
    ):
        return CALIBRATION_SAMPLES
    n_train = (1.0 - TEST_SHARE) * n_samples
    trained = training.epochs * min(n_train, training.train_samples or n_train)
    if training.max_steps is not None:
        trained = training.max_steps * training.batch_size * training.gradient_accumulation
    fewest, most = FEWEST_CALIBRATION_SAMPLES, CALIBRATION_SAMPLES
    return max(fewest, min(most, round(trained / TRAINED_FOR_EACH_MEASURED)))


def split_samples(
    dataset: Dataset, config: RunConfig, warnings: Warnings, new_head: bool = False
) -> tuple[Dataset, Dataset, Dataset]:
    """Calibration, head and held-out proxy samples; says so when the data has fewer than were asked for.

    Head samples are kept apart for tasks that want a head fitted, and where the model has a ``new_head``.

    Raises:
        DataError: too few samples are left to judge proxies on.
    """
    head_samples = config.model.head_fit_samples if new_head or TASKS[config.model.task].new_head else 0
    proxies, measured = config.profiling.proxies, calibration_samples(config, len(dataset))
    held_out = proxies.held_out_samples if proxies.options else 0
    together, head = dataset.split(measured + held_out, head_samples, config.runtime.seed)
    n_held_out = min(held_out, len(together) // 3) if len(together) < measured + held_out else held_out
    n_measured = len(together) - n_held_out
    if held_out > 0 and n_held_out < MIN_HELD_OUT:
        raise DataError(
            f"profiling.proxies: the data leaves {n_held_out} samples to evaluate proxies on, and {MIN_HELD_OUT} are "
            "needed; give more data or set profiling.proxies.options: 0"
        )
    asked = {
        "data.calibration_samples": (config.data.calibration_samples or 0, n_measured),
        "model.head_fit_samples": (head_samples, len(head)),
        "profiling.proxies.held_out_samples": (held_out, n_held_out),
    }
    for name, (wanted, left) in asked.items():
        if left < wanted:
            warnings.add(f"{name}: asked for {wanted}, the data has {left} left after the test split")
    parts = list(range(n_measured)), list(range(n_measured, len(together)))
    return together.select(parts[0]), head, together.select(parts[1])


def functions_of(model: ModelConfig, data: DataConfig, base_dir: Path) -> CodeIdentity | None:
    """The user's functions that a configuration names, before any of them is called; None where it names none.

    Raises:
        ConfigurationError: there is no such function.
    """
    source = data.source
    named = {"model.factory": model.factory, "model.loss": model.loss, "data.collate": data.collate}
    if REFERENCE.fullmatch(source) and not source.startswith("builtin:") and not (base_dir / source).exists():
        named["data.source"] = source
    functions = {key: load_function(name, key, base_dir) for key, name in named.items() if name is not None}
    return code_identity(functions, READERS) if functions else None


def check_model(pretrained: PretrainedModel, config: RunConfig) -> None:
    """Refuse what the configuration asks for and this model cannot.

    Raises:
        ConfigurationError: sequences are longer than its positions, or options are to be trained on a model that
            accelerate keeps elsewhere between passes.
    """
    of_text = pretrained.tokenizer is not None and pretrained.images is None and pretrained.audio is None
    limit = longest_sequence(pretrained.model) if of_text else None
    if limit is not None:
        refuse_longer({key: length(config) for key, length in LENGTHS.items()}, limit)
    trained = {
        "profiling.proxies: {}; set proxies.options: 0": config.profiling.proxies.options,
        "optimization.proxy_check: {}; set proxy_check.steps: 0": config.optimization.proxy_check.steps,
    }
    reason = "nothing is trained on a model with weights off their device (model.device_map)"
    for message, wanted in trained.items():
        if wanted and offloaded(pretrained.model):
            raise ConfigurationError(f"{message.format(reason)}, or place the whole model on devices")


def statistics_request(config: RunConfig) -> StatisticsRequest:
    """What the utility model reads, and what the configuration asks for beside that."""
    profiling = config.profiling
    proxies = profiling.proxies.options > 0
    check = config.optimization.proxy_check
    candidates = [name for name in check.candidates if name != UNIFORM_LORA] if check.steps else []
    needed = {
        statistic
        for model in (profiling.utility_model, *candidates)
        for statistic in needed_statistics(model, profiling.metric_weights, proxies=proxies)
    }
    return StatisticsRequest.of({*needed, *profiling.statistics}, ntk_samples=profiling.ntk_samples)


def proxy_identity(identity: dict[str, Any], held_out: Dataset, config: RunConfig) -> dict[str, Any]:
    """Everything that a proxy's gain depends on: not which statistics were measured, and not how many are trained."""
    unread = ("statistics", "ntk_samples", "all_weights")
    settings = config.profiling.proxies.model_dump(include={"steps", "learning_rate"})
    return {
        **identity,
        "settings": {name: value for name, value in identity["settings"].items() if name not in unread},
        "proxies": {**settings, "held_out": held_out.fingerprint, "alpha_over_r": config.optimization.alpha_over_r},
    }


def check_identity(identity: dict[str, Any], train: Dataset, held_out: Dataset, config: RunConfig) -> dict[str, Any]:
    """Everything that a candidate's loss drop in the proxy check depends on beside its ranks and its learning rate."""
    optimization = config.optimization
    return {
        **proxy_identity(identity, held_out, config),
        "proxy_check": {"steps": optimization.proxy_check.steps, "train": train.fingerprint,
                        "use_rslora": optimization.use_rslora},
    }  # fmt: skip


def model_facts(pretrained: PretrainedModel, config: RunConfig, dataset: Dataset, spec: ModelSpec) -> ModelFacts:
    """What the manifest records so that the base model can be loaded again."""
    task, tokens = TASKS[config.model.task], pretrained.tokens
    heads = pretrained.trained_modules(task_head=task.new_head or bool(pretrained.new_parameters))
    trained = (*heads, *(tokens.whole_modules if tokens else ()))
    return ModelFacts(
        task=config.model.task,
        dtype=config.model.dtype,
        num_labels=task.n_outputs(dataset.label_names),
        labels=tuple(dataset.label_names or pretrained.labels),
        head_modules=trained,
        model_type=str(getattr(getattr(pretrained.model, "config", None), "model_type", "")),
        weights=config.model.weights,
        loss=config.model.loss,
        left_out=dict(spec.left_out) or None,
        quantization=config.model.quantization,
        new_parameters=pretrained.drawn or None,
        tokens=tokens.described() if tokens else None,
        parameters=account_of(pretrained.model, spec, trained),
    )
