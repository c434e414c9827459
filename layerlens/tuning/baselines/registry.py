"""The baselines by name. Each is imported when it is asked for, so that the names are known without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerlens.config.wording import nearest_key
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.tuning.baselines.interface import BaselineRequest, Prepared


@dataclass(frozen=True)
class Baseline:
    """One way to spend a budget.

    Args:
        name: as the command line takes it.
        summary: one line for lists.
        place: "module:function" below this package; the function takes a BaselineRequest and returns Prepared.
    """

    name: str
    summary: str
    place: str

    def prepare(self, request: BaselineRequest) -> Prepared:
        """The request's model, ready to train.

        Raises:
            ConfigurationError: the model or the budget does not allow it, or what it needs was not given.
        """
        module, _, function = self.place.partition(":")
        prepare: Callable[[BaselineRequest], Prepared] = getattr(
            importlib.import_module(f"layerlens.tuning.baselines.{module}"), function
        )
        return prepare(request)


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("full", "every weight is trained", "full:full_fine_tuning"),
        Baseline("head-only", "the task head alone", "head_only:head_only"),
        Baseline("uniform-lora", "one LoRA rank on every Linear", "uniform:uniform_all_linear"),
        Baseline("lora-qv", "one LoRA rank on query and value", "uniform:uniform_query_value"),
        Baseline("rslora", "one LoRA rank on every Linear, scaled by alpha/√r", "uniform:uniform_rslora"),
        Baseline("adalora", "AdaLoRA: ranks cut while it trains", "adalora:adalora"),
        Baseline("eva", "EVA: ranks and initialisation from the inputs' components", "eva:eva"),
        Baseline("autolora", "AutoLoRA: ranks by meta-learned selection variables", "autolora:autolora"),
        Baseline("adapter-only", "one adapter width after attention and FFN outputs", "adapter_only:adapter_only"),
        Baseline("prefix-only", "one prefix length in every attention block", "prefix_only:prefix_only"),
        Baseline("gora", "LoRA ranks by weight times gradient, as GoRA", "gora:gora_ranks"),
        Baseline("random", "LoRA ranks drawn at random", "random_ranks:random_ranks"),
        Baseline("truncation", "twice the rank, cut to the budget after training", "truncation:truncation"),
        Baseline("hypernetwork", "LoRA generated from layer embeddings (HyperLoRA)", "hypernetwork:hypernetwork"),
    )
}


def known_baseline(name: str) -> Baseline:
    """The baseline of this name.

    Raises:
        ConfigurationError: there is none; the message has the nearest name and all known ones.
    """
    if name in BASELINES:
        return BASELINES[name]
    nearest = nearest_key(name, list(BASELINES))
    hint = f", did you mean {nearest!r}?" if nearest else ";"
    raise ConfigurationError(f"baseline: {name!r} is not known{hint} known: {', '.join(BASELINES)}")
