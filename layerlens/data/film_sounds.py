"""Sound that libsndfile does not read, through PyAV (FFmpeg): .m4a, .aac, .webm, .wma, .amr, and the sound of films.

Such a file says only roughly how long it is, so that its samples are counted by decoding them. Where a container says
how long it is and holds less, it broke off.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.exceptions import DataError

SUFFIXES = frozenset(
    (".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4", ".3gp", ".m4b", ".m4r", ".mka", ".ac3", ".ape", ".wv")
)
ADVICE = "run: pip install 'layerlens[m4a]' (PyAV), or convert it: ffmpeg -i IN OUT.wav"
SAYS_LENGTH = ("mov", "mp4", "matroska", "webm", "asf")
"""Containers whose length is written and not guessed, as FFmpeg calls them."""
SLACK_SECONDS = 0.2
"""A container's length may be that of a film, or count what an encoder puts before the sound: up to 4,096
samples at 22,050 Hz."""


def begins_like_film(start: bytes) -> bool:
    """Whether bytes begin as MP4, Matroska, ASF, ADTS or AMR do.

    >>> begins_like_film(b"\\0\\0\\0\\x20ftypM4A "), begins_like_film(b"\\0\\0\\0\\x18ftypheic")
    (True, False)
    """
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"M4A ", b"M4B ", b"mp41", b"mp42", b"isom", b"iso2", b"iso5", b"iso6", b"dash") or (
            start[8:11] in (b"3gp", b"M4V")
        )
    return start.startswith((b"\x1aE\xdf\xa3", b"0&\xb2u", b"\xff\xf1", b"\xff\xf9", b"#!AMR"))


def is_film(name: str, start: bytes) -> bool:
    """Whether a file that libsndfile refuses is worth trying."""
    return begins_like_film(start) or Path(name).suffix.lower() in SUFFIXES


def counted(source: Path | bytes) -> tuple[int, int, int]:
    """How many samples of each channel, at which rate, of how many channels.

    Raises:
        DataError: as the end of a sentence that begins with the file's name.
    """
    n, rate, channels = 0, 0, 0
    for block__nc, rate in blocks(source):  # noqa: B007
        n, channels = n + len(block__nc), block__nc.shape[1]
    return n, rate, channels


def decoded(source: Path | bytes, most: int) -> np.ndarray:
    """The first ``most`` samples (all, if negative), float32 [n, channels].

    Raises:
        DataError: see ``counted``.
    """
    found, n = [], 0
    for block__nc, _ in blocks(source):
        found.append(block__nc)
        n += len(block__nc)
        if 0 <= most <= n:
            break
    whole = np.concatenate(found) if found else np.zeros((0, 1), np.float32)
    return whole if most < 0 else whole[:most]


def blocks(source: Path | bytes) -> Iterator[tuple[np.ndarray, int]]:
    """The samples one block after the other, float32 [n, channels], with their rate.

    Raises:
        DataError: it has no sound, cannot be decoded, or broke off.
    """
    try:
        import av
    except (ModuleNotFoundError, ImportError, OSError) as error:
        raise DataError(f"is not a sound file that soundfile can read; {ADVICE}") from error
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            yield from _blocks(av, container)
    except DataError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        said = str(getattr(error, "strerror", "") or error).lower()
        raise DataError(f"is not a sound file that soundfile or FFmpeg can read ({said})") from error


def _blocks(av: Any, container: Any) -> Iterator[tuple[np.ndarray, int]]:
    if not container.streams.audio:
        raise DataError("has no sound in it")
    stream = container.streams.audio[0]
    floats = av.AudioResampler(format="fltp")
    n, rate = 0, 0
    for frame in container.decode(stream):
        for one in floats.resample(frame):
            block__nc = one.to_ndarray().T.astype(np.float32, copy=False)
            n, rate = n + len(block__nc), one.sample_rate
            yield block__nc, rate
    length = stream.duration and float(stream.duration * stream.time_base)
    length = length or (container.duration and container.duration / av.time_base) or 0.0
    if rate and length > n / rate + SLACK_SECONDS and set(container.format.name.split(",")) & set(SAYS_LENGTH):
        raise DataError(broke_off(n / rate, length))


def broke_off(seconds: float, length: float) -> str:
    """What is said of a clip with less than its header says."""
    return f"breaks off: {seconds:.2f} of {length:.2f} s are there"
