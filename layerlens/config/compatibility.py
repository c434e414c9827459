"""What does not go with what: one table, checked by ``layerlens validate``, and by every job before it loads anything.

A row stands here when the configuration alone says that a job would be refused, and more than one section takes part.
What one section says of itself is checked by that section as it is read. What depends on the
model, the data or the machine is refused where those are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from layerlens.config.optimization import CHEAPEST, OptimizationConfig
from layerlens.config.sections import RunConfig
from layerlens.exceptions import ConfigurationError, LayerLensError, ModelSpecError
from layerlens.models.choice import ONE_KIND, ROWS_NEED_LORA
from layerlens.models.model_spec import LORA_KINDS
from layerlens.models.tokens import ROWS, WHOLE, TokenRequest
from layerlens.registry import ENGINES, METHODS, STATISTICS, TASKS


@dataclass(frozen=True)
class Conflict:
    """Settings that do not go together.

    Args:
        name: what conflicts, in a few words.
        reason: why a configuration is refused: the key, what is wrong, and what would work; "" where it is not.
        job: the job that is refused: "run" or "evaluate".
        error: class of the refusal.
        processes: the numbers of processes that it is refused for; None for any, which ``validate`` refuses too.
    """

    name: str
    reason: Callable[[RunConfig], str]
    job: str = "run"
    error: type[LayerLensError] = ConfigurationError
    processes: Callable[[int], bool] | None = None


def refuse_conflicts(config: RunConfig, job: str, processes: int | None = None) -> None:
    """Refuse a configuration by the first row that speaks against the job.

    Args:
        config: the configuration.
        job: "run" or "evaluate".
        processes: how many do it together; None if it is not known yet.

    Raises:
        ConfigurationError, ModelSpecError: names the keys, and what would work.
    """
    for conflict in CONFLICTS:
        if conflict.processes and (processes is None or not conflict.processes(processes)):
            continue
        if conflict.job == job and (reason := conflict.reason(config)):
            raise conflict.error(reason)


def refuse_streaming(config: RunConfig) -> None:
    """Refuse what a model whose weights stay on disk cannot give, where ``memory_mode: auto`` has come to streaming.

    Raises:
        ConfigurationError: names the key, and what would work.
    """
    for reason in _unstreamable(config):
        raise ConfigurationError(reason)


def _unstreamable(config: RunConfig) -> Iterator[str]:
    """Why a streamed model cannot give what is asked for."""
    end = "which streaming never holds in full; leave it out, or set profiling.memory_mode: plain or checkpointed"
    if config.profiling.proxies.options:
        yield f"profiling.proxies trains options on the model in memory, {end}"
    if config.optimization.proxy_check.steps:
        yield f"optimization.proxy_check trains choices on the model in memory, {end}"
    start = config.optimization.lora_initialization
    if start != "default":
        yield f"optimization.lora_initialization: {start} is measured on the model in memory, {end}"
    for name in config.optimization.methods:
        if METHODS[name].starts_from_weights:
            yield f"optimization.methods: {name} starts from the weights of the model in memory, {end}"
    for name in config.profiling.statistics:
        if STATISTICS[name].module_values is not None:
            yield f"profiling.statistics: {name} is measured on the whole model in memory, {end}"


def _with_sharding(name: str, reason: Callable[[RunConfig], str]) -> Conflict:
    """What FSDP2 cannot do, named by what follows ``distributed.sharding: fsdp: ``."""
    return Conflict(
        name,
        lambda x: _behind("distributed.sharding: fsdp", reason(x)) if x.distributed.sharding == "fsdp" else "",
    )


def _where(holds: bool, reason: str) -> str:
    return reason if holds else ""


def _behind(key: str, reason: str) -> str:
    return f"{key}: {reason}" if reason else ""


def _least_of_a_method_not_offered(section: OptimizationConfig) -> str:
    for method, least in section.constraints.min_layers.items():
        if method not in section.methods:
            return (
                f"optimization.constraints.min_layers.{method}: requires {least} layers, but {method} is not in "
                "optimization.methods"
            )
    return ""


def _two_of_peft(section: OptimizationConfig) -> str:
    names = [name for name in section.methods if METHODS[name].wraps and not METHODS[name].joins]
    if len(names) < 2:
        return ""
    alone = [name for name in section.methods if name not in names]
    return (
        f"optimization.methods: {' and '.join(names)} cannot be in one choice, because {ONE_KIND}; keep one of them"
        + (f" beside {' and '.join(alone)}" if alone else "")
    )


def _no_study(task: str) -> str:
    if not task or not TASKS[task].no_study:
        return ""
    studied = ", ".join(name for name in TASKS if not TASKS[name].no_study)
    return f"model.task: studies do not support {task}: {TASKS[task].no_study}. They support {studied}"


STREAMED = (
    "model.resize_token_embeddings, model.trainable_tokens: embedding rows are trained in memory, and streamed weights "
    "stay on disk; set profiling.memory_mode: plain or checkpointed"
)
SHARDED = (
    "cannot shard a model whose embedding rows are trained; leave model.resize_token_embeddings and "
    "model.trainable_tokens out"
)


def _of_tokens(request: TokenRequest, holds: bool, reason: str) -> str:
    return _where(bool(request) and holds, reason)


def _rows_beside_others(request: TokenRequest, methods: Sequence[str]) -> str:
    of_peft = [name for name in methods if METHODS[name].wraps and not METHODS[name].joins]
    others = [name for name in of_peft if name not in LORA_KINDS]
    if not request or request.by != ROWS or not others:
        return ""
    return (
        f"optimization.methods: {others[0]} cannot be combined with trained token rows, because {ROWS_NEED_LORA}; set "
        f"model.token_training: {WHOLE}, or methods: [lora]"
    )


CONFLICTS = (
    Conflict(
        "streaming and a model built in memory",
        lambda x: (
            _behind("profiling.memory_mode", x.model.source.why_not_streamable(x.model.reference))
            if x.profiling.memory_mode == "streamed"
            else ""
        ),
        error=ModelSpecError,
    ),
    Conflict(
        "streaming and what needs the model in memory",
        lambda x: next(_unstreamable(x), "") if x.profiling.memory_mode == "streamed" else "",
    ),
    Conflict(
        "streaming and quantization",
        lambda x: _where(
            x.profiling.memory_mode == "streamed" and x.model.quantization is not None,
            "model.quantization: weights streamed from disk are used in their stored form; set profiling.memory_mode: "
            "plain or checkpointed, or leave model.quantization out",
        ),
    ),
    Conflict(
        "a memory limit and device_map",
        lambda x: _where(
            x.profiling.limits_memory is not None and x.model.device_map is not None,
            f"{x.profiling.limits_memory}: cannot be combined with model.device_map; give one of the two",
        ),
    ),
    _with_sharding(
        "sharding and device_map",
        lambda x: _where(
            x.model.device_map is not None, "cannot be combined with model.device_map; give one of the two"
        ),
    ),
    _with_sharding(
        "sharding and quantization",
        lambda x: _where(
            x.model.quantization is not None, "cannot shard quantized weights; leave model.quantization out"
        ),
    ),
    _with_sharding(
        "sharding and a source that is not spread",
        lambda x: _where(bool(x.model.source.why_not_sharded), f"{x.model.source.why_not_sharded}; set it to none"),
    ),
    _with_sharding(
        "sharding and proxies",
        lambda x: _where(
            x.profiling.proxies.options > 0,
            "profiling.proxies trains the whole model in one process; set proxies.options: 0",
        ),
    ),
    _with_sharding(
        "sharding and a proxy check",
        lambda x: _where(
            x.optimization.proxy_check.steps > 0,
            "optimization.proxy_check trains the whole model in one process; set proxy_check.steps: 0",
        ),
    ),
    _with_sharding(
        "sharding and a measured initialisation",
        lambda x: _where(
            x.optimization.lora_initialization != "default",
            "optimization.lora_initialization is measured on the whole model in one process; set it to default",
        ),
    ),
    Conflict(
        "a source and a task that its models are not for",
        lambda x: x.model.source.why_not_for(x.model.reference, x.model.task),
        error=ModelSpecError,
    ),
    Conflict(
        "a source and a precision",
        lambda x: x.model.source.why_not_in(x.model.reference, x.model.dtype),
        error=ModelSpecError,
    ),
    Conflict(
        "detection by another model",
        lambda x: _where(
            x.model.task == "object-detection" and x.model.source.default_task != x.model.task,
            "model.name_or_path: object-detection takes ultralytics:WEIGHTS.pt, not detectors of transformers (DETR, "
            "RT-DETR)",
        ),
    ),
    Conflict(
        "packing and another task",
        lambda x: _where(
            x.data.packing != "none" and x.model.task not in ("causal-lm", ""),
            f"data.packing: {x.data.packing} is for causal-lm, not for {x.model.task}; set it to none",
        ),
    ),
    Conflict(
        "a collate function and another task",
        lambda x: _where(
            x.data.collate is not None and x.model.task not in ("custom", ""),
            f"data.collate: is for the task custom; {x.model.task} makes its own batches, so leave it out",
        ),
    ),
    Conflict(
        "serving and a task head",
        lambda x: _where(
            x.optimization.serve_with is not None
            and not ENGINES[x.optimization.serve_with].holds_all
            and bool(x.model.task)
            and TASKS[x.model.task].new_head,
            f"optimization.serve_with: {x.optimization.serve_with} holds no task head, and {x.model.task} trains one; "
            "leave it out, and serve the output of `layerlens export --merge`",
        ),
    ),
    Conflict(
        "layers of a method that is not on offer",
        lambda x: _least_of_a_method_not_offered(x.optimization),
    ),
    Conflict(
        "sharding and one process",
        lambda x: _where(
            x.distributed.sharding == "fsdp",
            "distributed.sharding: fsdp: only one process was started; start several with torchrun --nproc-per-node N",
        ),
        processes=lambda n: n == 1,
    ),
    Conflict(
        "a memory limit and several processes",
        lambda x: _where(
            x.profiling.limits_memory is not None,
            f"{x.profiling.limits_memory}: works with a single process. Start one process, or set "
            "distributed.sharding: fsdp",
        ),
        processes=lambda n: n > 1,
    ),
    Conflict(
        "device_map and several processes",
        lambda x: _where(
            x.distributed.sharding == "none" and x.model.device_map is not None,
            "model.device_map: one process places the model on all devices of its machine; run it without torchrun, or "
            "shard it over the processes with distributed.sharding: fsdp instead",
        ),
        processes=lambda n: n > 1,
    ),
    Conflict(
        "streaming and rows of tokens",
        lambda x: _of_tokens(x.model.token_request, x.profiling.memory_mode == "streamed", STREAMED),
    ),
    _with_sharding("sharding and rows of tokens", lambda x: _of_tokens(x.model.token_request, True, SHARDED)),
    Conflict(
        "rows of tokens and another method of PEFT",
        lambda x: _rows_beside_others(x.model.token_request, x.optimization.methods),
    ),
    Conflict(
        "serving and rows of tokens",
        lambda x: _of_tokens(
            x.model.token_request,
            x.optimization.serve_with is not None and not ENGINES[x.optimization.serve_with].holds_all,
            f"optimization.serve_with: {x.optimization.serve_with} holds no embedding rows; leave it out, and serve "
            "the output of `layerlens export --merge`",
        ),
    ),
    Conflict(
        "the least cost and proxies",
        lambda x: _where(
            x.optimization.objective == CHEAPEST and x.profiling.proxies.options > 0,
            "profiling.proxies calibrates the gains of single options, and optimization.objective: cheapest needs the "
            "gains of sets; set proxies.options: 0, and optimization.proxy_check to train whole choices",
        ),
    ),
    Conflict(
        "the least cost and checkpoints as a choice",
        lambda x: _where(
            x.optimization.objective == CHEAPEST and x.training.gradient_checkpointing == "auto",
            "training.gradient_checkpointing: auto weighs the number of checkpoints against the score, which "
            "optimization.objective: cheapest does not optimise; set it to true or false",
        ),
    ),
    Conflict("two methods of PEFT", lambda x: _two_of_peft(x.optimization)),
    Conflict("a study of a task without one", lambda x: _no_study(x.model.task), job="evaluate"),
    Conflict(
        "a study without a budget",
        lambda x: _where(
            not x.study.budgets and x.optimization.max_trainable_params is None,
            "study.budgets: none given, and optimization.max_trainable_params is not set either",
        ),
        job="evaluate",
    ),
)
