"""EVA (Paischer et al. 2024, arXiv:2410.07170) by PEFT: A from the inputs' components, ranks by what they explain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import target_modules
from layerlens.tasks.metrics import TARGETS
from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, uniform_size

if TYPE_CHECKING:
    import torch

RHO = 2.0  # a layer can have up to this many times the uniform rank
MOST_BATCHES = 400


def eva(request: BaselineRequest) -> Prepared:
    """PEFT's own ranks and components, from the largest uniform rank with which they stay within the budget.

    Raises:
        ConfigurationError: no batches, or the components do not settle, or not even rank 1 fits.
    """
    if not request.batches:
        raise ConfigurationError("baseline eva: needs training batches to see the layers' inputs")
    layers = layers_with(request, "lora", dense=True)
    cost = {layer.name: layer.n_in + layer.n_out for layer in layers}
    for rank in range(uniform_size(layers, "lora", request.budget), 0, -1):
        factors = {name: a for name, a in _components(request, list(cost), rank).items() if len(a)}
        if sum(cost[name] * len(a) for name, a in factors.items()) <= request.budget:
            choice = {name: ("lora", len(a)) for name, a in factors.items()}
            return planned(request, plan(request, choice, initialization="pca"), factors)
    raise ConfigurationError(
        f"baseline eva: with rank 1 on average its ranks train more than the budget of {request.budget:,}; "
        f"give {sum(cost.values()):,} or more"
    )


def _components(request: BaselineRequest, names: list[str], rank: int) -> dict[str, torch.Tensor]:
    """A [rank of the layer, n_in] by layer; 0 rows where EVA gives a layer nothing."""
    import torch
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = LoraConfig(
        r=rank,
        target_modules=target_modules(request.model, names),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=RHO, use_label_mask=False),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(request.seed)
        found: dict[str, torch.Tensor] = get_eva_state_dict(
            request.model,
            _Bounded(request.batches),
            config,
            prepare_model_inputs_fn=_padding_mask,
            prepare_layer_inputs_fn=_unpadded_rows,
            show_progress_bar=False,
        )
    return found


def _padding_mask(inputs: Mapping[str, Any], config: Any) -> Any:
    return inputs.get("attention_mask")


def _unpadded_rows(inputs: Any, mask: Any, name: str) -> torch.Tensor:
    rows: torch.Tensor = inputs if hasattr(inputs, "flatten") else inputs[0]
    return rows[mask.bool()] if mask is not None and rows.shape[:-1] == mask.shape else rows.flatten(0, -2)


class _Bounded:
    """The batches, which PEFT goes through until all components have settled: but not for ever."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches, self.seen = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            self.seen += 1
            if self.seen > MOST_BATCHES:
                raise ConfigurationError(
                    f"baseline eva: the components have not settled after {MOST_BATCHES} batches; give larger batches"
                )
            yield {name: value for name, value in batch.items() if name != TARGETS}
