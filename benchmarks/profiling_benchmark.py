"""Cost of the statistics beside one ordinary training step (forward and backward) of the same model and batch.

    python benchmarks/profiling_benchmark.py --out benchmarks/results/profiling.json [--peers PYTHON]

remakes ``profiling.json`` and the tables in ``profiling.md`` beside it. With ``--peers`` that interpreter, in whose
environment the peers are installed (see ``profiling_peers.py``), measures them too; otherwise the peers' figures that
the file has stay there. What is not measured in a run (``--models``, ``--dtypes``, ``--threads``) keeps its figures.

Models have the shapes of MiniLM-L6, BERT-base, ViT-base and SmolLM2-135M, and random weights; statistics are those of
every Linear. The steps of all
rows are interleaved round by round, and a row's ratio is the median over rounds of time(row) / time(ordinary step): a
single time on a machine with other work says little. With one thread, times are those of the process on its core, which
other work hardly changes; with more, they are wall time. Peak memory is that of one step in a process of its own, above
what the process has with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling_report import page

from layerlens.config import ProfilingConfig
from layerlens.utility.model import needed_statistics
from layerlens.utils.processor import processor_name

MODELS = ("minilm", "bert-base", "vit-base", "smollm2-135m")
DTYPES = ("float32", "bfloat16")
TARGETS = {
    "Fisher": {"float32": 0.78, "bfloat16": 0.78},
    "Fisher + G": {"float32": 0.85, "bfloat16": 0.85},
    "Fisher + sketched spectra + NTK + sketched factors": {"float32": 0.85, "bfloat16": 0.85},
    "Fisher + G + exact K-FAC factors": {"float32": 1.4},
    "what the default utility reads": {"float32": 0.8, "bfloat16": 0.8},
}
REQUESTS = {
    "Fisher": ("fisher",),
    "Fisher + G": ("fisher", "gradient"),
    "Fisher + sketched spectra + NTK + sketched factors": ("fisher", "sketched_spectrum", "ntk", "sketched_factors"),
    "Fisher + G + exact K-FAC factors": ("fisher", "gradient", "factors"),
    "what the default utility reads": needed_statistics(ProfilingConfig().utility_model, {}),
}
ORDINARY, FROZEN = "ordinary step", "frozen weights, no statistics"
CHECKPOINTED = ("Fisher", "Fisher + sketched spectra + NTK + sketched factors")
"""Rows whose memory with activation checkpointing is measured too."""

WARM_UP_ROUNDS = 2
"""The second ordinary step still took twice as long as later ones: its gradients' memory was touched anew."""


def build(name: str, dtype: str) -> tuple[Any, Any]:
    """(model in evaluation mode, batch)."""
    import torch
    import transformers as hf

    from layerlens.tasks.batches import Batch

    torch.manual_seed(0)
    if name == "vit-base":
        model: Any = hf.ViTForImageClassification(hf.ViTConfig())
        inputs = {"pixel_values": torch.randn(2, 3, 224, 224).to(getattr(torch, dtype))}
    else:
        if name == "smollm2-135m":
            config: Any = hf.LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, tie_word_embeddings=True,
            )  # fmt: skip
            model, samples, tokens = hf.LlamaForCausalLM(config), 4, 128
        elif name == "minilm":
            config = hf.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
            model, samples, tokens = hf.BertForSequenceClassification(config), 32, 64
        else:
            model, samples, tokens = hf.BertForSequenceClassification(hf.BertConfig()), 8, 64
        ids = torch.randint(1, 30000, (samples, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    n = len(next(iter(inputs.values())))
    labels = inputs["input_ids"] if name == "smollm2-135m" else torch.arange(n) % 2
    batch = Batch(inputs, labels, torch.arange(n))
    return model.to(getattr(torch, dtype)).eval(), batch.halves_apart()


def steps(name: str, dtype: str, threads: int, *, checkpointing: bool) -> dict[str, Callable[[], object]]:
    """Every row of the table as one step, ready to be called again and again."""
    import torch

    from layerlens.integrations.torch_modules import frozen_without_dropout
    from layerlens.models import LayerSpec, ModelSpec
    from layerlens.profiling.capture import Capture
    from layerlens.profiling.request import StatisticsRequest
    from layerlens.tasks.losses import causal_loss, classification_loss

    model, batch = build(name, dtype)
    loss_of = causal_loss if name == "smollm2-135m" else classification_loss
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [
        LayerSpec(path, 768, "linear", module.in_features, module.out_features, methods=("lora",))
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"  # tied to the embeddings: no layer of its own
    ]

    def ordinary() -> None:
        model.requires_grad_(True)
        loss_of(model(**batch.inputs), batch).mean().backward()
        model.zero_grad()

    def frozen() -> None:
        blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        first = blocks[0].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(True), *args[1:]))
        with frozen_without_dropout(model, checkpointing=checkpointing):
            loss_of(model(**batch.inputs), batch).sum().backward()
        first.remove()

    def measured(names: tuple[str, ...]) -> Callable[[], object]:
        # More samples than are kept, so that the kernel is sketched; every step adds its batch as a pass does.
        request = StatisticsRequest.of(names, ntk_samples=1000)
        capture = Capture(model, ModelSpec(name, 0, layers), request, threads)

        def step() -> None:
            with frozen_without_dropout(model, checkpointing=checkpointing), capture.open():
                capture.run(batch, loss_of)

        return step

    return {ORDINARY: ordinary, FROZEN: frozen, **{row: measured(names) for row, names in REQUESTS.items()}}


