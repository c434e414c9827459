"""A run once more with nothing changed is taken from the cache; after any change it is an ordinary run."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from layerlens.cli.tables import as_json
from layerlens.config import RunConfig
from layerlens.jobs import repeated
from layerlens.pipeline import RunResult, run_config
from layerlens.utils.progress import silent


class Runs:
    """Runs and repeats of one configuration, and how often the model was loaded."""

    def __init__(self, settings, folder: Path) -> None:
        self.settings, self.folder, self.loaded = settings, folder, 0
        self.result: RunResult | None = None
        self.told: list[str] = []

    def __call__(self, directory: str = "out", use_cache: bool = True, **sections):
        changed = {name: self.settings.get(name, {}) | sections.get(name, {}) for name in {*self.settings, *sections}}
        config = RunConfig.model_validate(changed | {"output": {"directory": directory}})
        self.told.clear()
        return repeated.run_or_repeat(
            self._run, config, base_dir=self.folder, use_cache=use_cache, progress=silent, warn=self.told.append
        )

    def _run(self, config, **how):
        """A real run; further ones leave its files, which is quicker."""
        self.loaded += 1
        if self.result is None:
            self.result = run_config(config, **how)
        return self.result


@pytest.fixture
def runs(settings, tmp_path, monkeypatch) -> Runs:
    """In a process that counts as fresh, with files of its own that count as old."""
    for name, place in (("model", settings["model"]["name_or_path"]), ("rows.jsonl", settings["data"]["source"])):
        copied = shutil.copytree if Path(place).is_dir() else shutil.copy
        copied(place, tmp_path / name)
    settings["model"] |= {"name_or_path": str(tmp_path / "model"), "task": "sequence-classification"}
    settings["data"]["source"] = "rows.jsonl"
    settings["optimization"]["max_vram_gb"] = None  # without its proof this is quicker
    monkeypatch.setattr(repeated, "_fresh", lambda: True)
    monkeypatch.setattr(repeated, "JUST_WRITTEN_S", -1e9)
    monkeypatch.setattr(repeated, "SETTINGS", ("HF_",))  # a run sets the threads of MKL for the rest of its process
    return Runs(settings, tmp_path)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_loaded_again_until_something_changes(runs, tmp_path, monkeypatch):
    first = runs()
    written, said = everything(tmp_path / "out"), list(runs.told)
    assert runs.loaded == 1
    assert first.repeats == ""
    shutil.rmtree(tmp_path / "out")
    again = runs()
    assert runs.loaded == 1
    assert everything(tmp_path / "out") == written
    assert runs.told == said
    assert again.repeats == json.loads(written["manifest.json"])["created_at"]
    assert again.statistics_from_cache
    same = ("manifest", "files", "directory", "measured", "explanations", "frozen", "warnings", "data")
    assert {name: getattr(again, name) for name in same} == {name: getattr(first, name) for name in same}
    alone = ("seconds", "repeats", "statistics_from_cache")
    told, before = as_json(again), as_json(first)
    assert {k: v for k, v in told.items() if k not in alone} == {k: v for k, v in before.items() if k not in alone}

    (tmp_path / "out" / "mine.txt").write_text("kept")
    runs()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    assert runs.loaded == 1

    # Each change is noticed, even where size and time of a file are set back, and the new run is the one that is kept.
    rows, weights, added = tmp_path / "rows.jsonl", tmp_path / "model/model.safetensors", tmp_path / "model/added.json"
    times = rows.stat()
    rows.write_bytes(rows.read_bytes().replace(b"great", b"grand"))
    os.utime(rows, ns=(times.st_atime_ns, times.st_mtime_ns))
    for number, change in enumerate((lambda: None, lambda: os.utime(weights), lambda: added.write_text("{}")), start=2):
        change()
        assert runs().repeats == ""
        assert runs().repeats != ""
        assert runs.loaded == number
    assert runs(optimization={"max_trainable_params": 1400}).repeats == ""
    assert runs().repeats != ""
    assert runs(use_cache=False).repeats == ""

    def as_before(*_arguments, **_how):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(runs, "_run", as_before)
    monkeypatch.setenv("HF_HUB_OFFLINE_X", "1")  # of the kind that may change what is read
    with pytest.raises(AssertionError, match="loaded"):
        runs()
    monkeypatch.delenv("HF_HUB_OFFLINE_X")
    module = tmp_path / "of_the_user.py"
    module.write_text("")
    kept = repeated._states([module])
    module.write_text("changed")
    assert repeated._states([module]) != kept
    assert str(Path(repeated.__file__)) in map(str, repeated._code())
    for blob in (tmp_path / "cache" / "blobs").glob("*.run.zip"):
        blob.write_bytes(blob.read_bytes()[:-1])  # damaged: as if it were not there
    with pytest.raises(AssertionError, match="loaded"):
        runs()


def test_links_that_lead_elsewhere_are_noticed(runs, tmp_path):
    for name in ("model", "rows.jsonl"):
        for version in ("first", "second"):
            copied = shutil.copytree if (tmp_path / name).is_dir() else shutil.copy
            copied(tmp_path / name, tmp_path / f"{version}-{name}")
        os.rename(tmp_path / name, tmp_path / f"gone-{name}")
        os.symlink(f"first-{name}", tmp_path / name)
    assert runs().repeats == ""
    assert runs().repeats != ""
    for number, name in enumerate(("model", "rows.jsonl"), start=2):
        (tmp_path / name).unlink()
        os.symlink(f"second-{name}", tmp_path / name)
        assert runs().repeats == ""
        assert runs().repeats != ""
        assert runs.loaded == number


def test_what_follows_a_transformer_is_part_of_the_model(runs, tmp_path):
    whole = tmp_path / "whole"
    os.makedirs(whole / "1_Dense")
    shutil.copytree(tmp_path / "model", whole / "0_Transformer")
    (whole / "1_Dense" / "model.safetensors").write_bytes(b"weights")
    first = {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (whole / "modules.json").write_text(json.dumps([first]))
    for place in (whole, whole / "0_Transformer"):
        config = RunConfig.model_validate(
            runs.settings | {"model": runs.settings["model"] | {"name_or_path": str(place)}}
        )
        assert whole / "1_Dense" / "model.safetensors" in (repeated._inputs(config, tmp_path) or [])


def test_files_that_change_while_they_are_read_are_not_kept(runs, tmp_path, monkeypatch):
    """Whatever time a file server's clock gives them."""
    run = runs._run

    def changed(config, **how):
        result = run(config, **how)
        (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "\n")
        return result

    monkeypatch.setattr(runs, "_run", changed)
    assert runs().repeats == ""
    monkeypatch.setattr(runs, "_run", run)
    assert runs().repeats == ""
    assert runs().repeats != ""


