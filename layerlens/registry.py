"""What you can extend: one registry of names for each kind of object, with one line for each built-in object.

Everything that has a name in a configuration or on the command line is listed here with the location of its object. The
names are known without importing the objects, so that a configuration can be checked before torch is loaded. A program
registers its own object::

    from layerlens.registry import TASKS
    TASKS.register("my-task", MY_TASK)

A package offers an object to every process by an entry point in its ``pyproject.toml``::

    [project.entry-points."layerlens.tasks"]
    my-task = "my_package:MY_TASK"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from importlib import metadata

Item = TypeVar("Item")


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that is closest to ``name``; None if none is close."""
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)), None) or next(
        iter(difflib.get_close_matches(name.lower(), known, n=1)), None
    )


class Registry(Generic[Item]):
    """Objects of one kind by name. Built-in objects and those of packages are imported on first use.

    Args:
        kind: what messages call an entry, such as "task".
        group: entry point group whose entries are added.
        built_in: name -> "module:OBJECT", in the order in which names are listed.
        left_out: name -> why a name that users may look for is missing, and what works instead.
    """

    def __init__(
        self, kind: str, group: str, built_in: Mapping[str, str], left_out: Mapping[str, str] | None = None
    ) -> None:
        self.kind = kind
        self.group = group
        self.left_out = dict(left_out or {})
        self._places = dict(built_in)
        self._items: dict[str, Item] = {}
        self._points: dict[str, metadata.EntryPoint] | None = None

    def register(self, name: str, item: Item) -> Item:
        """Add ``item`` under ``name`` and return it.

        Raises:
            ConfigurationError: the name is taken.
        """
        if name in self:
            raise ConfigurationError(f"{self.kind}: {name!r} is registered already; choose another name")
        self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Remove an object that ``register`` added."""
        if name in self._places:
            raise ConfigurationError(f"{self.kind}: {name!r} is built in and cannot be removed")
        self._items.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All names: built-in objects first, then those of packages, then registered ones."""
        return tuple(dict.fromkeys((*self._places, *self._of_packages(), *self._items)))

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._items or name in self._of_packages()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> Item:
        """The object of this name.

        Raises:
            ConfigurationError: there is no such name (the message gives the nearest and all known names), or the object
                cannot be imported.
        """
        if name not in self._items:
            self._items[name] = self._load(name)
        return self._items[name]

    def get(self, name: object) -> Item | None:
        """The object of this name; None where there is none."""
        return self[name] if isinstance(name, str) and name in self else None

    def values(self) -> tuple[Item, ...]:
        """All objects, in the order of ``names``. This imports every one."""
        return tuple(self[name] for name in self)

    def unknown(self, name: str) -> ConfigurationError:
        """The error for an unknown name, for the caller to raise or to reword."""
        if reason := self.left_out.get(name):
            return ConfigurationError(f"{self.kind}: {name!r} is left out: {reason}")
        nearest = nearest_name(name, self.names())
        hint = f", did you mean {nearest!r}?" if nearest else ";"
        return ConfigurationError(f"{self.kind}: {name!r} is not known{hint} known: {', '.join(self)}")

    def _load(self, name: str) -> Item:
        if name in self._places:
            module, _, attribute = self._places[name].partition(":")
            found: Any = getattr(importlib.import_module(module), attribute)
            return found
        point = self._of_packages().get(name)
        if point is None:
            raise self.unknown(name)
        try:
            loaded: Any = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"{self.kind}: {name!r} ({point.value}) cannot be imported: {error}") from error
        return loaded

    def _of_packages(self) -> dict[str, metadata.EntryPoint]:
        if self._points is None:
            from importlib import metadata  # slow to load, and --help has no use for it

            self._points = {point.name: point for point in metadata.entry_points(group=self.group)}
        return self._points


