"""CSV as people have it: any delimiter, no line of names, or one that comes again, decimal commas, odd records."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from layerlens.config import DataConfig
from layerlens.data.rows import SourceRows
from layerlens.data.text_files import encoding_noted, lines_of, suffix_of
from layerlens.data.values import is_number
from layerlens.exceptions import DataError

MAX_FIELD = 2**31 - 1
DELIMITERS = (",", ";", "\t", "|")
NO_NAME = "Unnamed: {}"
"""As pandas calls a column without a name: ``DataFrame.to_csv`` writes its index as one."""
LOOKED_AT = 200
"""Records by which it is known what the first line is, and which columns have decimal commas."""
DECIMAL = re.compile(r"\s*[+-]?\d*,\d+\s*")
NAME = re.compile(r"\W*[^\W\d_]\w*\W*")
"""A single word: what a column may well be named."""
SENTENCE = 8
"""A first line with so many words in a field is none of names."""
ENDLESS = "unexpected end of data"
"""The csv module's error where a quote is never closed: what follows it is lost."""


class Record(NamedTuple):
    """One record: its first line, counted from 1, its fields, bytes in the file, and why it cannot be read."""

    line: int
    fields: list[str]
    n_bytes: int
    fault: str = ""


def read_csv(path: Path, config: DataConfig, found: SourceRows) -> None:
    """Records under a line of names, whose delimiter is the most frequent one of it unless ``data.delimiter`` says.

    A file whose first line is data has columns ``column 1``, ``column 2`` ...

    Raises:
        DataError: with the line from which a quote is never closed.
    """
    csv.field_size_limit(MAX_FIELD)
    delimiter, records = _delimited(path, config, found)
    header = next(records, Record(1, [], 0))
    if header.fault and not header.fields:
        raise DataError(f"data.source: {path}:{header.line}: {header.fault.removeprefix('is ')}")
    begin = list(itertools.islice(records, LOOKED_AT))
    nameless = _is_data(header.fields, begin)
    if nameless:
        names = [f"column {number}" for number in range(1, len(header.fields) + 1)]
        begin.insert(0, header)
        found.note(
            f"the first line of {path.name} looks like data, so its columns are called {', '.join(names[:2])} ...; if "
            "it has names, rename them"
        )
    else:
        names = unique_names(header.fields, found)
    commas = _decimal_commas(begin, len(names)) if delimiter == ";" else []  # as Excel writes it where commas are
    if commas:
        found.note(f"decimal commas in {', '.join(names[place] for place in commas)}")
    for record in itertools.chain(begin, records):
        if (not record.fields and not record.fault) or not found.wanted():
            continue
        if record.fault:
            found.leave_out(f"(line {record.line}) {record.fault}")
        elif len(record.fields) != len(names):
            fields = len(record.fields)
            found.leave_out(f"(line {record.line}) has {fields} fields, and the header has {len(names)}")
        elif record.fields == header.fields and not nameless:
            found.leave_out(f"(line {record.line}) repeats the column names")
        else:
            for place in commas:
                if DECIMAL.fullmatch(record.fields[place]):
                    record.fields[place] = record.fields[place].replace(",", ".")
            found.add(dict(zip(names, record.fields, strict=True)), record.n_bytes)


def _delimited(path: Path, config: DataConfig, found: SourceRows) -> tuple[str, Iterator[Record]]:
    """The delimiter and the records."""
    encoding = encoding_noted(path, config, found)
    faults: dict[int, str] = {}
    size = [0]

    def texts() -> Iterator[str]:
        for line in lines_of(path, encoding):
            if line.fault:
                faults[line.number] = line.fault
            size[0] += line.n_bytes
            yield line.text

    lines = texts()
    first = next(lines, "")
    delimiter, skipped = config.delimiter, 0
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's way to say it
        delimiter, first, skipped = delimiter or first.strip()[-1], next(lines, ""), 1
    default = "\t" if suffix_of(path) == ".tsv" else ","
    delimiter = delimiter or delimiter_of(first, default)
    if delimiter != default:
        found.note(f"its columns are separated by {delimiter!r}")
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)

    def records() -> Iterator[Record]:
        while True:
            begin, size[0] = reader.line_num + 1 + skipped, 0
            try:
                fields = next(reader, None)
            except csv.Error as error:
                why = f"is not CSV with the delimiter {delimiter!r}: {error}"
                if str(error) == ENDLESS:
                    raise DataError(f"data.source: {path}:{begin}: {why.removeprefix('is ')}") from error
                yield Record(begin, [], size[0], why)
                continue
            if fields is None:
                return
            end = reader.line_num + skipped
            fault = next((faults[n] for n in range(begin, end + 1) if n in faults), "") if faults else ""
            yield Record(begin, fields, size[0], f"is not text: {fault}" if fault else "")

    return delimiter, records()


def _is_data(first: Sequence[str], records: Sequence[Record]) -> bool:
    """Whether the first line is none of names.

    A field of it stands in its own column again (``pos``), though the whole line does not, and the others are sentences
    or no words; or it has a sentence and a number.
    """
    if len(first) < 2 or len(set(first)) < len(first):
        return False
    if [name for name in first if name.strip()] in ([str(n) for n in range(k)] for k in (len(first) - 1, len(first))):
        return False  # pandas' names of columns that have none
    others = [record.fields for record in records if len(record.fields) == len(first) and record.fields != first]
    again = [any(one[place] == name for one in others) for place, name in enumerate(first)]
    wordy = any(len(name.split()) >= SENTENCE for name in first)
    words = any(NAME.fullmatch(name) for name, stands in zip(first, again, strict=True) if not stands)
    return (any(again) and (wordy or not words)) or (wordy and any(map(is_number, first)))


def _decimal_commas(records: Sequence[Record], n_columns: int) -> list[int]:
    """Columns whose texts are all numbers with a decimal comma, or whole ones."""
    found = []
    for place in range(n_columns):
        texts = [one.fields[place] for one in records if len(one.fields) == n_columns and one.fields[place].strip()]
        with_comma = [text for text in texts if DECIMAL.fullmatch(text)]
        if with_comma and all(DECIMAL.fullmatch(text) or text.strip().lstrip("+-").isdecimal() for text in texts):
            found.append(place)
    return found


def delimiter_of(header: str, default: str = ",") -> str:
    """The delimiter that a header line has most of, outside of quotes; ``default`` where it has none."""
    outside = "".join(header.split('"')[::2])
    return max((default, *DELIMITERS), key=outside.count)


def unique_names(header: Sequence[str], found: SourceRows) -> list[str]:
    """Names of columns as pandas makes them: one without a name is ``Unnamed: 0``, a second ``text`` is ``text.1``."""
    names: list[str] = []
    for place, name in enumerate(header):
        name = name.strip() or NO_NAME.format(place)
        if name in names:
            number = 1
            while f"{name}.{number}" in (*names, *header):
                number += 1
            found.note(f"two columns are named {name!r}; the second is {name}.{number} here")
            name = f"{name}.{number}"
        names.append(name)
    return names
