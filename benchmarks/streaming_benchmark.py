"""Profiling a checkpoint larger than memory: peak memory under a hard limit, time, waiting for reads, linear growth.

    python benchmarks/streaming_benchmark.py            # everything; writes results/streaming.json
    python benchmarks/streaming_benchmark.py --limit-gb 1.8 --keep DIRECTORY

A Llama-shaped checkpoint of 6.3 GB (32 blocks of 2048 features, grouped-query attention, float32) is written shard by
shard and profiled by a process whose address space is limited by RLIMIT_AS (``ulimit -v``): that limit is harder than
one of resident memory, since libraries, thread stacks and mapped files count too. Nothing of it is kept afterwards.
The same process then profiles models of the same shape and other sizes: their statistics are compared with those of
``measure`` in memory, and a line is fitted to the time against samples and against depth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.utils.processor import processor_name

RESULTS = Path(__file__).parent / "results" / "streaming.json"
BIG = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 30522,
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
MIDDLE = {**SMALL, "hidden_size": 512, "intermediate_size": 1408, "vocab_size": 2048}
STATISTICS = ("fisher", "gradient", "input_scale")
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc: the arena of every thread reserves 64 MB of address space, and freed blocks below a moving size stay in it."""
DEPTHS, SAMPLES = (2, 4, 8, 16), (8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gb", type=float, default=2.0, help="address space of the profiling process, 1e9 bytes")
    parser.add_argument("--samples", type=int, default=16, help="of the large model, 32 tokens each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep the large checkpoint here and use it again")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        json.dump(profile(json.loads(arguments.child)), sys.stdout)
        return
    place = arguments.keep or Path(tempfile.mkdtemp(prefix="layerlens-streaming-"))
    try:
        found = everything(place, arguments)
    finally:
        if arguments.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}")


