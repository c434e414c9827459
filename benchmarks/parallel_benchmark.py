"""Measuring with several processes: speed-up, bytes over the wire, and how time grows with samples and with depth.

    python benchmarks/parallel_benchmark.py --out benchmarks/results/parallel.json

Each process has one thread and computes its share of the calibration batches of a BERT-shaped model with random weights
(the default statistics: energy of the mean gradient; and the Fisher trace). One process and two take turns, and the
slower of the two counts. ``speed_up`` is of wall time, and says nothing on a machine whose cores have other work (see
the load average); ``cpu_speed_up`` is of each process's own CPU time: how evenly, and with how little extra work, the
job is divided. The two fits are of CPU time of one process on one thread. ``reduced_bytes`` is what the processes
beside the first put on the wire, in all and for each entry of the summed matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.utils.processor import processor_name

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 128}
DEPTH, SAMPLES, TOKENS, BATCH = 4, 96, 64, 8
SAMPLE_STEPS, DEPTH_STEPS = (16, 32, 48, 64, 96), (1, 2, 4, 6, 8)


def job(depth: int, samples: int) -> dict[str, Any]:
    """A model and batches, as arguments of ``measure_share``."""
    from transformers import BertConfig, BertForSequenceClassification

    from layerlens.integrations.layers import model_spec
    from layerlens.integrations.pretrained import PretrainedModel
    from layerlens.profiling.request import StatisticsRequest
    from layerlens.tasks.batches import Batch
    from layerlens.tasks.losses import classification_loss
    from layerlens.utils.progress import silent

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=depth, **SHAPE)).eval().requires_grad_(False)
    spec = model_spec(PretrainedModel(model, None, "", ("classifier.weight",)), "bert-shaped")
    ids = torch.randint(1, 30000, (samples, TOKENS))
    index = torch.arange(samples)
    batches = [
        Batch({"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part])}, index[part] % 2, index[part])
        for part in (slice(start, start + BATCH) for start in range(0, samples, BATCH))
    ]
    return {
        "model": model, "spec": spec, "batches": batches, "request": StatisticsRequest.of(["fisher", "gradient"]),
        "sequence_length": TOKENS, "threads": 1, "progress": silent, "loss": classification_loss,
        "other_modules": (), "saved": None,
    }  # fmt: skip


def one(rank: int, size: int, port: int, rounds: int, out: str) -> None:
    """Process ``rank``: rounds alone (process 0) and together in turns; what it took goes to a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    from layerlens.profiling.measure import measure_share
    from layerlens.utils.processes import ALONE, joined

    arguments = job(DEPTH, SAMPLES)
    layers = arguments["spec"].layers
    entries = sum(layer.n_in * layer.n_out for layer in layers if "lora" in layer.methods)
    entries += sum(layer.n_out**2 for layer in layers if "adapter" in layer.methods)
    width = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    entries += sum(layer.num_heads * width * (width + 1) for layer in layers if "prefix" in layer.methods)
    times: dict[str, list[float]] = {"alone_s": [], "alone_cpu_s": [], "together_s": [], "together_cpu_s": []}

    def timed(name: str, together: Any) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        measure_share(**arguments, processes=together)
        times[f"{name}_s"].append(time.perf_counter() - start)
        times[f"{name}_cpu_s"].append(time.process_time() - cpu)

    found: dict[str, Any] = {"summed_entries": entries}
    with joined("gloo", "cpu", 300.0) as processes:
        for number in range(rounds + 1):
            processes.everyone("round", number)
            if processes.first:
                timed("alone", ALONE)
            processes.everyone("together", number)
            before = processes.bytes_sent
            timed("together", processes)
            found["reduced_bytes"] = processes.bytes_sent - before
    found |= {name: seconds[1:] for name, seconds in times.items()}  # the first warms up
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def speed_up(size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One process against ``size`` of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        one, args=(size, port, rounds, str(folder)), nprocs=size, start_method="spawn"
    )
    parts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    together = [max(times) for times in zip(*(part["together_s"] for part in parts), strict=True)]
    pairs = list(zip(parts[0]["alone_s"], together, strict=True))
    slower = [max(times) for times in zip(*(part["together_cpu_s"] for part in parts), strict=True)]
    sent = sum(part["reduced_bytes"] for part in parts)
    return {
        "processes": size,
        "one_process_s": statistics.median(parts[0]["alone_s"]),
        "together_s": statistics.median(together),
        "speed_up": statistics.median(alone / both for alone, both in pairs),
        "speed_up_range": [min(alone / both for alone, both in pairs), max(alone / both for alone, both in pairs)],
        "one_process_cpu_s": statistics.median(parts[0]["alone_cpu_s"]),
        "slower_process_cpu_s": statistics.median(slower),
        "cpu_speed_up": statistics.median(a / b for a, b in zip(parts[0]["alone_cpu_s"], slower, strict=True)),
        "reduced_bytes": sent,
        "reduced_bytes_per_summed_entry_and_process": sent / (size - 1) / parts[0]["summed_entries"],
        "rounds": rounds,
    }


