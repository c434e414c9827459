"""Classes of sound: what folders and tables become, statistics of every kind of model, and the whole job."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers as hf
from scipy.signal import resample_poly
from sounds import RATE, tone, write

from benchmarks.audio_models import AUDIO
from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.data.sounds import StoredSound, at_rate, stored_sound
from layerlens.exceptions import DataError
from layerlens.integrations.audio_input import audio_input
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.registry import TASKS
from layerlens.tasks.encoded import notes_of
from layerlens.tasks.guess import with_task

TASK = TASKS["audio-classification"]
OPTIMIZATION = {"max_trainable_params": 600, "methods": ["lora"], "latency_profile": {"batch_size": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users have: several rates, channels and formats, and files that cannot be read."""
    root = tmp_path_factory.mktemp("sounds")
    kinds = [(".wav", RATE, 1), (".flac", 44_100, 2), (".mp3", 22_050, 1), (".ogg", 8_000, 1)]
    for number in range(24):
        suffix, rate, channels = kinds[number % 4]
        name, frequency = (("low", 300.0), ("high", 2_400.0))[number // 4 % 2]
        samples = tone(frequency, 0.3 + 0.015 * number, rate, number)
        write(root / name / f"{number}{suffix}", np.repeat(samples[:, None], channels, 1), rate)
    write(root / "low/long.wav", tone(300.0, 1.5))
    write(root / "low/click.wav", tone(300.0, 0.002))
    write(root / "high/silent.wav", np.zeros(RATE // 2, np.float32))
    write(root / "high/empty.wav", np.zeros(0, np.float32))
    (root / "low/broken.wav").write_bytes(b"RIFF nothing of the kind")
    (root / "low/phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (root / "high/notes.txt").write_text("recorded in May")
    return root


def test_a_folder_is_measured_trained_and_loaded_again(folder: Path, tmp_path: Path):
    AUDIO["wav2vec2"].save(tmp_path / "model")
    settings: dict[str, Any] = {
        "model": {"name_or_path": "model", "head_fit_samples": 8},
        "data": {"source": str(folder), "calibration_samples": 10, "batch_size": 4, "max_seconds": 0.6},
        "optimization": OPTIMIZATION,
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.task == "audio-classification"
    assert set(done.manifest.model.head_modules) == {"projector", "classifier"}
    assert done.manifest.model.labels == ("high", "low")
    said = " ".join([*done.warnings, *(line for _, line in done.data.facts())] if done.data else done.warnings)
    for words in (
        "broken.wav", "is not a sound file that soundfile can read", "low/phone.m4a", "empty.wav is empty",
        "notes.txt", "clips are resampled to 16,000 Hz, from", "several channels, which are averaged",
        "only silence: high/silent.wav", "longer than data.max_seconds (0.6 s); the model sees their beginning",
    ):  # fmt: skip
        assert words in said, said
    layers = [one.layer for one in done.manifest.allocations]
    assert all(name.startswith("wav2vec2.encoder.layers") for name in layers)
    tuned = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert tuned.after["accuracy"] >= tuned.before["accuracy"] > 0.5
    assert tuned.after["loss"] < tuned.before["loss"]
    from peft import PeftModel

    base = hf.AutoModelForAudioClassification.from_pretrained(tmp_path / "model", num_labels=2)
    stock = PeftModel.from_pretrained(base, tmp_path / "tuned")
    clip = StoredSound("clip", folder / "low/1.flac").read(RATE)
    inputs = hf.AutoFeatureExtractor.from_pretrained(tmp_path / "model")(clip, sampling_rate=RATE, return_tensors="pt")
    assert stock.eval()(**inputs).logits.shape == (1, 2)


def test_a_rate_changes_the_samples_and_not_the_sound():
    low, high = tone(300.0, 0.5, RATE), tone(300.0, 0.5, 44_100)
    changed = at_rate(high, 44_100, RATE)
    assert changed.shape == low.shape
    np.testing.assert_allclose(changed, resample_poly(high, 160, 441), rtol=0, atol=1e-6)
    # Both are the tone with independent noise of 0.02; the filter's ends are left out.
    assert float(np.abs(changed - low)[400:-400].std()) < 0.04
    several = StoredSound("pair", samples=np.stack([high, -high], 1), rate=44_100)
    assert float(np.abs(several.read(RATE)).max()) < 1e-6
    assert several.read(RATE, 100).shape == (100,)


def test_samples_are_read_however_a_row_has_them():
    wave = tone(300.0, 0.1)
    pcm = np.round(wave * 32767).astype(np.int16)
    for values in (wave, wave[None], np.stack([wave, wave]), pcm, pcm.tolist(), wave.tolist()):
        found = stored_sound({"array": values, "sampling_rate": RATE}, [], Path("rows"), 1)
        assert found is not None
        np.testing.assert_allclose(found.read(RATE), wave, rtol=0, atol=2**-14)  # half a step of 16 bits, and scale
    assert stored_sound({"array": "none", "sampling_rate": RATE}, [], Path("rows"), 1) is None
    assert stored_sound({"array": wave, "sampling_rate": None}, [], Path("rows"), 1) is None


def test_tables_name_files_beside_them_and_hold_bytes(folder: Path, tmp_path: Path):
    AUDIO["hubert"].save(tmp_path / "model")
    clips = tmp_path / "corpus/clips"
    for number in range(6):
        write(clips / f"{number}.wav", tone(300.0 * (1 + number % 2), 0.3, seed=number))
    with (tmp_path / "corpus/train.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["path", "accent"])
        rows.writerows([f"{number}.wav", ("near", "far")[number % 2]] for number in range(6))
        rows.writerow(["gone.wav", "far"])
    config = RunConfig.model_validate({
        "model": {"name_or_path": "model"}, "data": {"source": "corpus/train.tsv"}, "optimization": OPTIMIZATION,
    })  # fmt: skip
    found, guess = with_task(config, tmp_path)
    assert found.model.task == TASK.name
    assert "audio clips in column 'path' and classes in 'accent'" in str(guess)
    dataset = load_dataset(found.data, tmp_path, TASK.name)
    assert dataset.label_names == ("far", "near")
    assert len(dataset) == 6
    assert "has no file of sound at" in " ".join(dataset.notes)

    from datasets import Audio, ClassLabel, Dataset, Features

    encoded = io.BytesIO()
    soundfile.write(encoded, tone(300.0, 0.2), RATE, format="WAV")
    features = Features({"audio": Audio(sampling_rate=RATE), "label": ClassLabel(names=["cat", "dog"])})
    values = [{"bytes": encoded.getvalue(), "path": None}] * 4
    Dataset.from_dict({"audio": values, "label": [0, 1, 0, 1]}).cast(features).save_to_disk(tmp_path / "saved")
    saved = load_dataset(DataConfig(source=str(tmp_path / "saved")), task=TASK.name)
    assert saved.label_names == ("cat", "dog")
    assert saved.columns["audio"][0].read(RATE).shape == (3_200,)


def test_a_clip_that_is_longer_than_the_model_sees_is_said(folder: Path):
    pretrained = PretrainedModel(
        AUDIO["ast"].make(num_labels=2), None, "", (), audio=audio_input(AUDIO["ast"].extractor)
    )
    dataset = load_dataset(DataConfig(source=str(folder)), task=TASK.name)
    said = " ".join(notes_of(TASK.encode(pretrained, dataset, DataConfig(source="x"), 0)))
    assert "clips are longer than what the model sees of one (0.4 s); the model sees their beginning" in said
    assert "low/click.wav is shorter than the 25 ms that the model's first layers need" in said


def test_of_folders_of_splits_train_is_read(tmp_path: Path):
    for split in ("train", "Test", "validation"):
        for name in ("cat", "dog"):
            write(tmp_path / f"data/{split}/{name}/1.wav", tone(300.0, 0.1))
    dataset = load_dataset(DataConfig(source="data"), tmp_path, TASK.name)
    assert (len(dataset), dataset.label_names) == (2, ("cat", "dog"))
    assert dataset.reading is not None
    assert dataset.reading.notes == ("of the folders Test, train, validation, LayerLens reads train",)


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(DataError, match=r"pip install 'layerlens\[audio\]'"):
        load_dataset(DataConfig(source=str(folder)), task=TASK.name)
