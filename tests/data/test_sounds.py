"""Clips as recorders and phones write them: formats, widths of samples, and files that broke off."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from layerlens.data.sounds import SoundCheck, StoredSound, is_sound

RATE, SECONDS, TONE_HZ = 16_000, 0.6, 400.0


def tone(rate: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * TONE_HZ * np.arange(round(SECONDS * rate)) / rate)).astype(np.float32)


def encode(path: Path, codec: str, rate: int, layout: str) -> None:
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        samples = np.stack([tone(rate)] * (2 if layout == "stereo" else 1))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in (frame, None):
            for packet in stream.encode(part):
                container.mux(packet)


def check_tone(sound: StoredSound, slack_seconds: float = 0.001, loudness: float = 0.05) -> None:
    """It is the tone, by its loudest frequency, its length, and its loudness within this share."""
    assert SoundCheck().fault(sound) == ""
    samples = sound.read(RATE)
    assert samples.dtype == np.float32
    assert abs(len(samples) / RATE - SECONDS) <= slack_seconds
    assert abs(int(np.abs(np.fft.rfft(samples)).argmax()) * RATE / len(samples) - TONE_HZ) < 2.0
    middle = samples[len(samples) // 4 : -len(samples) // 4]  # lossy codecs ring at the ends
    assert abs(float(middle.std()) * 2**0.5 / 0.4 - 1.0) < loudness
    assert sound.read(RATE, 1_000).shape == (1_000,)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_samples_of_every_width(tmp_path: Path, subtype: str, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(rate)] * 2, 1), rate, subtype=subtype)
    check_tone(StoredSound("a.wav", tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.m4a", "aac", 44_100, "stereo"), ("b.m4a", "alac", 48_000, "mono"), ("a.aac", "aac", 44_100, "mono"),
        ("a.mp4", "aac", 22_050, "mono"), ("a.webm", "libopus", 48_000, "stereo"), ("a.3gp", "aac", 44_100, "mono"),
        ("a.amr", "libopencore_amrnb", 8_000, "mono"),
    ],
)  # fmt: skip
def test_what_libsndfile_does_not_read(tmp_path: Path, name: str, codec: str, rate: int, layout: str) -> None:
    path = tmp_path / name
    encode(path, codec, rate, layout)
    slack = 2 * 2_048 / rate  # encoders fill up their last block, and begin with one
    loudness = 0.25 if codec == "libopencore_amrnb" else 0.05  # 4.75 kbit/s, made for voices
    check_tone(StoredSound(name, path), slack, loudness)
    assert is_sound(path.read_bytes())
    check_tone(StoredSound("clip of sample 1", data=path.read_bytes()), slack, loudness)
    path.rename(tmp_path / "called.wav")
    check_tone(StoredSound("called.wav", tmp_path / "called.wav"), slack, loudness)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a", ".webm"])
def test_clips_that_break_off_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix in (".m4a", ".webm"):
        encode(path, "aac" if suffix == ".m4a" else "libopus", 48_000, "mono")
    else:
        soundfile.write(
            path, tone(48_000), 48_000, **({"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {})
        )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for left in (2**26, 0):  # decoded whole; by its header and end
        check = SoundCheck()
        check._left = left
        assert check.fault(StoredSound("a", path)), suffix


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(40))
    fault = SoundCheck().fault(StoredSound("phone.m4a", tmp_path / "phone.m4a"))
    assert fault == (
        "is not a sound file that soundfile can read; run: pip install 'layerlens[m4a]' (PyAV), or convert it: "
        "ffmpeg -i IN OUT.wav"
    )
    (tmp_path / "phone.m4a").write_bytes(b"")
    assert "the file is empty" in SoundCheck().fault(StoredSound("phone.m4a", tmp_path / "phone.m4a"))
