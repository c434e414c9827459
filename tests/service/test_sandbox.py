"""What files name and are, and what the process of a job can open, links that were made late included."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import SERVER_THREADS, run_config_of

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.service.confinement import confine
from layerlens.service.contents import is_pickle
from layerlens.service.scheduler import open_state
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import Job, JobStore
from layerlens.service.worker import Order, run_job

INDEX = "model.safetensors.index.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a model and data, and a secret beside it."""
    found = tmp_path / "root"
    (found / "model").mkdir(parents=True)
    (found / "model/config.json").write_text("{}")
    (found / "reviews.jsonl").write_text("{}")
    (tmp_path / "secret.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return found


def confined(root: Path, *, model: str = "model", data: str = "reviews.jsonl", **allowed: Any) -> RunConfig:
    config = RunConfig.model_validate(run_config_of(model, data))
    return confine(config, ServiceSettings(root.parent / "state", (root,), **allowed))


def index_of(shard: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {"weight": shard}})


NAMED = [
    (INDEX, index_of("../../secret.safetensors"), "names '../../secret.safetensors' (weight_map)"),
    (INDEX, index_of("../absent.safetensors/../../../x"), "(weight_map)"),
    (INDEX, index_of("/etc/hostname"), "names '/etc/hostname' (weight_map)"),
    (INDEX, index_of("zero\0byte"), "names 'zero\\x00byte' (weight_map)"),
    (INDEX, index_of("half \ud800"), "names 'half \\ud800' (weight_map)"),
    (INDEX, index_of("/absent/model.safetensors"), "(weight_map)"),
    ("model.safetensors.index.fp16.index.json", index_of("../../secret.safetensors"), "(weight_map)"),
    ("1_Dense/model.safetensors.index.json", index_of("../../../secret.safetensors"), "(weight_map)"),
    ("tokenizer_config.json", '{"vocab_file": "/etc/hostname"}', "names '/etc/hostname' (vocab_file)"),
    ("tokenizer_config.json", '{"a": [{"tokenizer_file": "../../secret.safetensors"}]}', "(tokenizer_file)"),
    ("config.json", '{"text_config": {"weights_path": "/etc/hostname"}}', "(weights_path)"),
    ("adapter_config.json", '{"base_model_name_or_path": "../../elsewhere"}', "is an adapter of '../../elsewhere'"),
    ("adapter_config.json", '{"base_model_name_or_path": "/etc"}', "is an adapter of '/etc'"),
    ("adapter_config.json", "{}", "is an adapter of ''"),
    ("modules.json", '[{"path": "", "type": "os.system"}]', "names code (os.system in modules.json)"),
    ("modules.json", '[{"path": "../..", "type": "sentence_transformers.models.Dense"}]', "names '../..' (path)"),
    ("library.so", "", "has code (library.so)"),
    ("MODEL.PY", "", "has code (MODEL.PY)"),
]


@pytest.mark.parametrize(("file", "content", "said"), NAMED)
def test_what_files_of_a_model_name_stays_below_the_roots(root: Path, file: str, content: str, said: str):
    path = root / "model" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        confined(root, allow_pickles=True)
    assert said in str(caught.value)
    assert str(root) not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"name_or_path": "/home/me", "special_tokens_map_file": "/home/me/absent.json"}'),
        ("tokenizer_config.json", '{"tokenizer_file": null, "chat_template": "/etc/hostname"}'),
        ("config.json", '{"_name_or_path": "/etc", "vocab_path_length": 3}'),
        ("modules.json", '[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'),
        (INDEX, index_of("model-1.safetensors")),
        (INDEX, index_of("long" * 2000)),
        ("broken.json", "{"),
    ],
)
def test_what_names_nothing_outside_is_left_alone(root: Path, file: str, content: str):
    before = confined(root)
    (root / "model" / file).write_text(content)
    assert confined(root) == before
    assert before.model.name_or_path == str(root / "model")


def torch_archive(path: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(2)}, path)


