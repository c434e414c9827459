"""report.html: self-contained, the same bytes for the same run, well-formed and labelled, whatever the names are."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import hashlib
import math
import re
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from layerlens.manifest import formats, layers, write_report
from layerlens.manifest import frontier as frontier_section_module
from layerlens.manifest.curves import bands
from layerlens.manifest.figures import Curve, utility_curves
from layerlens.manifest.formats import number, percent, quantity, signed_percent
from layerlens.manifest.frontier import frontier_section
from layerlens.manifest.layers import Place, heat_map, place_of
from layerlens.manifest.page import report_script
from layerlens.manifest.training import CHOICE, training_page
from layerlens.models import (
    CostTable,
    FrontierRow,
    LayerExplanation,
    LayerStatistics,
    ManifestRow,
    MethodStatistics,
    ModelFacts,
    ModelStatistics,
    Option,
    Predicted,
    ProxyGain,
    ProxyStudy,
    ResourceUse,
    SolverEvent,
    UtilityTable,
)
from layerlens.models.data_summary import DataSummary
from layerlens.models.recipe import Recipe
from layerlens.utility.calibration import calibrate

ROOT = Path(__file__).parents[2]

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
MEASURED = {
    "step_zero_max_abs_delta": 0.0,
    "flops": {"predicted": 1.5e9, "measured": 1.4e9, "relative_error": 0.0714},
    "base_latency_ms": {"predicted": 30.25, "measured": 44.0, "relative_error": -0.3125},
}


class Page(HTMLParser):
    """Every element with its attributes; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def tables(manifest):
    options, utility, params = [], [], []
    for row in manifest.allocations:
        options.append(Option(row.layer, "none", 0))
        utility.append(0.0)
        params.append(0)
        for rank in (1, 2, 3, 4):
            options.append(Option(row.layer, "lora" if row.method == "none" else row.method, rank))
            utility.append(0.1 * math.sqrt(rank))
            params.append(768 * rank)
    cost__ro = np.zeros((4, len(options)))
    cost__ro[0] = params
    return UtilityTable(tuple(options), np.array(utility), "signal", "nats"), CostTable(tuple(options), cost__ro, {})


@pytest.fixture
def statistics(manifest):
    fields = {field.name for field in dataclasses.fields(ModelStatistics)}
    footprint = {"forward_flops": 1e6} if "forward_flops" in fields else {}
    layer = manifest.allocations[0].layer
    measured = LayerStatistics(layer, {"lora": MethodStatistics(2.0, 30.0, 1.5, 1.0)})
    return ModelStatistics((measured,), 256, 18_211, 2.31, 1e5, **footprint)


@pytest.fixture
def report(manifest, statistics, tmp_path):
    def write(manifest=manifest, measured=MEASURED, name="report.html", **more):
        utilities, costs = tables(manifest)
        path = tmp_path / name
        write_report(
            path, manifest=manifest, utilities=utilities, costs=costs, statistics=statistics, measured=measured, **more
        )
        return path.read_text(encoding="utf-8")

    return write


def test_the_same_run_gives_the_same_bytes(report):
    assert report() == report(name="again.html")


