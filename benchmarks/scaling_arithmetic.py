"""The tables of docs/scaling.md: what profiling costs on 1, 8 and 64 GPUs, by arithmetic from published figures.

    python benchmarks/scaling_arithmetic.py

Nothing here was run on a GPU. Measured are the ratio of a measuring step to an ordinary one (benchmarks/results/
profiling.md, CPU), the bytes that a process sends for each measured parameter (benchmarks/results/parallel.json), the
speed of SHA-256 and the solver's time (benchmarks/results/solver_transformer.json).
"""

from __future__ import annotations

from dataclasses import dataclass

# Published: NVIDIA H100 SXM data sheet, dense bfloat16; NVLink 900 GB/s both ways; one 400 Gb/s InfiniBand port a GPU.
PEAK_FLOPS, GPU_GB, NVLINK_GB_S, NETWORK_GB_S = 989e12, 80.0, 450.0, 50.0
UTILISATION = 0.4  # assumed: what large dense steps commonly reach
STEP_RATIO = 1.05  # measured on CPU: Fisher + G, 0.94 to 1.04 of an ordinary step (profiling.md)
SUM_BYTES = 4.0  # float32, and measured: parallel.json, bytes for each entry of the sums and process
READ_GB_S, HASH_GB_S = 2.0, 1.38  # assumed: one client of a file server; measured: SHA-256 on one core
TOKENS = 512


@dataclass(frozen=True)
class Shape:
    """A model: all parameters, those that a token passes through, those of the matrices that are measured, and the
    entries of all sums, those for adapters after the output projections (n_out²) among them (1e9)."""

    name: str
    total: float
    active: float
    measured: float
    entries: float


MODELS = (
    Shape("7B (Llama 2)", 6.74, 6.74, 6.48, 6.48 + 64 * 4096**2 / 1e9),
    Shape("70B (Llama 2)", 68.98, 68.98, 68.45, 68.45 + 160 * 8192**2 / 1e9),
    Shape("mixture of experts (Mixtral 8x7B)", 46.70, 12.88, 1.34, 1.34 + 32 * 4096**2 / 1e9),
)


def compute_s(model: Shape, samples: int, gpus: int) -> float:
    """Passes take 4 FLOPs a parameter and token, sums 2 an entry; the ratio to an ordinary step covers the Fisher."""
    flops_per_token = 1e9 * (4 * model.active + 2 * model.entries) * STEP_RATIO
    return samples * TOKENS * flops_per_token / (gpus * PEAK_FLOPS * UTILISATION)


def main() -> None:
    """Print the tables."""
    print("| model | samples | 1 GPU | 8 GPUs | 64 GPUs |\n|---|---|---|---|---|")
    for model in MODELS:
        for samples in (256, 100_000):
            cells = [f"{compute_s(model, samples, gpus):,.3g} s" for gpus in (1, 8, 64)]
            if samples == 256:
                cells[2] = "16 batches are too few"
            print(f"| {model.name} | {samples:,} | {' | '.join(cells)} |")
    print("\n| model | weights, bf16 | gradient sums, float32 | both on one GPU | FSDP on 8 | FSDP on 64 |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        weights, sums = 2 * model.total, SUM_BYTES * model.entries
        cells = [f"{weights + sums:,.0f} GB", *(f"{(weights + sums) / gpus:,.1f} GB" for gpus in (8, 64))]
        print(f"| {model.name} | {weights:,.0f} GB | {sums:,.0f} GB | {' | '.join(cells)} |")
    print(
        "\n| model | one process sends | 8: NVLink | 64: network | FSDP moves in a step, 8 | 64 | tokens to hide 64 |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        sums = SUM_BYTES * model.entries
        # Two gathers of the bfloat16 weights and one reduce-scatter of the float32 sums.
        gathered = {gpus: (2 * 2 * model.total + sums) * (gpus - 1) / gpus for gpus in (8, 64)}
        per_token_s = 1e9 * (4 * model.active + 2 * model.entries) * STEP_RATIO / (PEAK_FLOPS * UTILISATION)
        hide = gathered[64] / NETWORK_GB_S / per_token_s
        print(
            f"| {model.name} | {sums:,.1f} GB | {sums / NVLINK_GB_S:.2f} s | {sums / NETWORK_GB_S:.2f} s | "
            f"{gathered[8]:,.0f} GB, {gathered[8] / NVLINK_GB_S:.2f} s | {gathered[64]:,.0f} GB, "
            f"{gathered[64] / NETWORK_GB_S:.2f} s | {hide:,.0f} |"
        )
    print("\n10,000 models a day, one every 8.64 s; GPU seconds and others for each model of 7B, 256 samples")
    model = MODELS[0]
    read, hashed, measure = 2 * model.total / READ_GB_S, 2 * model.total / HASH_GB_S, compute_s(model, 256, 1)
    print(
        f"read {read:.1f} s, fingerprint {hashed:.1f} s, measure {measure:.1f} s; sum {read + hashed + measure:.1f} s"
    )
    print(f"GPUs busy: {(read + hashed + measure) / 8.64:.1f}; if only measuring held one: {measure / 8.64:.1f}")
    print(f"from storage: {1e4 * 2 * model.total / 1e3:,.0f} TB a day, {1e4 * 2 * model.total / 86400:.2f} GB/s")


if __name__ == "__main__":
    main()
