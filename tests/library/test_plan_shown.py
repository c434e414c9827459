"""What a plan shows: in about 40 lines every rank where it belongs, and the same as a heat map in a notebook."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import layerlens
from layerlens.library.tables import WIDTH, plan_html, plan_text
from layerlens.models import Manifest, ManifestRow, ModelFacts, ResourceUse

ROLES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def row(layer: str, method: str = "none", rank: int = 0) -> ManifestRow:
    return ManifestRow(layer, method, rank, 0.5 * rank, 32 * rank, 1e6 * rank, 1e-4 * rank, 0.01 * rank, 0.5 * rank)


def manifest(rows: list[ManifestRow], **facts) -> Manifest:
    return Manifest(
        model=ModelFacts(name_or_path="m", total_params=100_000, **facts),
        allocations=tuple(rows),
        resources=(
            ResourceUse("trainable_params", 5000.0, 0.0, 4000.0, 4000.0, 0.25, "exact"),
            ResourceUse("vram_gb", None, 1.0, 0.5, 1.5, 0.0, "predicted"),
        ),
        score=1.5,
        upper_bound=1.6,
        gap=0.0625,
        status="feasible",
        solver="greedy-lagrangian",
        utility_model="auto",
        utility_unit="gain",
    )


def deep(n_blocks: int) -> list[ManifestRow]:
    """No two neighbours alike; ranks 1 to 4, one role with nothing."""
    return [
        row(f"model.layers.{block}.{role}", "lora", 1 + (block + k) % 4)
        if k < 2
        else row(f"model.layers.{block}.{role}")
        for block in range(n_blocks)
        for k, role in enumerate(ROLES)
    ]


@pytest.mark.parametrize("n_blocks", [12, 32, 80])
def test_every_rank_stands_below_its_block_however_deep_the_model_is(n_blocks):
    lines = plan_text(manifest(deep(n_blocks)), [f"note {k}" for k in range(4)]).splitlines()
    assert len(lines) <= 40
    found = {}
    for at, line in enumerate(lines):
        if line.startswith("block "):
            assert len(line) <= WIDTH
            blocks = line.split()[1:]
            for below in lines[at + 1 : at + 3]:
                role, *ranks = below.split()
                found |= {(int(block), role): int(rank) for block, rank in zip(blocks, ranks, strict=True)}
    wanted = {(int(one.layer.split(".")[2]), one.layer.split(".")[-1]): one.rank for one in deep(n_blocks) if one.rank}
    assert found == wanted
    assert lines[0].startswith(f"{2 * n_blocks} of {3 * n_blocks} layers of m adapted (LoRA on {2 * n_blocks}): ")
    assert "up_proj" not in "\n".join(lines)  # which got nothing


def test_equal_neighbours_are_one_column():
    rows = [row(f"h.{block}.{role}", "lora", 4 if block < 30 else 8) for block in range(32) for role in ("q", "v")]
    text = plan_text(manifest(rows), ())
    assert re.search(r"^block +0–29 +30–31$", text, re.MULTILINE)
    assert re.search(r"^q +4 +8$", text, re.MULTILINE)


def test_the_first_lines_say_what_it_costs_and_how_good_it_is():
    text = plan_text(manifest(deep(2)), ())
    assert "256 trainable parameters, 0.26 % of the model." in text  # 32 × (1 + 2 + 2 + 3)
    assert "proved within 6.25 % of the optimum: score 1.5, and none within the budgets exceeds 1.6." in text
    assert re.search(r"Trainable parameters +0 +4,000 +4,000 +5,000 +80 % +0.25 per parameter", text)
    assert re.search(r"Training memory +1 GB +500 MB +1.5 GB +no limit$", text, re.MULTILINE)


def test_adapters_are_said_to_be_outside_of_peft():
    rows = [row("h.0.q", "lora", 8), row("h.0.o", "adapter", 2), row("h.1.q", "lora", 1), row("h.1.o", "prefix", 1)]
    text = plan_text(manifest(rows), ())
    assert "LoRA: peft/ holds 75 % of the chosen parameters; the adapters and prefixes are in" in text  # 9 of 12
    assert re.search(r"^q +L8 +L1$", text, re.MULTILINE)
    assert re.search(r"^o +A2 +P1$", text, re.MULTILINE)
    assert "peft/" not in plan_text(manifest(rows[::2]), ())
    assert "No LoRA is chosen, so there is no peft/; the adapters are in" in plan_text(manifest([rows[1]]), ())


def test_heads_layers_that_are_left_out_and_notes_follow():
    left_out = {f"conv.{k}": "it is depthwise" for k in range(9)} | {"odd": "it is odd"}
    text = plan_text(manifest(deep(1), head_modules=("classifier",), left_out=left_out), ["task: guessed"])
    assert text.splitlines()[-4:] == [
        "- The task head (classifier) is trained too and saved with the adapter.",
        "- Left out: conv.0, conv.1, conv.2 and 6 more: it is depthwise.",
        "- Left out: odd: it is odd.",
        "- task: guessed",
    ]


def test_layers_without_blocks_are_a_list_that_ends():
    text = plan_text(manifest([row(f"tower.part{k}x", "lora", 2) for k in range(60)]), ())
    assert re.search(r"^tower.part0x +LoRA 2 +64$", text, re.MULTILINE)
    assert "and 36 more layers" in text
    assert re.search(r"^2 +LoRA 4 +128$", plan_text(manifest([row("0"), row("2", "lora", 4)]), ()), re.MULTILINE)


def test_nothing_adapted_is_a_sentence():
    text = plan_text(manifest([row("h.0.q"), row("h.1.q")]), ())
    assert text.startswith("No layer of m is adapted (2 could be)")
    assert "block" not in text


class Page(HTMLParser):
    """Tags that open and close, and what cells say."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "p", "strong", "span", "table", "thead", "tbody", "tr", "th", "td", "caption", "ul", "li")
        given = dict(attrs)
        assert "id" not in given  # a notebook shows several plans
        if tag == "td" and "title" in given:
            self.titles.append(given["title"])
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_every_layer_with_its_rank_and_nothing_from_elsewhere():
    rows = [*deep(3), row("bridge", "adapter", 2)]
    html = plan_html(manifest(rows), ["<script>alert(1)</script>"])
    page = Page(html)
    assert page.open == []
    for one in rows:
        if one.rank:
            name = "LoRA" if one.method == "lora" else one.method
            assert f"{one.layer}: {name} {one.rank}, {one.cost:,} parameters" in page.titles
    assert "http" not in html
    assert "url(" not in html
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "4,000 of 5,000 (80 %)" in page.text


def test_the_colour_is_stronger_for_a_larger_rank():
    html = plan_html(
        manifest([row(f"h.{k}.q", "lora", rank) for k, rank in enumerate((1, 4, 16))] + [row("h.0.v", "lora", 1)]), ()
    )
    strength = [int(found, 16) for found in re.findall(r"background:#0a6ebd([0-9a-f]{2})", html)]
    first, second, third, alone = strength
    assert first == alone < second < third


def test_a_real_plan_shows_its_own_figures(bert, bert_batches):
    plan = layerlens.plan(bert, bert_batches, max_trainable_params=900, threads=1)
    text = str(plan)
    assert text == repr(plan)
    assert f"{len(plan.ranks)} of {len(plan.manifest.allocations)} layers of BertForSequenceClassification" in text
    assert f"{plan.trainable_params:,} trainable parameters" in text
    assert all(f"- {note}" in text for note in plan.notes)
    assert len(Page(plan._repr_html_()).titles) >= len(plan.ranks)
    assert plan_text(replace(plan.manifest), plan.notes) == text
