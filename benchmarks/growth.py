"""How time and memory of ``run`` grow with layers, calibration tokens and sizes on offer.

    python benchmarks/growth.py                    # writes results/growth.json and results/growth.svg
    python benchmarks/growth.py layers --most 500

Every point is a run of a small BERT with made-up weights in a process of its own: 12 to 1,992 layers (6 in a block),
10³ to 10⁶ tokens, 5 to 50 ranks. Time is that of the processor, by step: the stages that the program names, and of what
they write the manifest and the report. The exponent of a step is the slope of log time over log size between its two
largest points, where the fixed share of its time weighs least; steps below 0.1 s at the largest point have none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from layerlens.utils.processor import processor_name

RESULTS = Path(__file__).parent / "results" / "growth.json"
BLOCKS = (2, 8, 32, 128, 332)
SAMPLES = (16, 160, 1600, 16000)
SIZES = (5, 10, 20, 50)
TOKENS, LAYERS_IN_A_BLOCK = 64, 6
SHORTEST = 0.1
"""Seconds below which a step's growth is not judged."""
LIMIT = 1.1
SERIES = {
    "layers": [{"blocks": blocks, "samples": 16, "sizes": 5} for blocks in BLOCKS],
    "tokens": [{"blocks": 2, "samples": samples, "sizes": 5} for samples in SAMPLES],
    "options": [{"blocks": 16, "samples": 16, "sizes": sizes} for sizes in SIZES],
}
N_OF = {
    "layers": lambda job: LAYERS_IN_A_BLOCK * job["blocks"],
    "tokens": lambda job: TOKENS * job["samples"],
    "options": lambda job: job["sizes"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", choices=[*SERIES, []], help=", ".join(SERIES))
    parser.add_argument("--most", type=float, default=math.inf, help="no point beyond this size")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(json.loads(options.child))))
        return
    old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"series": {}}
    for name in options.series or SERIES:
        points = []
        for job in SERIES[name]:
            if N_OF[name](job) <= options.most:
                points.append({"n": N_OF[name](job), **in_child(job)})
                print(name, json.dumps(points[-1]), file=sys.stderr, flush=True)
        old["series"][name] = {"points": points, "exponents": exponents(points)}
        written(old, options.output)
    for name, series in old["series"].items():
        for step, exponent in series["exponents"].items():
            print(f"{name:8} {step:32} N^{exponent:.2f}{'  ABOVE' if exponent > LIMIT else ''}")


def written(found: dict[str, Any], output: Path) -> None:
    """Write what there is, after every series."""
    found["what"] = __doc__.split("\n\n")[2].replace("\n", " ")
    found["machine"] = {"processor": processor_name(), "cores": os.cpu_count(), "threads": 1}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".svg").write_text(figure(found["series"]), encoding="utf-8")


def in_child(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Processor seconds by step and peak memory of one run; a small run comes first, which imports everything."""
    import resource
    from contextlib import contextmanager

    from layerlens.jobs import files, run, write
    from layerlens.pipeline import run_config
    from layerlens.utils.observer import Observer, watched_by

    spent: dict[str, float] = {}
    started: dict[str, float] = {}

    def wrapped(name: str, function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **more)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        return call

    class Stages(Observer):
        def stage_started(self, name: str) -> None:
            started[name] = time.process_time()

        def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
            spent[name] = spent.get(name, 0.0) + time.process_time() - started[name]

    class Progress:
        @contextmanager
        def stage(self, description: str, total: int | None = None) -> Any:
            start = time.process_time()
            yield lambda steps=1, /, note="": None
            spent[f"of it {description}"] = time.process_time() - start

    run.report = wrapped("report", files.report)
    write.write_manifest = wrapped("manifest", write.write_manifest)
    with tempfile.TemporaryDirectory() as place:
        run_config(configured(Path(place) / "small", {"blocks": 2, "samples": 8, "sizes": 2}), base_dir=Path(place))
        spent.clear()
        config = configured(Path(place) / "job", job)
        start = time.process_time()
        with watched_by(Stages()):
            run_config(config, base_dir=Path(place), progress=Progress())
        spent["all"] = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"peak_mb": round(peak), "seconds": {name: round(seconds, 3) for name, seconds in spent.items()}}


def configured(folder: Path, job: dict[str, Any]) -> Any:
    """A model and texts in ``folder``, and the configuration of their run."""
    from layerlens.config import RunConfig
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    model = folder / "model"
    model.mkdir(parents=True)
    words = [f"w{number}" for number in range(90)]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (model / "vocab.txt").write_text("\n".join((*special, *words)), encoding="utf-8")
    BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=95, hidden_size=16, num_hidden_layers=job["blocks"], num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=TOKENS,
        )
    ).save_pretrained(model)  # fmt: skip
    chance = random.Random(0)
    rows = (
        {"text": " ".join(chance.choices(words, k=TOKENS - 2)), "label": str(number % 2)}
        for number in range(2 * job["samples"])
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(model), "task": "sequence-classification", "head_fit_samples": 8},
            "data": {"source": str(folder / "rows.jsonl"), "calibration_samples": job["samples"],
                     "max_length": TOKENS, "batch_size": 16},
            "optimization": {
                "max_trainable_params": 150 * job["blocks"],
                "lora_ranks": [1 + number for number in range(job["sizes"])],
                "latency_profile": {"batch_size": 2, "sequence_length": TOKENS},
            },
            "output": {"directory": str(folder / "out")},
            "runtime": {"threads": 1, "cache_dir": str(folder / "cache")},
        }
    )  # fmt: skip


def exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """Step -> slope of log time over log size between the two largest points, and of the peak memory."""
    if len(points) < 2:
        return {}
    before, last = points[-2:]
    span = math.log(last["n"] / before["n"])
    found = {
        step: math.log(seconds / before["seconds"][step]) / span
        for step, seconds in last["seconds"].items()
        if seconds >= SHORTEST and before["seconds"].get(step, 0.0) > 0.0
    }
    return {**found, "peak memory": math.log(last["peak_mb"] / before["peak_mb"]) / span}


def figure(series: dict[str, Any]) -> str:
    """Log time over log size, a panel for each series."""
    import io

    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2 * len(series), 3.6), layout="constrained")
    panels = drawn.subplots(1, len(series), squeeze=False)[0]
    for axes, (name, found) in zip(panels, series.items(), strict=True):
        points = found["points"]
        n = [point["n"] for point in points]
        for step in points[-1]["seconds"]:
            if step.startswith("of it") or points[-1]["seconds"][step] < SHORTEST:
                continue
            seconds = [max(point["seconds"].get(step, 0.0), 1e-3) for point in points]
            axes.loglog(n, seconds, marker="o", markersize=3, label=f"{step} N^{found['exponents'].get(step, 0):.2f}")
        axes.set_xlabel(name)
        axes.set_ylabel("processor time (s)")
        axes.grid(True, linewidth=0.4)
        axes.legend(fontsize=7)
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    main()
