"""Sound: where it is kept until it is needed, and how it is read: one channel, at the rate that a model wants.

Every clip goes this way, whether a model is measured or trained on it. Several channels become their mean, before
anything else is done; another rate is changed by a polyphase filter, which leaves out what the new rate cannot hold.
What cannot be read is said as the end of a sentence that begins with the clip's name.
"""

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data import film_sounds
from layerlens.data.class_folders import FileKind, class_folders, some
from layerlens.data.rows import Reading
from layerlens.data.stored import StoredFile
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

READ = frozenset(
    (".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
     ".rf64", ".sph", ".nist")
)  # fmt: skip
SUFFIXES = READ | film_sounds.SUFFIXES
"""What files of sound are called, in lower case: those that libsndfile reads, and those that PyAV reads."""
SIGNATURES = (b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b".snd", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"NIST_1A")
NO_LIBRARY = "data.source: sound is read by soundfile, which is not installed; run: pip install 'layerlens[audio]'"
BESIDE = ("clips", "audio", "wavs", "wav", "sounds", "../audio", "../clips", "../wavs", "../wav")
"""Where files that a table names are looked for, if not in its own folder."""
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WHOLE_BYTES = 2**26
"""Clips of so many bytes are decoded when they are found; of further ones the header and the end are read."""
UNKNOWN_BYTES = 0.98 * 2**31
"""Programs that write a stream put a size of about 2³¹ or 2³² bytes into a WAV file."""
BLOCK = 2**20
"""Samples of each channel that are decoded at once where a whole clip is looked at."""