def test_a_cache_that_cannot_be_used_ends_no_run(runs, monkeypatch):
    def full(*_arguments):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(repeated.SensitivityCache, "keep_run", full)
        assert runs().repeats == ""
    assert runs().repeats == ""  # nothing was kept
    with monkeypatch.context() as patched:
        patched.setattr(repeated.SensitivityCache, "kept_run", full)
        assert runs().repeats == ""
    assert runs().repeats != ""


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"factory": "mine:model", "name_or_path": ""}},
        {"model": {"loss": "mine:loss", "task": "custom"}},
        {"model": {"name_or_path": "some/model"}},
        {"data": {"source": "mine:rows"}},
        {"data": {"source": "hf:imdb:train"}},
        {"model": {"task": "image-classification"}},
        {"runtime": {"device": "cuda"}},
        {"output": {"directory": "s3://bucket/out"}},
    ],
)
def test_what_files_do_not_tell_is_not_kept(runs, sections, tmp_path):
    changed = {name: runs.settings.get(name, {}) | sections.get(name, {}) for name in {*runs.settings, *sections}}
    config = RunConfig.model_validate(changed)
    assert not repeated._can_be_told(config) or repeated._inputs(config, tmp_path) is None


def test_files_that_may_still_change_and_processes_with_torch(runs, monkeypatch):
    config = RunConfig.model_validate(runs.settings)
    given: list[bool] = []
    monkeypatch.setattr(repeated, "_packed", lambda *_: given.append(True) or b"")
    (runs.folder / "out").mkdir()
    result = RunResult(None, runs.folder / "out", {})
    how = {"base_dir": runs.folder, "use_cache": True, "progress": silent, "warn": print}
    monkeypatch.setattr(repeated, "JUST_WRITTEN_S", 2.0)
    repeated.run_or_repeat(lambda *_, **__: result, config, **how)
    assert not given  # the rows were written a moment ago
    monkeypatch.setattr(repeated, "JUST_WRITTEN_S", -1e9)
    repeated.run_or_repeat(lambda *_, **__: result, config, **how)
    assert given
    monkeypatch.undo()
    assert "torch" in sys.modules
    assert not repeated._fresh()
