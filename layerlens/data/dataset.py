"""Samples in a fixed order, and the deterministic split that keeps calibration, head and test data apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from layerlens.data.rows import Reading
from layerlens.exceptions import DataError

TEST_SHARE = 0.15
FEWEST = 2
"""Samples that something can be measured on."""


@runtime_checkable
class Stored(Protocol):
    """A value that is read when it is needed: an image, or a sample of the user's own data set."""

    @property
    def identity(self) -> str:
        """A cheap identity of the value: the same in every run."""

    def content(self) -> bytes:
        """All that it is, for fingerprints."""


@dataclass(frozen=True)
class Dataset:
    """Samples with what a model is to say of them.

    Args:
        columns: what the samples are made of, each column as long as ``labels``: ``text`` and, for pairs, ``pair``
            (questions and their contexts too); ``words`` (tuples of words); ``image``; ``sample`` (of a user's own data
            set); of language models also what ``read_language`` says.
        labels: for each sample the index into ``label_names``, a tuple of those (one for each word, or all classes of
            the sample), a number (regression), a text (seq2seq), a tuple of (start, text) answers, or None where a
            sample is its own target.
        label_names: the classes; none where there are no classes.
        description: one line on where the data comes from, for the report.
        task: name of the task that the samples turned out to be for, where it is another than the one asked for.
        reading: what was read of its source; None where it comes from none.
        letters: characters that the texts in ``labels`` are written with, where a vocabulary can be made of them.
    """

    columns: Mapping[str, tuple[Any, ...]]
    labels: tuple[Any, ...]
    label_names: tuple[str, ...] = ()
    description: str = ""
    task: str = ""
    reading: Reading | None = None
    letters: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a new head has outputs for: the classes, or else the letters."""
        return self.label_names or self.letters

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts; none where the samples are something else."""
        return self.columns.get("text", ())

    @property
    def pairs(self) -> tuple[str, ...]:
        """The second text of each sample; none where there are no pairs."""
        return self.columns.get("pair", ())

    @property
    def notes(self) -> list[str]:
        """What the user should be warned of, a line each: rows of the source that are not among the samples."""
        if self.reading is None or not self.reading.left_out:
            return []
        what = "files" if self.reading.names else "rows"
        return [f"data: left out {n} of {self.reading.total:,} {what}: {reason}" for n, reason in self.reading.reasons]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over contents and labels in order."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels):
            for values in self.columns.values():
                content = _content(values[index])
                digest.update(f"{len(content)}:".encode() + content)
            digest.update(f"={self._named(label)!r};".encode())
        return digest.hexdigest()

    def with_label_order(self, names: Sequence[str]) -> Dataset:
        """The same samples with the classes numbered in the order of ``names``, which has all of them."""
        index = {name: position for position, name in enumerate(names)}
        moved = [index[name] for name in self.label_names]
        labels = tuple(
            tuple(moved[one] for one in label) if isinstance(label, tuple) else moved[label] for label in self.labels
        )
        return replace(self, labels=labels, label_names=tuple(names))

    def select(self, indices: Sequence[int]) -> Dataset:
        """The samples with these indices, in this order."""
        columns = {name: tuple(values[index] for index in indices) for name, values in self.columns.items()}
        return replace(self, columns=columns, labels=tuple(self.labels[index] for index in indices))

    def split(self, n_calibration: int, n_head: int, seed: int) -> tuple[Dataset, Dataset]:
        """Disjoint samples for calibration and for fitting the task head, in an order drawn by hashing with ``seed``.

        15 % of the samples, chosen by what they are identified by alone (texts by their content, files by their names),
        belong to the test split and are in neither. A small data set gives all it has, calibration first.

        Raises:
            DataError: fewer than 2 samples are left for calibration.
        """
        keyed = []
        for index, (content, test) in enumerate(self._digests_and_test()):
            if not test:
                keyed.append((hashlib.sha256(f"{seed}:{index}:".encode() + content).digest(), index))
        order = [index for _, index in sorted(keyed)]
        calibration = order[:n_calibration]
        if len(calibration) < FEWEST:
            raise DataError(
                f"data.source: {len(self)} samples leave {len(calibration)} for calibration after the {TEST_SHARE:.0%} "
                "test split; give at least 2, better 256 or more"
            )
        return self.select(calibration), self.select(order[n_calibration : n_calibration + n_head])

    def split_test(self) -> tuple[Dataset, Dataset]:
        """(training, test) samples: the test split that ``split`` leaves alone, and all the others, in their order."""
        of_test = [test for _, test in self._digests_and_test()]
        parts = ([index for index, test in enumerate(of_test) if test is wanted] for wanted in (False, True))
        train, test = (self.select(part) for part in parts)
        return train, test

    def _digests_and_test(self) -> list[tuple[bytes, bool]]:
        """Of each sample what it is identified by, and whether it is of the test split: of none where that would leave
        fewer than 2, as where all samples are the same.
        """
        digests = self.digests()
        test = [_of_test(content) for content in digests]
        enough = len(test) - sum(test) >= FEWEST
        return [(content, one and enough) for content, one in zip(digests, test, strict=True)]

    def digests(self) -> list[bytes]:
        """SHA-256 of what each sample is identified by."""
        return [hashlib.sha256(self._identity(index)).digest() for index in range(len(self))]

    def _identity(self, index: int) -> bytes:
        """What a sample is identified by: all of its columns, not its label."""
        return b"\0".join(_identity(values[index]) for values in self.columns.values())

    def _named(self, label: Any) -> Any:
        if not self.label_names:
            return label
        return tuple(map(self._named, label)) if isinstance(label, tuple) else self.label_names[int(label)]


def _identity(value: Any) -> bytes:
    if isinstance(value, tuple):
        return b"\0".join(map(_identity, value))
    return value.identity.encode() if isinstance(value, Stored) else _content(value)


def _content(value: Any) -> bytes:
    if isinstance(value, Stored):
        return value.content()
    if isinstance(value, tuple):
        return b"\0".join(map(_content, value))
    return str(value).encode()


def _of_test(content: bytes) -> bool:
    return int.from_bytes(content[:8], "big") < TEST_SHARE * 2**64
