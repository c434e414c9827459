"""``cache ls|rm|verify``: what is kept is shown, checked and removed, and damage is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import Invoke, parsed

from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.cache import SensitivityCache, cache_key

SPEC = ModelSpec("tiny-model", 100, [LayerSpec("a", 4, "linear", methods=("lora",))])


@pytest.fixture
def cache(tmp_path: Path) -> SensitivityCache:
    """Two entries."""
    kept = SensitivityCache(tmp_path / "cache")
    for number in range(2):
        layers = (LayerStatistics("a", {"lora": MethodStatistics(float(number), 1.0)}),)
        kept.put(cache_key({"n": number}), SPEC, ModelStatistics(layers, 8, 80, 0.3, 12.5, 1e9))
    return kept


def damage(cache: SensitivityCache, key: str) -> None:
    (cache.directory / "blobs" / f"{key}.safetensors").write_bytes(b"no")


def test_ls_shows_every_entry(invoke: Invoke, cache: SensitivityCache) -> None:
    listed = parsed(invoke("cache", "ls", "--json", "--cache-dir", str(cache.directory)))
    assert {entry["key"] for entry in listed} == {cache_key({"n": number}) for number in range(2)}
    assert {entry["state"] for entry in listed} == {"ok"}
    shown = invoke("cache", "ls", "--cache-dir", str(cache.directory))
    assert "tiny-model" in shown.stderr
    assert cache_key({"n": 0})[:12] in shown.stderr


def test_verify_names_what_is_damaged(invoke: Invoke, cache: SensitivityCache) -> None:
    assert invoke("cache", "verify", "--cache-dir", str(cache.directory)).exit_code == 0
    bad = cache_key({"n": 1})
    damage(cache, bad)
    (cache.directory / "blobs" / "stray.safetensors").write_bytes(b"x")
    found = invoke("cache", "verify", "--cache-dir", str(cache.directory))
    assert found.exit_code != 0
    assert f"{bad[:12]}: damaged" in found.stderr
    assert "stray: foreign" in found.stderr
    assert "2 of 3 entries are damaged" in found.stderr


def test_rm_takes_first_letters_damage_or_all(invoke: Invoke, cache: SensitivityCache) -> None:
    where = ("--cache-dir", str(cache.directory))
    bad, good = (cache_key({"n": number}) for number in range(2))
    damage(cache, bad)
    assert invoke("cache", "rm", "--damaged", *where).exit_code == 0
    assert [entry.key for entry in cache.entries()] == [good]
    assert invoke("cache", "rm", good[:6], *where).exit_code == 0
    assert cache.entries() == []
    cache.put(good, SPEC, ModelStatistics((), 8, 80, 0.3, 12.5, 1e9))
    assert invoke("cache", "rm", "--all", *where).exit_code == 0
    assert cache.entries() == []


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "nothing to remove"), (("zzz",), "no entry begins with 'zzz'")]
)
def test_rm_says_what_it_cannot_do(
    invoke: Invoke, cache: SensitivityCache, arguments: tuple[str, ...], message: str
) -> None:
    refused = invoke("cache", "rm", *arguments, "--cache-dir", str(cache.directory))
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(cache.entries()) == 2