def cpu_seconds(depth: int, samples: int, rounds: int) -> float:
    """CPU time of measuring, the least of some rounds: other work only ever adds to it."""
    from layerlens.profiling.measure import measure_share
    from layerlens.utils.processes import ALONE

    arguments = job(depth, samples)
    times = []
    for _ in range(rounds):
        start = time.process_time()
        measure_share(**arguments, processes=ALONE)
        times.append(time.process_time() - start)
    return min(times)


def line(x: tuple[int, ...], y: list[float]) -> dict[str, Any]:
    """y = intercept + slope · x by least squares, and how well that fits."""
    slope, intercept = np.polyfit(x, y, 1)
    left = np.asarray(y) - (intercept + slope * np.asarray(x))
    return {
        "x": list(x), "cpu_s": y, "intercept_s": float(intercept), "slope_s": float(slope),
        "r_squared": float(1.0 - (left @ left) / ((np.asarray(y) - np.mean(y)) @ (np.asarray(y) - np.mean(y)))),
        "largest_relative_residual": float(np.max(np.abs(left) / np.asarray(y))),
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out.parent / ".parallel"
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": {"cores": os.cpu_count(), "processor": processor_name()},
        "torch": torch.__version__,
        "model": {**SHAPE, "depth": DEPTH, "samples": SAMPLES, "tokens": TOKENS, "batch_size": BATCH},
        "two_processes": speed_up(arguments.processes, arguments.rounds, folder),
    }
    for part in folder.iterdir():
        part.unlink()
    folder.rmdir()
    by_samples = [cpu_seconds(DEPTH, samples, arguments.rounds) for samples in SAMPLE_STEPS]
    by_depth = [cpu_seconds(depth, SAMPLE_STEPS[1], arguments.rounds) for depth in DEPTH_STEPS]
    found["machine"]["load_average_1_5_15_min"] = os.getloadavg()  # with other work, wall times say little
    found["by_samples"], found["by_depth"] = line(SAMPLE_STEPS, by_samples), line(DEPTH_STEPS, by_depth)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    both = found["two_processes"]
    speeds = f"{both['speed_up']:.2f} times as fast as one, {both['cpu_speed_up']:.2f} times by CPU time"
    print(f"{both['processes']} processes: {speeds}; {both['reduced_bytes']:,} bytes")
    for name, what in (("by_samples", "samples"), ("by_depth", "blocks")):
        fit = found[name]
        print(
            f"CPU time = {fit['intercept_s']:.3f} s + {fit['slope_s']:.4f} s · {what}, R² = {fit['r_squared']:.5f}, "
            f"largest residual {100 * fit['largest_relative_residual']:.1f} %"
        )


if __name__ == "__main__":
    main()