def test_nothing_is_fetched_and_nothing_but_its_own_script_runs(report):
    text = report()
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script == report_script()
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|import|eval)\b", script)
    for _, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "src", "xlink:href", "action"):
                assert value.startswith("#"), value
    assert not re.search(r"url\((?!#)|@import", text)
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_it_can_be_read_by_ear_and_by_keyboard(report):
    page = Page(report())
    assert page.of("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(key, "").split()) <= set(ids)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert page.of("th")
    assert all(header["scope"] in ("row", "col", "rowgroup") for header in page.of("th"))
    assert len(page.of("svg")) == 4
    assert all(figure["role"] == "img" and figure["aria-labelledby"] for figure in page.of("svg"))
    assert len(page.of("desc")) == 4
    assert all(box["tabindex"] == "0" for box in page.of("div") if box.get("class") == "scroll")
    assert all(bar["aria-label"] for bar in page.of("div") if bar.get("class") == "bar")


def test_it_says_what_the_manifest_says(report):
    text = Page(report()).text
    for words in (
        "3 of 4 layers adapted",
        "1 LoRA",
        "7,311 trainable parameters",
        "7,311 of 8,000 (91.4 %)",
        "400 MB of 500 MB (80 %)",
        "300 MB frozen model, 100 MB added, 100 MB free",
        "786.4 kFLOP, no limit",
        "0.125 score per ms",
        "Gap 0.1332 %",
        "adapter 3",
        "1.5 GFLOP 1.4 GFLOP +7.1 %",
        "Forward latency of the frozen model 30.2 ms 44 ms ⚠ −31.2 %",
        "Marked (⚠): the prediction misses by more than 20 %. Forward latency: the profile describes an idle machine",
        "Largest change of any logit before the first step: 0",
        "18,211",
        "25 %",  # noise of the first layer: 1 - 1.5/2
        "chosen: LoRA 4",
        "chosen: none",
        "versions. layerlens 0.1.0",
    ):
        assert words in text, words


def test_without_checks_it_says_so(report):
    assert "This run measured nothing" in Page(report(measured={})).text


HULL = (FrontierRow("hull", 0.0, 0.0, 0.0, 0.0, "optimal"), FrontierRow("hull", 16_000.0, 1.5, 1.5, 0.0, "optimal"))
EVENTS = (SolverEvent(0.001, "multipliers", None, 0.8), SolverEvent(0.002, "guided search", 0.75, 0.751))


def test_frontiers_have_the_chosen_point_and_tell_what_other_budgets_would_buy(report):
    page = Page(report(hulls={"trainable_params": HULL, "vram_gb": HULL[:1]}))
    assert len(page.of("svg")) == 5  # a hull of one point has nothing to show
    # A line through (0, 0) and (16,000, 1.5): 4,000 buys half of the chosen score of 0.75, 8,000 all of it, and so on.
    assert "Trainable parameters 50 % 4,000 100 % 8,000 200 % 16,000 200 % 32,000" in page.text
    assert "the chosen point uses 7,311" in page.text
    assert "What a larger budget buys" not in Page(report()).text


def test_a_budget_of_whose_hull_nothing_fits_and_one_below_the_frozen_model(manifest):
    use = ResourceUse("vram_gb", 0.5, 0.3, 0.1, 0.4, 0.0, "counted")
    dear = tuple(dataclasses.replace(row, budget=row.budget + 0.45) for row in HULL)
    [entry] = frontier_section(dataclasses.replace(manifest, resources=(use,)), {"vram_gb": dear})
    assert entry["steps"][0]["share"] == "nothing fits"  # half of 0.2 GB above 0.3 is less than 0.45
    over = dataclasses.replace(use, budget=0.2)
    assert frontier_section(dataclasses.replace(manifest, resources=(over,)), {"vram_gb": HULL}) == []
    assert frontier_section(dataclasses.replace(manifest, score=0.0), {"trainable_params": HULL}) == []


def test_a_hull_of_many_points_is_thinned_and_keeps_its_shape(manifest):
    budgets = np.linspace(0.0, 40_000.0, 5_000)
    hull = tuple(FrontierRow("hull", float(b), math.sqrt(b), 0.0, 0.0, "optimal") for b in budgets)
    x, y = frontier_section_module._drawn(budgets, np.sqrt(budgets), 33_600.0)
    assert len(x) <= frontier_section_module.MOST_POINTS + 1
    assert (x[0], x[-1]) == (0.0, 33_600.0)
    # The chord of a square root is furthest below it between 0 and the first point, x1: by y1/4, at x1/4.
    np.testing.assert_allclose(
        np.interp(budgets[budgets < x[-1]], x, y), np.sqrt(budgets[budgets < x[-1]]), atol=y[1] / 4
    )
    assert frontier_section(manifest, {"trainable_params": hull})


def noisy(signal):
    measured = MethodStatistics(energy=16.0, trace=30.0, signal=signal, input_mean_square=1.0)
    return ModelStatistics((LayerStatistics("a", {"lora": measured}),), 8, 64, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("model", "signal", "low", "high"),
    [
        ("tempered_energy", 1.0, 1.0, 2.0),  # 16^¼ = 2 with the noise, 1^¼ without
        ("gradient", 1.0, 1.0, 4.0),
        ("tempered_energy", -3.0, 0.0, 2.0),
        ("tempered", 1.0, 1.0, 2.0),
        ("signal", 1.0, 1.0, 4.0),
    ],
)
def test_bands_go_from_the_utility_without_sampling_noise_to_that_with_it(model, signal, low, high):
    own = {"tempered_energy": 2.0, "gradient": 4.0, "tempered": 1.0, "signal": 1.0}[model]
    table = UtilityTable((Option("a", "lora", 1),), np.array([own]), model, "relative")
    found = bands(table, noisy(signal))
    assert (found[0][0], found[1][0], found[2]) == (pytest.approx(low), pytest.approx(high), "noise")


def test_bands_that_nothing_is_known_of_are_not_drawn():
    option = (Option("a", "lora", 1),)
    for table, statistics in (
        (UtilityTable(option, np.array([1.0]), "tempered_energy", "relative"), noisy(None)),
        (UtilityTable(option, np.array([1.0]), "uniform", "relative"), noisy(1.0)),
    ):
        low, high, source = bands(table, statistics)
        assert source == ""
        assert np.isnan([low[0], high[0]]).all()
    # The energy behind a utility of 0 cannot be told from it.
    low, _, source = bands(UtilityTable(option, np.array([0.0]), "signal", "relative"), noisy(-1.0))
    assert (source, math.isnan(low[0])) == ("noise", True)


def test_calibrated_curves_have_the_percentiles_of_their_replicates(manifest, statistics, tmp_path):
    utilities, costs = tables(manifest)
    options = [option for option in utilities.options if option.method == "lora"][:4]
    study = ProxyStudy(tuple(ProxyGain(option, 0.1 * option.rank, 0.01) for option in options), 4, 5, 1e-3, 50, 1.0)
    calibrated = calibrate(utilities, study)
    low, high, source = bands(calibrated, statistics)
    assert source == "proxies"
    replicates = calibrated.calibration.replicates__bo
    np.testing.assert_array_equal([low, high], np.percentile(replicates, [2.5, 97.5], axis=0))
    told = dataclasses.replace(manifest, predicted=Predicted(0.3, (0.1, 0.5), calibrated=True))
    write_report(
        tmp_path / "r.html", manifest=told, utilities=calibrated, costs=costs, statistics=statistics, measured={}
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "0.3 predicted loss drop, 95 %: 0.1 to 0.5" in page.text
    assert "fitted to resampled proxies" in page.text


def test_two_thousand_layers_stay_below_two_megabytes(manifest, report):
    rows = []
    roles = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate", *(f"mlp.experts.{i}.up_proj" for i in range(39))]
    for block in range(48):
        for role in roles:
            chosen = ("lora", 8, 0.5, 12_288) if role != "mlp.gate" else ("none", 0, 0.0, 0)
            rows.append(ManifestRow(f"model.layers.{block}.{role}", *chosen, 1.5e6, 1e-4, 0.25, chosen[2]))
    why = [
        LayerExplanation((row.layer,), Option(row.layer, "lora", 8), Option(row.layer, "lora", 4), 0.01234, {}, True)
        for row in rows
    ]
    text = report(dataclasses.replace(manifest, allocations=tuple(rows)), explanations=why)
    assert len(rows) == 2016
    assert len(text.encode()) < 2_000_000
    assert "model.layers.47</strong> <span class=" in text.replace("<wbr>", "")
    assert "41 of 42 layers adapted, 503,808 parameters, score 20.5" in text
    assert text.count("LoRA 8 × 39</span>") == 48  # the experts of a block are one cell of the heat map


def trained(losses, after, baseline=None):
    facts = {
        "model": {"name_or_path": "a <model>"},
        "samples": {"train": 1200, "evaluation": 100},
        "before": {"accuracy": 0.5},
        "after": after,
        "training": {"losses": losses, "steps": len(losses), "best_step": len(losses), "trained_parameters": 5120},
        "measured": {"wall_seconds": 12.34, "tokens_per_second": 1500.0, "peak_memory_gb": 1.5},
    }
    return facts | ({"baseline": {"name": baseline}} if baseline else {})


def test_a_training_is_shown_in_the_report_with_uniform_lora_beside_it(report):
    own = trained([2.0, 1.0, 0.5], {"accuracy": 0.75})
    alone = training_page([own], report())
    page = Page(alone)
    assert "Training loss: this choice: from 2 to 0.5." in page.text
    assert "--baseline uniform-lora" in page.text
    assert "On the test split Before this choice accuracy 0.5 0.75" in page.text
    long = trained(list(np.linspace(3.0, 1.0, 5_000)), {"accuracy": 0.7}, "uniform-lora")
    both = training_page([own, long], alone)  # in place of the earlier section
    page = Page(both)
    assert both.count('<section id="training"') == 1
    assert both.count('href="#training"') == 1
    assert "On the test split Before this choice uniform-lora accuracy 0.5 0.75 0.7" in page.text
    assert "small differences may be chance" in page.text
    assert len(both) - len(alone) < 60_000  # 5,000 steps become 300 points
    assert training_page([own, long], report()) == both


def test_a_training_without_a_report_has_a_page_of_its_own():
    for report in (None, "<p>a report of an earlier version</p>"):
        page = Page(training_page([trained([], {}), trained([1.0], {}, "eva")], report))
        assert page.of("h1")
        assert "a <model>" in page.text
        assert CHOICE in page.text
        assert not page.of("script")


def report_checks():
    found = spec_from_file_location("report_checks", ROOT / "scripts/report_checks.py")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("whole", [True, False])
def test_it_works_in_a_browser(whole, report, manifest, tmp_path):
    """On a desk, on a phone, in the dark, on paper, by keyboard and by axe-core's rules: scripts/report_checks.py."""
    checks = report_checks()
    chromium = checks.find_chromium()
    if chromium is None:
        pytest.skip("no Chromium to open the report in: apt-get install chromium, or set CHROMIUM")
    if whole:
        layers = [row.layer for row in manifest.allocations]
        options = [Option(layers[0], "lora", rank) for rank in (4, 2)]
        why = LayerExplanation(tuple(layers), options[0], options[1], 0.01, {}, True)
        recipe = Recipe("PEFT", "from peft import PeftModel\n", "Ready to train.")
        report(
            hulls={"trainable_params": HULL, "latency_ms": HULL}, events=EVENTS, explanations=[why], recipes=[recipe],
            created_at="2026-11-30T12:00:00+00:00", recipes_from="this folder", data=DataSummary("reviews.jsonl", 9, 9),
        )  # fmt: skip
    else:  # what is not there may be missed by a reader, but not by an id
        report(dataclasses.replace(manifest, allocations=(), resources=()), measured={})
    found = dict(checks.check_report(tmp_path / "report.html", chromium))
    assert len(found) == 17
    assert {check: wrong for check, wrong in found.items() if wrong} == {}


def test_names_cannot_break_the_page(manifest, report):
    hostile = '<script>alert("1")</script> $x_1$ & {{ 7 * 7 }}'
    row = dataclasses.replace(manifest.allocations[0], layer=hostile)
    changed = dataclasses.replace(
        manifest, allocations=(row, *manifest.allocations[1:]), solver=hostile, model=ModelFacts(name_or_path=hostile)
    )
    page = Page(report(changed))
    assert len(page.of("script")) == 1  # its own
    assert page.text.count(hostile) >= 3


def test_a_manifest_that_adapts_nothing_and_one_of_whole_blocks(manifest, report):
    none = tuple(dataclasses.replace(row, method="none", rank=0, cost=0) for row in manifest.allocations)
    assert "0 of 4 layers adapted:" in Page(report(dataclasses.replace(manifest, allocations=none))).text
    blocks = tuple(ManifestRow(f"encoder.layer.{index}", "lora", 4, 0.5, 10, 0.0, 0.0, 0.0, 0.5) for index in range(3))
    page = Page(report(dataclasses.replace(manifest, allocations=blocks, resources=())))
    assert "block block 0 LoRA 4 1 LoRA 4 2 LoRA 4" in page.text
    empty = dataclasses.replace(manifest, allocations=())
    assert "0 of 0 layers adapted" in Page(report(empty)).text


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.11.attention.self.query", Place("11", "query")),
        ("model.layers.3.mlp.gate_proj", Place("3", "ffn gate")),
        ("transformer.h.0.attn", Place("0", "attn")),
        ("model.layers.3.block_sparse_moe.experts.7.w1", Place("3", "block_sparse_moe.experts.7.w1")),
        ("3.attn", Place("3", "attn")),
        ("bert.encoder.layer.0.attention.self", Place("0", "attention")),
        ("encoder.layer.4", Place("4", "block")),
        ("lm_head", Place("", "lm_head")),
        ("layer10.proj", Place("", "layer10.proj")),
    ],
)
def test_block_and_role_come_from_the_name(name, place):
    assert place_of(name) == place


