"""The plan of proxies: every option at most once, and every beginning spread over methods, roles, depths and ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from layerlens.methods import enumerate_options
from layerlens.models import LayerSpec, ModelSpec
from layerlens.profiling.proxies import SavedProxies, evenly, plan_proxies

ROLES = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
WIDTH = 32  # no rank is above it
RANKS = {"lora": (1, 2, 4, 8, 16, 32), "adapter": (2, 4, 8), "prefix": (2, 4)}


def spec(blocks: int) -> ModelSpec:
    layers = []
    for block in range(blocks):
        layers.append(
            LayerSpec(f"{block}.attention", WIDTH, "attention", methods=("prefix",), block=block, role="attention")
        )
        for role in ROLES:
            methods = ("lora", "adapter") if role in ("attention_output", "ffn_down") else ("lora",)
            layers.append(LayerSpec(f"{block}.{role}", WIDTH, "linear", methods=methods, block=block, role=role))
    return ModelSpec("test", 100, layers)


def test_a_short_plan_has_every_method_role_depth_and_size():
    model = spec(12)
    plan = plan_proxies(model, enumerate_options(model, RANKS), 24)
    assert Counter(option.method for option in plan) == {"lora": 8, "adapter": 8, "prefix": 8}
    lora = [option for option in plan if option.method == "lora"]
    assert {option.layer.split(".")[1] for option in lora} == set(ROLES)
    thirds = Counter(int(option.layer.split(".")[0]) // 4 for option in plan)
    assert set(thirds) == {0, 1, 2}
    assert min(thirds.values()) >= 4
    assert min(option.rank for option in lora) <= 2
    assert max(option.rank for option in lora) >= 16


@pytest.mark.parametrize("count", [1, 5, 10_000])
def test_a_longer_plan_begins_with_the_shorter_and_ends_with_every_option(count: int):
    model = spec(3)
    options = enumerate_options(model, RANKS)
    whole = plan_proxies(model, options, 10_000)
    assert plan_proxies(model, options, count) == whole[:count]
    assert sorted(map(str, whole)) == sorted(str(option) for option in options if option.rank)


def test_evenly_is_a_permutation():
    for count in range(1, 40):
        assert sorted(evenly(count)) == list(range(count))


@pytest.mark.parametrize("data", [None, b"", b"{", b"[]", b'{"format": "layerlens-proxies-0", "study": {}}'])
def test_what_is_kept_by_another_version_or_damaged_is_not_read(data: bytes | None):
    assert SavedProxies(lambda: data, lambda written: None).restore() == {}
