"""Several texts in one row of ``data.max_length`` tokens, put together by TRL itself, as its SFTTrainer does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerlens.exceptions import ConfigurationError
from layerlens.tasks.batches import Features
from layerlens.tasks.encoded import Encoded
from layerlens.tasks.losses import IGNORED

LENGTHS = "seq_lengths"


def pack(samples: Encoded, strategy: str) -> Encoded:
    """The samples, as long as they are, as rows of at most ``samples.limit`` tokens.

    Where texts are kept apart (``bfd``, ``bfd_split``) a row's positions begin anew with each of them, which is how a
    model of transformers knows not to look from one into another; and no first token of a text has loss.

    Raises:
        ConfigurationError: TRL is not installed.
    """
    import torch

    try:
        from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
        from trl import pack_dataset
    except ImportError as error:
        raise ConfigurationError(
            f"data.packing: {strategy} is done by TRL, which is not installed ({error.name}); "
            "pip install 'layerlens[trl]', or set data.packing: none"
        ) from error
    rows = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in samples]
    packed = Encoded(samples.rows, samples.limit)
    packed.left_out, packed.said = samples.left_out, dict(samples.said)
    if not rows:
        return packed
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        found = pack_dataset(Dataset.from_list(rows), samples.limit, strategy)
    finally:
        if shown:
            enable_progress_bars()
    for row in found:
        if strategy == "wrapped":
            packed.append({**row, "attention_mask": [1] * len(row["input_ids"])})
            continue
        positions = torch.cat([torch.arange(length) for length in row[LENGTHS]])
        labels = torch.tensor(row["labels"]).masked_fill(positions == 0, IGNORED)
        packed.append({"input_ids": torch.tensor(row["input_ids"]), "position_ids": positions, "labels": labels})
    kept, whole = sum(len(one["input_ids"]) for one in packed), sum(len(one["input_ids"]) for one in rows)
    packed.said[
        f"{len(rows)} texts are packed into {len(packed)} rows ({strategy}); {kept} of {whole} tokens are used"
    ] = None
    return packed


def collate_packed(rows: Sequence[Features]) -> tuple[dict[str, Any], Any]:
    """Rows of one length, which come without a mask: positions say where texts begin."""
    import torch

    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    return inputs, torch.stack([row["labels"] for row in rows])
