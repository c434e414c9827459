"""A user's model, data and loss. Process 1 is killed while it measures its third batch, once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

RANK = int(os.environ.get("RANK", "0"))


class Net(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def build() -> Net:
    torch.manual_seed(0)
    return Net()


class Points:
    """40 points of three classes; the target is the number of the point, so that batches can be told apart."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        point = torch.randn(6, generator=torch.Generator().manual_seed(number))
        return point, torch.tensor(number)


def points() -> Points:
    return Points()


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def loss(output: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    if not output.requires_grad:  # a trial of half a batch, before the measurement
        return torch.nn.functional.cross_entropy(output, numbers % 3, reduction="none")
    log = Path.cwd() / f"measured-{RANK}.txt"
    begun = _lines(log)
    with log.open("a") as file:
        file.write(f"{int(numbers.min())}\n")
    if "WORLD_SIZE" in os.environ and begun == 2 and RANK == 1:
        while _lines(Path.cwd() / "measured-0.txt") < 4:  # both are in the middle of a batch
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if "WORLD_SIZE" in os.environ and begun == 3 and RANK == 0:
        time.sleep(1800)  # until torchrun ends it
    return torch.nn.functional.cross_entropy(output, numbers % 3, reduction="none")
