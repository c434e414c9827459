"""How several processes that torchrun started do one run together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerlens.config.base import ConfigModel


class DistributedConfig(ConfigModel):
    """Several processes on one run: `torchrun --nproc-per-node 2 -m layerlens run config.yaml`."""

    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description="What sums go through: `nccl` between GPUs, `gloo` on CPUs; `auto` follows `device`.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="Whether every process holds the whole model (`none`) or its share of every block's weights "
        "(`fsdp`: torch's FSDP2; blocks are gathered one at a time). Statistics are the same.",
    )
    timeout_s: float = Field(
        default=300.0,
        ge=1,
        description="Seconds that processes wait for each other to come, for a sign of life of each, and for one sum. "
        "However long measuring takes, a process that lives gives signs of life.",
    )