TASKS: Registry[Any] = Registry(
    "task",
    "layerlens.tasks",
    {
        "sequence-classification": "layerlens.tasks.sequence_classification:TASK",
        "regression": "layerlens.tasks.regression:TASK",
        "token-classification": "layerlens.tasks.token_classification:TASK",
        "question-answering": "layerlens.tasks.question_answering:TASK",
        "causal-lm": "layerlens.tasks.causal_lm:TASK",
        "dpo": "layerlens.tasks.dpo:TASK",
        "sentence-embedding": "layerlens.tasks.sentence_embedding:TASK",
        "image-text": "layerlens.tasks.image_text:TASK",
        "image-text-pairs": "layerlens.tasks.image_text_pairs:TASK",
        "masked-lm": "layerlens.tasks.masked_lm:TASK",
        "seq2seq": "layerlens.tasks.seq2seq:TASK",
        "image-classification": "layerlens.tasks.image_classification:TASK",
        "image-regression": "layerlens.tasks.image_regression:TASK",
        "semantic-segmentation": "layerlens.tasks.semantic_segmentation:TASK",
        "object-detection": "layerlens.tasks.object_detection:TASK",
        "audio-classification": "layerlens.tasks.audio_classification:TASK",
        "speech-ctc": "layerlens.tasks.speech_ctc:TASK",
        "speech-seq2seq": "layerlens.tasks.speech_seq2seq:TASK",
        "custom": "layerlens.tasks.custom:TASK",
    },
)
"""What a model can be tuned for; an entry is a ``layerlens.tasks.Task``."""

METHODS: Registry[Any] = Registry(
    "method",
    "layerlens.methods",
    {
        "lora": "layerlens.methods.lora:METHOD",
        "adapter": "layerlens.methods.adapter:METHOD",
        "prefix": "layerlens.methods.prefix:METHOD",
        "dora": "layerlens.methods.dora:METHOD",
        "ia3": "layerlens.methods.ia3:METHOD",
        "bitfit": "layerlens.methods.bitfit:METHOD",
        "ln_tuning": "layerlens.methods.ln_tuning:METHOD",
    },
    left_out={
        "rslora": "it is a scale of LoRA; set optimization.use_rslora: true",
        "beft": "its name here is bitfit",
        "adalora": "it cuts ranks during training; use `layerlens train --baseline adalora`",
        "prompt_tuning": "its virtual tokens act before the first layer, so it cannot apply to single layers",
        "p_tuning": "its virtual tokens act before the first layer, so it cannot apply to single layers",
        "prefix_tuning": "PEFT gives all layers one length; prefix has a length for each layer",
        "adaption_prompt": "PEFT gives the last layers one length; prefix has a length for each layer",
        "vera": "its layers share projections, so the cost of one layer depends on the others",
        "vblora": "its layers share a bank of vectors, so the cost of one layer depends on the others",
        "xlora": "it mixes whole adapters by a gate for the model, so it cannot apply to single layers",
    },
)
"""How a layer can be adapted; an entry is a ``layerlens.methods.Method``."""

STATISTICS: Registry[Any] = Registry(
    "statistic",
    "layerlens.statistics",
    {
        "fisher": "layerlens.profiling.statistics.gradients:FISHER",
        "gradient": "layerlens.profiling.statistics.gradients:GRADIENT",
        "input_scale": "layerlens.profiling.statistics.gradients:INPUT_SCALE",
        "spectrum": "layerlens.profiling.statistics.spectra:SPECTRUM",
        "whitened_spectrum": "layerlens.profiling.statistics.spectra:WHITENED_SPECTRUM",
        "factors": "layerlens.profiling.statistics.factors:FACTORS",
        "sketched_spectrum": "layerlens.profiling.statistics.sketches:SKETCHED_SPECTRUM",
        "sketched_factors": "layerlens.profiling.statistics.sketches:SKETCHED_FACTORS",
        "ntk": "layerlens.profiling.statistics.ntk:STATISTIC",
        "fisher_diagonal": "layerlens.profiling.statistics.fisher_diagonal:STATISTIC",
        "activation_memory": "layerlens.profiling.statistics.module_costs:ACTIVATION_MEMORY",
        "flops": "layerlens.profiling.statistics.module_costs:FLOPS",
        "time": "layerlens.profiling.statistics.module_costs:TIME",
    },
)
"""What one pass over the calibration data can measure; an entry is a ``layerlens.profiling.statistics.Statistic``."""