def run_times(name: str, dtype: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every row in every round."""
    candidates = steps(name, dtype, threads, checkpointing=False)
    for step in [*candidates.values()] * WARM_UP_ROUNDS:
        step()
    seconds: dict[str, list[float]] = {row: [] for row in candidates}
    clock = time.process_time if threads == 1 else time.perf_counter
    for _ in range(rounds):
        for row, step in candidates.items():
            start = clock()
            step()
            seconds[row].append(clock() - start)
    return seconds


def run_memory(name: str, dtype: str, threads: int, row: str, *, checkpointing: bool) -> float:
    """Megabytes (1e6 bytes) that the row's first step adds to the process with the model loaded.

    What the step leaves behind (mean gradients, factors) counts. A step without statistics comes before it, so that the
    libraries' own buffers do not count.
    """
    candidates = steps(name, dtype, threads, checkpointing=checkpointing)
    candidates[FROZEN]()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    candidates[row]()
    return (_resident("VmHWM") - before) / 1e6


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024


def in_child(arguments: list[str], threads: int) -> Any:
    """What this file prints as JSON when it is run with ``arguments`` and ``threads`` threads in every pool."""
    # Large arrays are mapped one by one, so that freed ones do not stay resident and hide in the high-water mark.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # As the command line sets them: idle threads of one pool do not hold up another.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_THREAD_TIMEOUT": "4",
        "MALLOC_MMAP_THRESHOLD_": "65536" if "--row" in arguments else "",
    }
    command = [sys.executable, __file__, "--child", "--threads", str(threads), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(name: str, dtype: str) -> dict[tuple[str, bool], float]:
    """(row, with checkpointing) -> megabytes of one step, each in a process of its own."""
    return {
        (row, checkpointing): in_child(
            ["--model", name, "--dtype", dtype, "--row", row, *(["--checkpointing"] if checkpointing else [])], 1
        )
        for row in (ORDINARY, FROZEN, *REQUESTS)
        for checkpointing in ((False, True) if row in CHECKPOINTED else (False,))
    }


def measure_all(
    models: list[str], dtypes: list[str], threads: list[int], rounds: int, *, times_only: bool
) -> list[dict[str, Any]]:
    """One result for each model, dtype, thread count and row; without peak memory where ``times_only``."""
    results = []
    for name in models:
        for dtype in dtypes:
            memory = {} if times_only else measure_memory(name, dtype)
            for count in threads:
                seconds = in_child(["--model", name, "--dtype", dtype, "--rounds", str(rounds)], count)
                for row, own in seconds.items():
                    ratios = [a / b for a, b in zip(own, seconds[ORDINARY], strict=True)]
                    results.append(
                        {
                            "model": name, "dtype": dtype, "threads": count, "row": row,
                            "seconds": round(statistics.median(own), 3),
                            "ratio": round(statistics.median(ratios), 3),
                            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                            "target": TARGETS.get(row, {}).get(dtype),
                        }
                    )  # fmt: skip
                    if not times_only:
                        checkpointed = round(memory[row, True]) if (row, True) in memory else None
                        results[-1] |= {"peak_mb": round(memory[row, False]), "peak_mb_checkpointed": checkpointed}
                    print(" | ".join(str(value) for value in results[-1].values()), file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times-only", action="store_true", help="keep the peak memory that the file has")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the peers installed")
    for option in ("--model", "--dtype", "--row"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    for option in ("--child", "--checkpointing"):
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import torch

        torch.set_num_threads(options.threads[0])
        of = options.model, options.dtype, options.threads[0]
        if options.row:
            print(json.dumps(run_memory(*of, options.row, checkpointing=options.checkpointing)))
        else:
            print(json.dumps(run_times(*of, options.rounds)))
        return
    of_all = options.models, options.dtypes, options.threads, options.rounds
    measured = {_key(row): row for row in measure_all(*of_all, times_only=options.times_only)}
    if options.out:
        import torch

        old = json.loads(options.out.read_text()) if options.out.is_file() else {"results": [], "peers": []}
        kept = {_key(row): row for row in old["results"]}
        peers = old["peers"]
        if options.peers:
            peers_file = options.out.with_name("profiling_peers.json")
            command = [options.peers, str(Path(__file__).with_name("profiling_peers.py")), "--out", str(peers_file)]
            subprocess.run(command, check=True)
            peers = json.loads(peers_file.read_text())
            peers_file.unlink()
        machine = {"processor": processor_name(), "cores": os.cpu_count(), "torch": torch.__version__}
        content = {
            "machine": machine | {"load": round(os.getloadavg()[2], 1)},
            "results": [kept.get(key, {}) | measured.get(key, {}) for key in kept | measured],
            "peers": peers,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(content))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "dtype", "threads", "row"))


if __name__ == "__main__":
    main()