PICKLED: dict[str, Callable[[Path], object]] = {
    "pickle 0 of torch": torch_archive,
    "pickle 2": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "pickle 5": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)),
    "broken archive": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "hdf5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(8)),
}


@pytest.mark.parametrize("kind", PICKLED)
@pytest.mark.parametrize("name", ["model.safetensors", "weights.data", "readme"])
def test_a_pickle_is_refused_whatever_it_is_called(root: Path, kind: str, name: str):
    PICKLED[kind](root / "model" / name)
    (root / "model/pytorch_model.bin.index.json").write_text(index_of(name))
    with pytest.raises(ConfigurationError, match=rf"{name}, which can run code when it is loaded; convert it"):
        confined(root)
    confined(root, allow_pickles=True)


def test_a_pickle_elsewhere_below_the_roots_is_refused_where_an_index_names_it(root: Path):
    (root / "other").mkdir()
    torch_archive(root / "other/weights.data")
    (root / "model/pytorch_model.bin.index.json").write_text(index_of("../other/weights.data"))
    with pytest.raises(ConfigurationError, match=r"names \.\./other/weights\.data, which can run code"):
        confined(root)


def test_archives_without_pickles_and_text_are_none(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").touch()
    assert [is_pickle(tmp_path / name) for name in ("notes.zip", "text", "empty")] == [False] * 3


def test_what_is_no_file_is_refused_before_anybody_waits_for_it(root: Path):
    os.mkfifo(root / "model/model.safetensors")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors in 'model' is not a regular file"):
        confined(root)


def saved(folder: Path) -> Path:
    import datasets

    rows = {"text": [f"text {number}" for number in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("how", ["state", "splits", "absolute", "link"])
def test_what_a_saved_data_set_names_stays_below_the_roots(root: Path, how: str):
    """At submission, and again where it is read, for data that comes from a store."""
    from layerlens.config import DataConfig
    from layerlens.data import load_dataset
    from layerlens.utils.places import readable_below

    inside, outside = saved(root / "set"), saved(root.parent / "outside")
    arrow = next(outside.glob("*.arrow"))
    state = json.loads((inside / "state.json").read_text())
    if how == "splits":
        inside = root / "splits"
        inside.mkdir()
        (inside / "dataset_dict.json").write_text(json.dumps({"splits": ["../../outside"]}))
    elif how == "link":
        (own,) = inside.glob("*.arrow")
        own.unlink()
        own.symlink_to(arrow)
    else:
        place = str(arrow) if how == "absolute" else f"../../outside/{arrow.name}"
        state["_data_files"] = [{"filename": place}]
        (inside / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigurationError, match=r"data\.source: .*(not below a root|leads out of the roots)"):
        confined(root, data=inside.name)
    with readable_below([root]), pytest.raises(DataError, match="not below a root"):
        load_dataset(DataConfig(source=str(inside)))


# --- the process itself ---

BOUND = """
import os, sys
from pathlib import Path
from layerlens.service.sandbox import bind, readable
root, outside, state = (Path(one) for one in sys.argv[1:4])
by_kernel = bind(readable([root], state, urls=False))
(root / "late").symlink_to(outside)  # after every check
(root / "late-folder").symlink_to(outside.parent)

def tried(what):
    try:
        what()
    except (OSError, ValueError, RuntimeError) as error:
        return type(error).__name__
    except Exception as error:
        return type(error).__name__
    return "read"

import pyarrow, safetensors, tokenizers
def native(place):
    return [
        tried(lambda: safetensors.safe_open(str(place), "numpy").keys()),
        tried(lambda: pyarrow.memory_map(str(place)).read()),
        tried(lambda: tokenizers.models.WordLevel.read_file(str(place))),
    ]

print(by_kernel)
print([tried(open(root / "inside.safetensors", "rb").read), *native(root / "inside.safetensors")])
print([tried(lambda place=place: open(place, "rb").read()) for place in
       (outside, root / "late", "/etc/hostname", "/proc/self/environ", f"/proc/{os.getppid()}/environ")])
print([tried(lambda place=place: os.listdir(place)) for place in (outside.parent, root / "late-folder", "/root")])
print([one for place in (outside, root / "late") for one in native(place)])
import torch, transformers, datasets
(root / "folder").mkdir()
print(tried(lambda: open(root / "new", "w").write("x")), tried(lambda: open("/dev/null").read()),
      tried(lambda: os.rename(root / "new", root / "folder/new")))
import subprocess
print(subprocess.run(["cat", str(root / "late")], capture_output=True).returncode)
"""


def test_a_bound_process_opens_nothing_outside_by_any_library(root: Path):
    """What is outside can be read before, so each refusal is one."""
    outside = root.parent / "secret.safetensors"
    (root / "inside.safetensors").write_bytes(outside.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOUND), str(root), str(outside), str(root)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_kernel, inside, opened, listed, native, others, child = done.stdout.splitlines()
    assert inside.count("read") >= 3, inside
    assert opened == str(["PermissionError"] * 5)
    assert listed == str(["PermissionError"] * 3)
    assert others == "read read read"
    if by_kernel != "True":
        assert "this system has no Landlock" in done.stderr
        pytest.skip("this kernel has no Landlock: what libraries open outside Python cannot be held here")
    assert "read" not in native
    assert child == "1"


@pytest.fixture
def job_of(tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path) -> Callable[..., Job]:
    """A job that was accepted, then ``changed``, then run in a process of its own as the server runs it."""
    import shutil

    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(tiny_bert_dir, root / "model")
    shutil.copy(reviews_jsonl, root / "reviews.jsonl")
    settings = ServiceSettings(tmp_path / "state", (root,), threads=SERVER_THREADS)

    def run(change: Callable[[Path], object], **sections: Any) -> Job:
        store, lock = open_state(settings)
        config = run_config_of()
        config = {name: {**value, **sections.get(name, {})} for name, value in config.items()}
        accepted = confine(RunConfig.model_validate(config), settings).model_dump(mode="json")
        job = store.add("run", accepted)
        assert job is not None
        change(root)
        store.claim()
        order = Order(settings.state_dir, job.id, settings.roots, settings)
        process = multiprocessing.get_context("spawn").Process(target=run_job, args=(order,))
        process.start()
        process.join()
        os.close(lock)
        found = JobStore(store.path).get(job.id)
        assert found is not None
        return found

    return run


def shard_elsewhere(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "model/model.safetensors").rename(outside / "model.safetensors")
    names = json.loads((outside / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    mapping = {name: "../../outside/model.safetensors" for name in names if name != "__metadata__"}
    (root / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def data_elsewhere(root: Path) -> None:
    (root / "reviews.jsonl").rename(root.parent / "reviews.jsonl")
    (root / "reviews.jsonl").symlink_to(root.parent / "reviews.jsonl")


def pickled_weights(root: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(root / "model/model.safetensors"), root / "model/weights.data")
    (root / "model/model.safetensors").unlink()
    (root / "model/pytorch_model.bin.index.json").write_text(index_of("weights.data"))


@pytest.mark.parametrize(
    ("change", "sections", "said"),
    [
        (shard_elsewhere, {}, "(weight_map), which is not below a root"),
        (shard_elsewhere, {"profiling": {"memory_mode": "streamed"}}, "(weight_map), which is not below a root"),
        (data_elsewhere, {}, "not below a root of this server"),
        (pickled_weights, {}, "weights.data, which can run code when it is loaded"),
    ],
)
def test_what_changes_after_a_job_was_accepted_does_not_help(
    job_of: Callable[..., Job], change: Callable[[Path], object], sections: dict[str, Any], said: str
):
    job = job_of(change, **sections)
    assert job.state == "failed"
    assert job.error is not None
    assert said in job.error, job.error
    assert job.exit_code == 2 or "data.source" in job.error