UTILITY_MODELS: Registry[Any] = Registry(
    "utility model",
    "layerlens.utility_models",
    {
        "auto": "layerlens.utility.auto:MODEL",
        "tempered_log": "layerlens.utility.tempered:TEMPERED_LOG",
        "tempered": "layerlens.utility.tempered:TEMPERED",
        "tempered_energy": "layerlens.utility.tempered:TEMPERED_ENERGY",
        "signal": "layerlens.utility.signal:SIGNAL",
        "whitened": "layerlens.utility.whitened:MODEL",
        "gradient": "layerlens.utility.signal:GRADIENT",
        "energy": "layerlens.utility.signal:ENERGY",
        "weighted": "layerlens.utility.weighted:MODEL",
        "uniform": "layerlens.utility.signal:UNIFORM",
    },
)
"""From statistics to the expected gain of every option; an entry is a ``layerlens.utility.UtilityModel``."""

RANK_RULES: Registry[Any] = Registry(
    "rank rule",
    "layerlens.rank_rules",
    {
        "uniform": "layerlens.rank_rules.published:UNIFORM",
        "uniform_qv": "layerlens.rank_rules.published:UNIFORM_QV",
        "eva": "layerlens.rank_rules.published:EVA",
        "gora": "layerlens.rank_rules.published:GORA",
        "gradient_norm": "layerlens.rank_rules.published:GRADIENT_NORM",
        "fisher_proportional": "layerlens.rank_rules.published:FISHER",
        "random": "layerlens.rank_rules.published:RANDOM",
    },
)
"""Published ways to give ranks to layers; an entry is a ``layerlens.rank_rules.RankRule``."""

ENGINES: Registry[Any] = Registry(
    "serving engine",
    "layerlens.engines",
    {
        "peft": "layerlens.engines:PEFT",
        "vllm": "layerlens.engines:VLLM",
        "vllm-legacy": "layerlens.engines:VLLM_LEGACY",
        "sglang": "layerlens.engines:SGLANG",
        "tensorrt-llm": "layerlens.engines:TENSORRT_LLM",
        "llama.cpp": "layerlens.engines:LLAMA_CPP",
        "ollama": "layerlens.engines:OLLAMA",
        "lorax": "layerlens.engines:LORAX",
        "any": "layerlens.engines:ANY",
    },
)
"""What serves a tuned model; an entry is a ``layerlens.engines.Engine``."""

SOURCES: Registry[Any] = Registry(
    "model source",
    "layerlens.sources",
    {
        "transformers": "layerlens.sources.transformers:TRANSFORMERS",
        "package": "layerlens.sources.transformers:PACKAGE",
        "timm": "layerlens.sources.timm:SOURCE",
        "ultralytics": "layerlens.sources.ultralytics:SOURCE",
        "factory": "layerlens.sources.factory:SOURCE",
        "object": "layerlens.sources.in_memory:SOURCE",
    },
)
"""Where a model can come from, by the prefix of its references; an entry is a ``layerlens.sources.ModelSource``."""


def source_of(reference: str) -> tuple[Any, str]:
    """The ``ModelSource`` of a model's reference, and the reference without the prefix that names the source.

    A reference without a known prefix is a directory or a hub name, both of transformers.
    """
    prefix, _, place = reference.partition(":")
    if place and prefix in SOURCES:
        return SOURCES[prefix], place
    return SOURCES["transformers"], reference
