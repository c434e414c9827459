"""Text files as people have them: byte-order marks, encodings named or found, and lines that are not text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from layerlens.config import DataConfig
from layerlens.data.rows import SourceRows
from layerlens.exceptions import DataError

UTF8 = "utf-8"
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks; UTF-32's begins like UTF-16's, so it stands first."""
LOOKED_AT = 2**20
"""Bytes at the beginning of a file by which its encoding is found."""
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*OPENERS, ".zst", ".zip")
ASIDE = re.compile(r"(^|/)(__MACOSX/|\.)")
"""What macOS puts into archives beside the files."""
ENOUGH_LINES, ENOUGH_BYTES = 3, 8
"""Lines that are not UTF-8, and bytes beyond ASCII in them, from which another encoding is looked for."""


class Line(NamedTuple):
    """One line of a file.

    Args:
        number: counted from 1.
        text: with its end; characters that cannot be read are U+FFFD.
        n_bytes: about how many it takes in the file.
        fault: where it is not text: the byte of the file, and what stands there; "" where it is.
    """

    number: int
    text: str
    n_bytes: int
    fault: str = ""


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where its name ends with .gz, .bz2, .xz, .zst or .zip.

    Raises:
        DataError: an archive has several files, or what reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:  # the file stays open as long as what is read from it
            return archive.open(_member(path, archive))
    if suffix == ".zst":
        try:
            import pyarrow
        except ModuleNotFoundError as error:
            raise DataError(f"data.source: {path.name} needs pyarrow: pip install 'layerlens[hf]'") from error
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if suffix in OPENERS:
        opener: IO[bytes] = OPENERS[suffix](path)
        return opener
    return path.open("rb")


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    """The one file of an archive."""
    names = [one.filename for one in archive.infolist() if not one.is_dir() and not ASIDE.search(one.filename)]
    if len(names) != 1:
        raise DataError(
            f"data.source: {path.name} has {len(names)} files ({', '.join(names[:4])}{' ...' * (len(names) > 4)}); "
            "unpack it and give the file or the folder"
        )
    return names[0]


def check_encoding(name: str) -> str:
    """The encoding as Python calls it.

    Raises:
        DataError: there is none of that name.
    """
    try:
        found = codecs.lookup(name)
    except LookupError as error:
        raise DataError(
            f"data.encoding: Python knows no encoding {name!r}; use one such as utf-8, utf-16, cp1252 or shift_jis"
        ) from error
    return "utf-8-sig" if found.name == UTF8 else found.name


def encoding_of(path: Path, named: str | None) -> tuple[str, str]:
    """(encoding, what to tell the user of how it was found): the named one, by the byte-order mark, or by the content.

    Raises:
        DataError: the named one does not exist, or the content is in none that can be told.
    """
    with opened(path) as file:
        start = file.read(LOOKED_AT)
    for mark, encoding in MARKS:
        if start.startswith(mark) and (named is None or check_encoding(named).startswith("utf")):
            return encoding, ""
    if named is not None:
        return check_encoding(named), ""
    if b"\0" in start[:1024]:
        pairs = start[: len(start) // 2 * 2]
        even, odd = pairs[0::2].count(0), pairs[1::2].count(0)
        if max(even, odd) > len(pairs) // 5:
            found = "utf-16-be" if even > odd else "utf-16-le"
            return found, f"read as {found}, because its bytes look like it; if that is wrong, set data.encoding"
    return _by_content(path, start)


def encoding_noted(path: Path, config: DataConfig, found: SourceRows) -> str:
    """``encoding_of`` with ``data.encoding``; how it was found is noted."""
    encoding, told = encoding_of(path, config.encoding)
    if told:
        found.note(f"{path.name}: {told}")
    return encoding


def _by_content(path: Path, start: bytes) -> tuple[str, str]:
    lines = start.splitlines()[:-1] if len(start) == LOOKED_AT else start.splitlines()
    beyond = [line for line in lines if not line.isascii()]
    broken = [line for line in beyond if not _is_utf8(line)]
    if len(broken) < ENOUGH_LINES or 2 * len(broken) <= len(beyond):
        return UTF8, ""  # single lines that are not are left out
    sample = b"\n".join(broken)
    guess = _guess(sample) if len(re.sub(rb"[\x00-\x7f]", b"", sample)) >= ENOUGH_BYTES else None
    if guess is None:
        number = lines.index(broken[0]) + 1
        raise DataError(
            f"data.encoding: {path} is not UTF-8 text: line {number}, {_fault(broken[0], start.index(broken[0]))}; set "
            "data.encoding to what it is, such as cp1252 or shift_jis, or save it as UTF-8"
        )
    return guess, f"read as {guess}, because it is not UTF-8 and looks like it; if that is wrong, set data.encoding"


def _guess(sample: bytes) -> str | None:
    try:
        from charset_normalizer import from_bytes
    except ModuleNotFoundError:
        return None
    found = from_bytes(sample).best()
    if found is None:
        return None
    western = ("cp1250", "cp1252", "latin_1", "iso8859_15", "cp1254", "cp1257", "mac_roman", "iso8859_9", "cp1258")
    if found.encoding in western:  # they differ in few characters, and Windows writes this one
        try:
            sample.decode("cp1252")
        except UnicodeDecodeError:
            return str(found.encoding)
        return "cp1252"
    return str(found.encoding)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode(UTF8)
    except UnicodeDecodeError:
        return False
    return True


def _fault(line: bytes, offset: int, encoding: str = UTF8) -> str:
    try:
        line.decode(encoding)
    except UnicodeDecodeError as error:
        return f"byte {offset + error.start:,} of the file (0x{line[error.start]:02x}) is not {encoding.upper()}"
    return ""


def lines_of(path: Path, encoding: str) -> Iterator[Line]:
    """The lines of a text file, one at a time; line ends are ``\\n``, ``\\r\\n``, or both.

    Raises:
        DataError: an encoding with several bytes for a character, other than UTF-8, is broken.
    """
    if encoding not in (UTF8, "utf-8-sig"):
        yield from _decoded_lines(path, encoding)
        return
    offset = 0
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            begin = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            fault = "" if raw.isascii() else _fault(raw, offset)
            yield Line(number, raw[begin:].decode(UTF8, "replace"), len(raw), fault)
            offset += len(raw)


def _decoded_lines(path: Path, encoding: str) -> Iterator[Line]:
    with opened(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="") as text:
        number, stream = 0, iter(text)
        while True:
            number += 1
            try:
                line = next(stream, None)
            except UnicodeError as error:
                raise DataError(
                    f"data.encoding: {path}: line {number} or one soon after it is not {encoding}: {error}; set "
                    "data.encoding to what it is"
                ) from error
            if line is None:
                return
            yield Line(number, line.removeprefix("\ufeff") if number == 1 else line, len(line))


def suffix_of(path: Path) -> str:
    """How a file's name ends, in lower case and without .gz and the like; of d.zip how the file in it ends."""
    if path.suffix.lower() not in PACKED:
        return path.suffix.lower()
    inside = path.with_suffix("").suffix.lower()
    if inside or path.suffix.lower() != ".zip" or not path.is_file():
        return inside
    try:
        with zipfile.ZipFile(path) as archive:
            return Path(_member(path, archive)).suffix.lower()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"data.source: cannot read {path}: {error}") from error
