"""Tiny models and data as a program has them in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

BERT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    with torch.no_grad():  # weights of the default initialisation make gradients tiny
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
            if name == "classifier.bias":  # the head of a model that was trained
                parameter.normal_()
    return model


@pytest.fixture
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


@pytest.fixture
def bert_batches() -> list[dict[str, torch.Tensor]]:
    """Six batches of four samples with padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(6):
        lengths = torch.randint(3, 9, (4, 1), generator=generator)
        found.append(
            {
                "input_ids": torch.randint(1, 60, (4, 8), generator=generator),
                "attention_mask": (torch.arange(8)[None] < lengths).long(),
                "labels": torch.randint(0, 3, (4,), generator=generator),
            }
        )
    return found


@pytest.fixture
def state_of() -> Callable[[torch.nn.Module], dict[str, Any]]:
    """Everything about a model, and about the random states around it, that must not change."""
    import random

    import numpy as np

    def state(model: torch.nn.Module) -> dict[str, Any]:
        modules = dict(model.named_modules())
        return {
            "modules": {name: (id(one), type(one), one.training) for name, one in modules.items()},
            "hooks": {
                name: [
                    sorted(getattr(one, kind))
                    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
                ]
                for name, one in modules.items()
            },
            "attributes": {name: sorted(vars(one)) for name, one in modules.items()},
            "parameters": {
                name: (id(one), one.requires_grad, one.dtype, one.device, one.detach().clone().numpy().tobytes(),
                       None if one.grad is None else one.grad.numpy().tobytes())
                for name, one in model.named_parameters()
            },
            "buffers": {name: one.numpy().tobytes() for name, one in model.named_buffers()},
            "config": model.config.to_dict() if hasattr(model, "config") else None,
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "random": (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()),
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    return state