def everything(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    common = {"threads": arguments.threads, "statistics": STATISTICS, "tokens": 32, "batch_size": 8}
    size = write_checkpoint(place / "big", BIG)
    print(f"large checkpoint: {1e-9 * size:.2f} GB in {len(list((place / 'big').glob('*.safetensors')))} shards")
    limit = {"limit_bytes": arguments.limit_gb * 1e9, "predict": True}
    big = run_child({**common, **limit, "batch_size": 4, "path": str(place / "big"), "samples": arguments.samples})
    print(
        f"profiled with an address space of {arguments.limit_gb:g} GB: {big['wall_s']:.0f} s, peak resident "
        f"{big['peak_resident_gb']:.2f} GB, peak address space {big['peak_address_space_gb']:.2f} GB, "
        f"waiting for reads {100 * big['waiting_share']:.1f} % of the time, {big['ms_per_token']:.1f} ms a token"
    )
    write_checkpoint(place / "small", SMALL)
    both = [
        run_child({**common, "path": str(place / "small"), "samples": 16, "mode": mode, "digest": True})
        for mode in ("streamed", "plain")
    ]
    equal = both[0]["digest"] == both[1]["digest"]
    print(f"statistics of the small model, streamed and in memory: {'the same bytes' if equal else 'DIFFERENT'}")
    memory = {}
    write_checkpoint(place / "middle-16", {**MIDDLE, "num_hidden_layers": 16})
    for mode in ("plain", "checkpointed", "streamed"):
        job = {**common, "path": str(place / "middle-16"), "samples": 32, "mode": mode, "predict": True}
        found = run_child({**job, "tokens": 128, "batch_size": 16})
        memory[mode] = {name: found[name] for name in ("predicted_peak_gb", "peak_resident_gb", "wall_s", "cpu_s")}
        print(
            f"{mode}: peak resident {found['peak_resident_gb']:.2f} GB, predicted {found['predicted_peak_gb']:.2f} GB"
        )
    fits: dict[str, Any] = {}
    for what, values in (("depth", DEPTHS), ("samples", SAMPLES)):
        seconds = []
        for value in values:
            shape = {**MIDDLE, "num_hidden_layers": value} if what == "depth" else MIDDLE
            folder = place / f"middle-{shape['num_hidden_layers']}"
            write_checkpoint(folder, shape)
            job = {**common, "path": str(folder), "samples": value if what == "samples" else 32}
            # Other work on the machine only ever adds processor time (caches), so the lesser of two counts.
            seconds.append(min(run_child(job)["cpu_s"] for _ in range(2)))
        fits[what] = line(values, seconds)
        print(
            f"processor time against {what} {values}: {fits[what]['slope_s']:.4f} s each, intercept "
            f"{fits[what]['intercept_s']:.3f} s, R² {fits[what]['r_squared']:.5f}"
        )
    return {
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "checkpoint": {**BIG, "bytes": size, "dtype": "float32"},
        "limit": {"kind": "RLIMIT_AS", "gb": arguments.limit_gb, "environment": ALLOCATOR},
        "large": big,
        "small_model_streamed_equals_in_memory": equal,
        "middle_shape": MIDDLE,
        "linear_fits": fits,
        "peak_memory_16_blocks_of_512_features_16_x_128_tokens": memory,
    }


def line(values: tuple[int, ...], seconds: list[float]) -> dict[str, Any]:
    """Least squares of a line."""
    slope, intercept = np.polyfit(values, seconds, 1)
    rest = np.asarray(seconds) - (slope * np.asarray(values) + intercept)
    spread = np.asarray(seconds) - np.mean(seconds)
    return {
        "values": list(values), "seconds": seconds, "slope_s": float(slope), "intercept_s": float(intercept),
        "r_squared": float(1.0 - (rest @ rest) / (spread @ spread)),
    }  # fmt: skip


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    """The profile of ``job`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **ALLOCATOR}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures and what it took; the limit holds from before torch is imported."""
    if "limit_bytes" in job:
        resource.setrlimit(resource.RLIMIT_AS, (int(job["limit_bytes"]),) * 2)
    import hashlib
    from contextlib import nullcontext

    import torch

    from layerlens.integrations.layers import model_spec
    from layerlens.jobs.memory_mode import checkpointed_activations
    from layerlens.profiling.measure import measure
    from layerlens.profiling.request import StatisticsRequest
    from layerlens.profiling.statistics_file import statistics_to_bytes
    from layerlens.profiling.streamed.measure_streamed import measure_streamed
    from layerlens.sources import load_pretrained
    from layerlens.tasks import Batch
    from layerlens.tasks.losses import causal_loss
    from layerlens.utils.progress import silent

    torch.set_num_threads(job["threads"])
    mode = job.get("mode", "streamed")
    streamed = mode == "streamed"
    before = vm()
    start, cpu = time.perf_counter(), time.process_time()
    pretrained = load_pretrained(job["path"], "causal-lm", (), streamed=streamed)
    spec = model_spec(pretrained, "generated")
    loaded_s, loaded_cpu = time.perf_counter() - start, time.process_time() - cpu
    draw = torch.Generator().manual_seed(0)
    vocabulary = pretrained.model.config.vocab_size
    batches = []
    for first in range(0, job["samples"], job["batch_size"]):
        count = min(job["batch_size"], job["samples"] - first)
        ids = torch.randint(0, vocabulary, (count, job["tokens"]), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append(Batch(inputs, ids.clone(), torch.arange(first, first + count)))
    predicted = {}
    if "predict" in job:
        from layerlens.jobs.memory_mode import predict_memory

        request = StatisticsRequest.of(job["statistics"])
        predicted = predict_memory(pretrained, spec, batches, request, job["tokens"])
    figures: dict[str, float] = {}
    settings: dict[str, Any] = {
        "request": StatisticsRequest.of(job["statistics"]), "sequence_length": job["tokens"],
        "threads": job["threads"], "progress": silent, "loss": causal_loss,
    }  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    if streamed:
        assert pretrained.streamed is not None
        statistics = measure_streamed(pretrained.model, pretrained.streamed, spec, batches, figures=figures, **settings)
    else:
        with checkpointed_activations(pretrained.model) if mode == "checkpointed" else nullcontext():
            statistics = measure(pretrained.model, spec, batches, **settings)
    wall, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    tokens = job["samples"] * job["tokens"]
    after = vm()
    return {
        "samples": job["samples"], "tokens": tokens, "batch_size": job["batch_size"], "threads": job["threads"],
        "statistics": list(job["statistics"]), "loading_and_fingerprint_s": loaded_s,
        "loading_and_fingerprint_cpu_s": loaded_cpu, "wall_s": wall, "cpu_s": cpu_s,
        "ms_per_token": 1e3 * wall / tokens, "cpu_ms_per_token": 1e3 * cpu_s / tokens,
        "resident_before_gb": before["VmRSS"], "address_space_before_gb": before["VmSize"],
        "peak_resident_gb": after["VmHWM"], "peak_address_space_gb": after["VmPeak"],
        "waiting_share": figures.get("waited_s", 0.0) / wall, **figures,
        "mean_loss": statistics.mean_loss, **({"predicted_peak_gb": predicted[mode]} if predicted else {}),
        **({"digest": hashlib.sha256(statistics_to_bytes(spec, statistics)).hexdigest()} if "digest" in job else {}),
    }  # fmt: skip


def vm() -> dict[str, float]:
    """Memory of this process in GB (1e9 bytes), from /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {x.split(":")[0]: 1e-9 * 1024 * int(x.split()[1]) for x in lines if x.startswith("Vm")}


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """A Llama of this shape with random weights, a shard for each block, one in memory at a time; its bytes."""
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, max_position_embeddings=256, pad_token_id=0, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(shape["vocab_size"])}
    words["<unk>"] = len(words) - 1
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="w0", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name.split("layers.")[1].split(".")[0] if "layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{part:0>6}.safetensors", []).append(name)
    draw, total, weight_map = torch.Generator().manual_seed(1), 0, {}
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            size = model.state_dict()[name].shape
            spread = 0.5 * (size[-1] if len(size) > 1 else 1) ** -0.5
            tensors[name] = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw).mul_(spread)
            total += tensors[name].nbytes
            weight_map[name] = shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(content), encoding="utf-8")
    return total


if __name__ == "__main__":
    main()
