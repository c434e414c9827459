"""Files of words with their tags, one word a line and a blank line between sentences (Tjong Kim Sang and De Meulder
2003, arXiv:cs/0306050), and Universal Dependencies' CoNLL-U.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from layerlens.data.rows import SourceRows
from layerlens.data.text_files import Line

DOCUMENT = "-DOCSTART-"
TOKENS, TAGS = "tokens", "tags"
OF_2003 = (TOKENS, "pos_tags", "chunk_tags", TAGS)
"""Columns of the data of 2003: the last are the tags of entities."""
FORM, UPOS, FIELDS = 1, 3, 10


def read_conll(lines: Iterator[Line], found: SourceRows) -> None:
    """The first field of a line is the word, the last its tag, fields between them are columns of their own.

    Fields are separated by tabs where a line has some, else by spaces. A sentence with a line that is none is left out.
    """
    for sentence in _sentences(lines):
        fields = [
            line.text.rstrip("\r\n").split("\t") if "\t" in line.text.strip() else line.text.split()
            for line in sentence
        ]
        kept = [place for place, parts in enumerate(fields) if parts[0] != DOCUMENT]
        if not kept or not found.wanted():
            continue
        sentence, fields = [sentence[place] for place in kept], [fields[place] for place in kept]
        if reason := _fault(sentence, fields):
            found.leave_out(reason)
            continue
        n = len(fields[0])
        names = OF_2003 if n == len(OF_2003) else (TOKENS, *(f"column_{place}" for place in range(2, n)), TAGS)
        columns = dict(zip(names, map(list, zip(*fields, strict=True)), strict=True))
        found.add(columns, sum(line.n_bytes for line in sentence))


def read_conllu(lines: Iterator[Line], found: SourceRows) -> None:
    """The words of CoNLL-U with their universal parts of speech; words that stand for several, and empty ones, are not
    taken.
    """
    for sentence in _sentences(line for line in lines if not line.text.startswith("#")):
        if not found.wanted():
            continue
        fields = [line.text.rstrip("\r\n").split("\t") for line in sentence]
        if reason := _fault(sentence, fields, FIELDS):
            found.leave_out(reason)
            continue
        words = [parts for parts in fields if parts[0].isdigit()]
        row = {TOKENS: [parts[FORM] for parts in words], TAGS: [parts[UPOS] for parts in words]}
        found.add(row, sum(line.n_bytes for line in sentence))


def _sentences(lines: Iterator[Line]) -> Iterator[list[Line]]:
    for blank, group in itertools.groupby(lines, lambda line: not line.text.strip()):
        if not blank:
            yield list(group)


def _fault(sentence: list[Line], fields: list[list[str]], expected: int | None = None) -> str:
    """Why a sentence cannot be used; "" where it can."""
    for line, parts in zip(sentence, fields, strict=True):
        if line.fault:
            return f"(line {line.number}) is not text: {line.fault}"
        if len(parts) < 2 or len(parts) != (expected or len(fields[0])):
            wanted = expected or max(2, len(fields[0]))
            return f"(line {line.number}) has {len(parts)} fields where {wanted} are needed: a word and its tag"
    return ""
