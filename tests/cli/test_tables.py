"""The tables at the end of a run: nothing is cut off at the usual widths, and every number is the manifest's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from example_manifests import MEASURED, few, manifest, minilm, row
from rich.console import Console, RenderableType

from layerlens.cli import tables
from layerlens.cli.output import amount, gap, scaled, share, significant
from layerlens.manifest.layer_names import Position, positions
from layerlens.models import CalibrationSummary, Manifest, Predicted, ResourceUse


def drawn(part: RenderableType, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("example", [minilm(), few()], ids=["blocks", "few"])
def test_nothing_is_cut_off(example: Manifest, width: int) -> None:
    for part in (tables.chosen(example), tables.budgets(example.resources), tables.certificate(example)):
        assert "…" not in drawn(part, width)
        assert max(len(line) for line in drawn(part, width).splitlines()) <= width


def test_large_numbers_fit_80_columns() -> None:
    uses = [
        ResourceUse("trainable_params", 120_000_000.0, 0.0, 119_999_999.0, 119_999_999.0, 0.0, ""),
        ResourceUse("flops", 6.5e14, 0.0, 6.42e14, 6.42e14, 0.0, ""),
        ResourceUse("vram_gb", 1234.5, 1111.0, 0.000123, 1111.000123, 0.0, ""),
        ResourceUse("latency_ms", None, 0.123, 12345.6, 12345.7, 0.0, ""),
    ]
    text = drawn(tables.budgets(uses), 80)
    assert "…" not in text
    for number in ("119,999,999", "120,000,000", "642 T", "1,111 GB", "0.123 MB", "12,346 ms", "no limit", ">99 %"):
        assert number in text


def test_blocks_by_roles() -> None:
    lines = drawn(tables.chosen(minilm())).splitlines()
    assert lines[3].split() == ["block", "query", "key", "value", "output", "attention", "intermediate", "output"]
    assert lines[5].split() == ["0", "L1", "·", "L1", "A1", "·", "·", "L1"]
    assert lines[8].split() == ["3", "A8", "·", "·", "L8", "P8", "·", "L8"]
    told = " ".join(" ".join(lines).split())
    assert "23 of 42 layers adapted: lora on 14 (39.2 k parameters)" in told
    share = minilm().lora_share
    assert 0.5 < share < 0.8
    assert f"LoRA: peft/ holds {100 * share:.0f} % of the chosen parameters; the adapters and prefixes are in" in told


def test_equal_neighbours_share_a_line() -> None:
    rows = [
        row(f"model.layers.{block}.mlp.{name}", "lora", 4 if block < 30 else 8)
        for block in range(32)
        for name in ("up", "down")
    ]
    lines = drawn(tables.chosen(manifest(rows))).splitlines()
    assert [line.split() for line in lines if "L" in line and "LoRA" not in line] == [
        ["0–29", "L4", "L4"],
        ["30–31", "L8", "L8"],
    ]


def test_two_stacks_and_layers_outside_of_blocks() -> None:
    rows = [row(f"{side}.block.{block}.q", "lora", 2) for side in ("encoder", "decoder") for block in range(6)]
    text = drawn(tables.chosen(manifest([*rows, row("embed.proj", "lora", 4), row("lm_head")])))
    assert "encoder.block 0–5" in text
    assert "decoder.block 0–5" in text
    assert "embed.proj" in text
    assert "lm_head" not in text


def test_few_layers_are_listed_by_name() -> None:
    text = drawn(tables.chosen(few()))
    assert "model.layers.3.self_attn.v_proj  adapter    16" in text
    assert "45 other layers are unchanged." in text


def test_nothing_adapted() -> None:
    assert "No layer is adapted" in drawn(tables.chosen(manifest([row("a"), row("b")])))


def test_budget_bars() -> None:
    text = drawn(tables.budgets(minilm().resources))
    assert "▓▓▓▓▓▓▓▓█░" in text  # memory: 0.306 base + 0.0412 added of 0.4
    assert "██████████  96 %" in text  # 57.3 of 60 rounds to a full bar
    assert "110 %" in text
    assert "no limit" in drawn(tables.budgets(few().resources))


def test_certificate() -> None:
    assert "optimal (proved): its score is 11.2, " in drawn(tables.certificate(few()))
    near = replace(few(), gap=4e-7)
    assert "optimal (proved, gap <0.0001 %)" in drawn(tables.certificate(near))
    assert "within 0.03 % of the optimum (proved)" in drawn(tables.certificate(minilm()))


def test_measured() -> None:
    table = tables.measured(MEASURED)
    assert table is not None
    text = drawn(table, 80)
    assert "latency of the base model              55.1 ms    48.8 ms  +12.9 %" in text
    assert "largest change of a logit at step 0          0  exactly 0" in text
    assert tables.measured({}) is None
    moved = tables.measured({"step_zero_max_abs_delta": 1.5e-6})
    assert moved is not None
    assert "1.5e-06" in drawn(moved)


def test_positions() -> None:
    names = ["bert.layer.3.attention.self.query", "bert.layer.3.output.dense", "bert.layer.3.attention.output.dense"]
    places = positions([*names, "bert.layer.3.attention.self", "encoder.layer.7", "classifier", "3.weight"])
    assert places[names[0]] == Position("bert.layer", 3, "query")
    assert places[names[1]] == Position("bert.layer", 3, "output")
    assert places[names[2]] == Position("bert.layer", 3, "attention.output")
    assert places["bert.layer.3.attention.self"] == Position("bert.layer", 3, "attention")
    assert places["encoder.layer.7"] == Position("encoder.layer", 7, "block")
    assert places["classifier"] == Position("", None, "classifier")
    assert places["3.weight"] == Position("", 3, "weight")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (amount("trainable_params", 59_904.0), "59,904"),
        (amount("flops", 57.3e6), "57.3 M"),
        (amount("vram_gb", 0.0412), "41.2 MB"),
        (amount("vram_gb", 0.0), "0 GB"),
        (amount("latency_ms", 0.5), "0.5 ms"),
        (scaled(999.6e6), "1 G"),
        (scaled(12.0), "12"),
        (significant(1234.5), "1,234"),
        (significant(0.00001234), "1.23e-05"),
        (share(0.9999), ">99 %"),
        (share(1.0), "100 %"),
        (share(0.001), "<1 %"),
        (share(0.0), "0 %"),
        (gap(0.0), "0 %"),
        (gap(4e-14), "<0.0001 %"),
        (gap(0.00031), "0.031 %"),
    ],
)
def test_numbers_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text


SUMMARY = CalibrationSummary(
    proxies=24, planned=24, steps=16, learning_rate=1e-3, held_out_samples=32, base_loss=0.7, mean_standard_error=1e-3,
    leave_one_out_rmse=1e-3, options=24, spearman=0.7, spearman_interval=(0.4, 0.9), by_method={}, curves={},
)  # fmt: skip
CALIBRATED = Predicted(0.0123, (0.008, 0.02), calibrated=True, calibration=SUMMARY)


def test_what_the_proxies_showed() -> None:
    told = tables.calibration(CALIBRATED)
    assert told is not None
    text = " ".join(drawn(told, 80).split())
    assert "Predicted loss drop: 0.0123 per sample (95 %: 0.008 to 0.02), from 24 options" in text
    assert "Spearman of 0.70 (95 %: 0.40 to 0.90)." in text
    assert tables.calibration(Predicted(1.0, calibrated=False)) is None
    alike = replace(CALIBRATED, calibration=replace(SUMMARY, spearman=None, spearman_interval=None))
    assert "too similar to say" in " ".join(drawn(tables.calibration(alike) or "").split())
    checks = {
        "loss_drop": {"predicted": 0.0123, "measured": 0.011, "relative_error": 0.12, "standard_error": 0.002},
        "loss_drop_over_uniform": {"measured": 0.003, "standard_error": 0.001},
    }
    shown = drawn(tables.measured(checks) or "", 80)
    assert "0.011 ± 0.002" in shown
    assert "0.003 ± 0.001" in shown
    assert "…" not in shown