def test_heat_map_places_every_layer_once(manifest):
    heat = heat_map(manifest.allocations)
    shown = [option["layer"] for block in heat["blocks"] for cell in block["cells"] for option in cell]
    assert sorted(shown) == sorted(row.layer for row in manifest.allocations)
    assert all(len(block["cells"]) == len(heat["roles"]) for block in heat["blocks"])
    twins = [ManifestRow(f"{side}.layer.0.attention.self.query", "lora", 1, 0, 1, 0, 0, 0, 0) for side in ("a", "b")]
    (block,) = heat_map(twins)["blocks"]
    assert [len(cell) for cell in block["cells"]] == [2]


def test_figures_follow_the_page_and_stand_alone():
    from matplotlib import rc_context

    curve = Curve("lora", (10, 20), (0.1, 0.2), (1, 2))
    one, two = (
        utility_curves([curve], ("lora", 2), top=1.0, title="a < b", description="d", prefix=prefix)
        for prefix in ("one", "two")
    )
    assert one.replace("one-", "two-") == two
    assert "var(--lora)" in one
    assert "var(--ink)" in one
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]", one)
    assert '<title id="one-title">a &lt; b</title>' in one
    with rc_context({"font.size": 30, "axes.grid": False}):  # a style of the user's changes nothing
        same = utility_curves([curve], ("lora", 2), top=1.0, title="a < b", description="d", prefix="one")
    assert same == one
    plain = utility_curves([curve], None, top=1.0, title="a < b", description="d", prefix="one")
    assert plain != one  # the ring


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0"),
        (number(1e15), "1×10¹⁵"),
        (number(99.996), "100"),
        (number(2440.3), "2,440"),  # its last digit is no place behind a point
        (number(1000.2), "1,000"),
        (number(0.1 + 0.2), "0.3"),
        (quantity("flops", 999.96e6), "1 GFLOP"),
        (quantity("vram_gb", 0.0), "0 B"),
        (quantity("latency_ms", 1234.5), "1,234 ms"),
        (quantity("trainable_params", 41_234), "41,234"),
        (percent(1.0), "100 %"),
        (percent(1.0, digits=0), "100 %"),
        (percent(0.000002), "0.0002 %"),
        (percent(3e-14), "< 0.0001 %"),
        (signed_percent(0.031), "+3.1 %"),
        (signed_percent(-0.0001), "−0.01 %"),
        (signed_percent(0.0), "0 %"),
    ],
)
def test_numbers_are_short_and_have_units(shown, expected):
    assert shown == expected


@pytest.mark.parametrize("module", [formats, layers])
def test_examples_in_docstrings_hold(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried > 0