@dataclass(frozen=True)
class SoundHeader:
    """What the header of a clip says.

    Args:
        samples: of each channel.
        rate: samples in a second.
        channels: how many.
    """

    samples: int
    rate: int
    channels: int = 1

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.samples / self.rate

    def samples_at(self, rate: int) -> int:
        """Samples that it has at another rate."""
        return -(-self.samples * rate // self.rate)


@dataclass(frozen=True)
class StoredSound(StoredFile):
    """An encoded clip in a file or in memory, or its samples.

    Args:
        name, path, data: see ``StoredFile``.
        samples: float [n] or [n, channels], if it is not encoded.
        rate: of ``samples``.
    """

    samples: np.ndarray | None = field(default=None, repr=False)
    rate: int = 0

    def decoded(self) -> bytes | None:
        """The samples, with their shape and rate."""
        return None if self.samples is None else f"{self.samples.shape}{self.rate}".encode() + self.samples.tobytes()

    @property
    def n_bytes(self) -> int:
        """Of the file, or of what is in memory."""
        if self.path is not None:
            return self.path.stat().st_size
        return len(self.data) if self.data is not None else 0

    @functools.cached_property
    def _film(self) -> bool:
        """Whether libsndfile refuses it, and PyAV may read it."""
        if self.samples is not None or not film_sounds.is_film(self.name, self.start()):
            return False
        try:
            with _opened(self):
                return False
        except DataError as error:
            if str(error) == NO_LIBRARY or not self.n_bytes:
                raise
            return True

    @functools.cached_property
    def _counted(self) -> tuple[int, int, int]:
        return film_sounds.counted(self._source)

    @property
    def _source(self) -> Path | bytes:
        source = self.data if self.data is not None else self.path
        assert source is not None
        return source

    def start(self) -> bytes:
        """Its first bytes."""
        if self.data is not None or self.path is None:
            return bytes((self.data or b"")[:16])
        try:
            with self.path.open("rb") as file:
                return file.read(16)
        except OSError:
            return b""

    def header(self) -> SoundHeader:
        """What it is, without its samples.

        Raises:
            DataError: as the end of a sentence that begins with its name.
        """
        if self.samples is not None:
            found = SoundHeader(len(self.samples), self.rate, 1 if self.samples.ndim == 1 else self.samples.shape[1])
        elif self._film:
            found = SoundHeader(*self._counted)
        else:
            with _opened(self) as file:
                found = SoundHeader(file.frames, file.samplerate, file.channels)
        if not found.samples:
            raise DataError("is empty (it has no samples)")
        if found.rate <= 0:
            raise DataError(f"claims {found.rate} samples per second")
        return found

    def read(self, rate: int, most: int | None = None) -> np.ndarray:
        """Samples, float32 [n], of one channel at ``rate``; of a longer clip the first ``most``.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self._read(rate, most)
        except DataError as error:
            raise DataError(f"data.source: {self.name} {error}; leave it out") from error

    def _read(self, rate: int, most: int | None) -> np.ndarray:
        own = self.header().rate
        wanted = -1 if most is None else -(-most * own // rate)
        if self.samples is not None:
            decoded__nc = self.samples.reshape(len(self.samples), -1)
            decoded__nc = decoded__nc if wanted < 0 else decoded__nc[:wanted]
        elif self._film:
            decoded__nc = film_sounds.decoded(self._source, wanted)
        else:
            with _opened(self) as file:
                decoded__nc = file.read(wanted, dtype="float32", always_2d=True)
        if not len(decoded__nc):
            raise DataError("ends before its first sample")
        if not np.isfinite(decoded__nc).all():
            raise DataError("has samples that are not finite numbers")
        found = at_rate(decoded__nc.mean(axis=1), own, rate)
        return found if most is None else found[:most]

    def look(self, *, whole: bool) -> bool:
        """Whether it has sound that is not silence; only its end is decoded if not ``whole``.

        Raises:
            DataError: as the end of a sentence: it cannot be decoded, or ends before its header says.
        """
        header, n = self.header(), 0
        start = self.start()
        if (
            start[:4] == b"RIFF"
            and self.n_bytes < 0.99 * (said := int.from_bytes(start[4:8], "little")) < UNKNOWN_BYTES
        ):
            raise DataError(f"breaks off: {self.n_bytes:,} of {said:,} bytes are there")
        if self.samples is not None:
            blocks: Iterable[np.ndarray] = [self.samples]
        elif self._film:
            blocks = (block__nc for block__nc, _ in film_sounds.blocks(self._source))
        else:
            blocks = _blocks(self, 0 if whole else max(0, header.samples - BLOCK // 256))
        loud = False
        for block__nc in blocks:
            if not np.isfinite(block__nc).all():
                raise DataError("has samples that are not finite numbers")
            loud, n = loud or bool(block__nc.any()), n + len(block__nc)
        if not n:
            raise DataError("ends before its first sample")
        if whole and n < 0.99 * header.samples and _says_length(self):
            raise DataError(film_sounds.broke_off(n / header.rate, header.seconds))
        return loud or not whole


def _blocks(sound: StoredSound, start: int) -> Iterator[np.ndarray]:
    """The samples from ``start`` on, float32 [n, channels], as soundfile reads them."""
    with _opened(sound) as file:
        if start:
            file.seek(start)
        while len(block__nc := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield block__nc


def _says_length(sound: StoredSound) -> bool:
    """Whether the clip's length is written in it: of MP3 without a first frame that says so it is a guess."""
    with _opened(sound) as file:
        if file.format != "MP3":
            return True
    if sound.data is not None:
        start = sound.data[: 2**16]
    else:
        assert sound.path is not None
        with sound.path.open("rb") as opened:
            start = opened.read(2**16)
    return any(mark in start for mark in (b"Xing", b"Info", b"VBRI"))


def at_rate(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Samples at another rate, float32 [ceil(n · rate / own)].

    >>> at_rate(np.ones(8, np.float32), 2, 1).shape
    (4,)
    """
    if own == rate:
        return samples.astype(np.float32, copy=False)
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    up, down = rate // common, own // common
    found: np.ndarray = resample_poly(samples, up, down, window=_low_pass(max(up, down)))
    return found.astype(np.float32, copy=False)


@functools.lru_cache
def _low_pass(factor: int) -> np.ndarray:
    """The filter that scipy's ``resample_poly`` makes by default for this larger one of its factors, made once."""
    from scipy.signal import firwin

    found: np.ndarray = firwin(20 * factor + 1, 1.0 / factor, window=("kaiser", 5.0))
    return found


@contextmanager
def _opened(sound: StoredSound) -> Iterator[Any]:
    """The clip as soundfile opens it; what its library says while the clip is read is said as well.

    Raises:
        DataError: as the end of a sentence, where it is no sound that libsndfile reads; or soundfile is not installed.
    """
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:  # OSError: its library is not there
        raise DataError(NO_LIBRARY) from error
    opened = False
    try:
        with soundfile.SoundFile(io.BytesIO(sound.data) if sound.data is not None else str(sound.path)) as file:
            opened = True
            yield file
    except soundfile.LibsndfileError as error:
        said = str(error.error_string).strip().rstrip(".").lower()
        if opened:
            raise DataError(f"cannot be decoded ({said})") from error
        if not sound.n_bytes:
            said = "the file is empty"
        raise DataError(f"is not a sound file that soundfile can read ({said})") from error
    except (OSError, RuntimeError, TypeError) as error:
        raise DataError(f"cannot be read ({error})") from error


class SoundCheck(FileKind):
    """Which clips can be read, one after the other; else, if they are many, their header and end."""

    column, one, many, endings = "audio", "a clip of sound", "clips of sound", ".wav, .flac, .mp3"

    def __init__(self) -> None:
        self._left = WHOLE_BYTES
        self._silent: list[str] = []

    def looks_right(self, path: Path) -> bool:
        return looks_like_sound(path)

    def stored(self, name: str, path: Path) -> StoredSound:
        return StoredSound(name, path)

    def fault(self, item: StoredSound) -> str:
        try:
            self._left -= item.n_bytes
            if not item.look(whole=self._left >= 0):
                self._silent.append(item.name)
        except DataError as error:
            if str(error) == NO_LIBRARY:
                raise
            return str(error)
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        n = len(self._silent)
        return (f"{n} clip{'' if n == 1 else 's'} with only silence: {some(self._silent)}",) if n else ()


def looks_like_sound(path: Path) -> bool:
    """Whether a file is called as files of sound are, or begins as they do."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix:
        return False
    try:
        with path.open("rb") as file:
            return begins_like_sound(file.read(16))
    except OSError:
        return False


def begins_like_sound(start: bytes) -> bool:
    """Whether bytes begin as an encoded clip does."""
    return (
        start.startswith(SIGNATURES)
        or film_sounds.begins_like_film(start)
        or (start[:4] in (b"RIFF", b"RF64") and start[8:12] == b"WAVE")
    )


def is_sound(value: Any) -> bool:
    """Whether the cell of a table is a clip: the name of a file, encoded bytes, or samples with their rate."""
    if hasattr(value, "get_all_samples"):
        return True
    if isinstance(value, Mapping):
        if value.get("array") is not None and value.get("sampling_rate"):
            return True
        data, path = value.get("bytes"), value.get("path")
        return is_sound(data) or is_sound(path) if data is not None else is_sound(path)
    if isinstance(value, (bytes, bytearray)):
        return begins_like_sound(bytes(value[:16]))
    return isinstance(value, str) and Path(value).suffix.lower() in SUFFIXES


def stored_sound(value: Any, folders: Sequence[Path], place: Path, number: int) -> StoredSound | None:
    """The clip that a row holds: a path, bytes as ``datasets`` keeps them, or samples with their rate.

    None where the value is nothing of the kind.

    Args:
        value: what stands in the cell.
        folders: where a relative path is looked for.
        place: the table, for messages.
        number: of the sample.

    Raises:
        DataNotFoundError: there is no such file.
    """
    name = f"clip of sample {number}"
    if hasattr(value, "get_all_samples"):  # a decoder of torchcodec, as datasets gives it
        decoded = value.get_all_samples()
        value = {"array": decoded.data.numpy(), "sampling_rate": decoded.sample_rate}
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            samples = _as_samples(value["array"])
            if samples is None or not value.get("sampling_rate"):
                return None
            return StoredSound(name, samples=samples, rate=int(value["sampling_rate"]))
        if isinstance(value.get("bytes"), bytes):
            return StoredSound(value.get("path") or name, data=value["bytes"])
        value = value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return StoredSound(name, data=bytes(value))
    if not isinstance(value, str) or not value:
        return None
    paths = [folder / Path(value).expanduser() for folder in folders]
    path = next((one for one in paths if one.is_file()), None)
    for one in (path, paths[0]):
        if one is not None:
            check_readable(one, place)
    if path is None:
        raise DataNotFoundError(f"has no file of sound at {paths[0]}")
    return StoredSound(value, path=path)


def _as_samples(values: Any) -> np.ndarray | None:
    """float32 [n] or [n, channels], from -1 to 1; None where the values are no samples.

    Whole numbers are those of PCM, as wide as their type; Python's as those of 16 bits.

    >>> _as_samples(np.array([[0, 16384, -32768]], np.int16)).tolist()
    [[0.0], [0.5], [-1.0]]
    """
    try:
        found = np.asarray(values)
        if found.dtype == np.uint8:
            found = (found.astype(np.float32) - 128.0) / 128.0
        elif np.issubdtype(found.dtype, np.integer):
            bits = 16 if found.dtype.itemsize == 8 else 8 * found.dtype.itemsize
            found = found / 2.0 ** (bits - 1)
        found = found.astype(np.float32)
    except (TypeError, ValueError):
        return None
    if found.ndim == 2 and found.shape[0] < found.shape[1]:  # channels first
        found = found.T
    return found if found.ndim in (1, 2) else None


def folders_beside(place: Path) -> list[Path]:
    """Where relative paths in a table are looked for: its own folder, and folders of clips beside and around it.

    Common Voice has its clips in ``clips``, LJSpeech in ``wavs``, ESC-50 in ``../audio``.
    """
    own = place if place.is_dir() else place.parent
    if place.is_dir() and len(tables := {path.parent for path in place.rglob("*") if path.suffix in TABLES}) == 1:
        own = tables.pop()
    return [own, *(folder for name in BESIDE if (folder := own / name).is_dir())]


def has_sound_folder(root: Path) -> bool:
    """Whether a folder has files of sound and no table that could name them."""
    files = [path for path in root.rglob("*") if path.is_file()]
    suffixes = {path.suffix.lower() for path in files}
    return bool(suffixes & SUFFIXES) and not suffixes & set(TABLES)


def sound_folder(root: Path) -> tuple[tuple[StoredSound, ...], tuple[str, ...], Reading]:
    """The clips below ``root``, the name of each one's class (the sub-folder it is in), and what was not read.

    Raises:
        DataError: clips stand outside the classes' folders, there are fewer than two classes, or none of the clips of
            one can be read.
    """
    return class_folders(root, SoundCheck())


def told_of_rates(headers: Sequence[SoundHeader], rate: int) -> list[str]:
    """How clips become what the model takes, a line each."""
    others = Counter(header.rate for header in headers if header.rate != rate)
    lines = []
    if others:
        rates = ", ".join(f"{one:,}" for one in sorted(others))
        lines.append(f"{others.total()} of {len(headers)} clips are resampled to {rate:,} Hz, from {rates} Hz")
    several = sum(header.channels > 1 for header in headers)
    if several:
        lines.append(f"{several} of {len(headers)} clips have several channels, which are averaged")
    return lines
