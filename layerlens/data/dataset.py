"""Labelled texts in a fixed order, and the deterministic split that keeps calibration, head and test data apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerlens.exceptions import DataError

TEST_SHARE = 0.15


@dataclass(frozen=True)
class TextDataset:
    """Texts with what a model is to say of them.

    Args:
        texts: the texts, none of them empty.
        labels: for each text the index into ``label_names``; a number where the task is regression; 0 where the text is
            its own target (language models).
        label_names: the classes, sorted; none where there are no classes.
        description: one line on where the data comes from, for the report.
        pairs: the second sentence of each text, where the task has one.
    """

    texts: tuple[str, ...]
    labels: tuple[float, ...]
    label_names: tuple[str, ...]
    description: str
    pairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over texts and labels in order."""
        digest = hashlib.sha256()
        for text, label in zip(self.whole_texts, self.labels, strict=True):
            said = self.label_names[int(label)] if self.label_names else repr(label)
            digest.update(f"{len(text)}:{text}={said};".encode())
        return digest.hexdigest()

    @property
    def whole_texts(self) -> tuple[str, ...]:
        """Every sample's text, with its second sentence where there is one: what a sample is told apart by."""
        if not self.pairs:
            return self.texts
        return tuple(f"{text}\0{pair}" for text, pair in zip(self.texts, self.pairs, strict=True))

    def with_label_order(self, names: Sequence[str]) -> TextDataset:
        """The same samples with the classes numbered in the order of ``names``, which are the same classes."""
        index = {name: position for position, name in enumerate(names)}
        labels = tuple(index[self.label_names[int(label)]] for label in self.labels)
        return replace(self, labels=labels, label_names=tuple(names))

    def select(self, indices: list[int]) -> TextDataset:
        """The samples with these indices, in this order."""
        return TextDataset(
            tuple(self.texts[index] for index in indices),
            tuple(self.labels[index] for index in indices),
            self.label_names,
            self.description,
            tuple(self.pairs[index] for index in indices) if self.pairs else (),
        )

    def split(self, n_calibration: int, n_head: int, seed: int) -> tuple[TextDataset, TextDataset]:
        """Disjoint samples for calibration and for fitting the task head, in an order drawn by hashing with ``seed``.

        15 % of the texts, chosen by their content alone, belong to the test split and are in neither. A small data set
        gives all it has, calibration first.

        Raises:
            DataError: fewer than 2 samples are left for calibration.
        """
        keyed = []
        for index, text in enumerate(self.whole_texts):
            content = hashlib.sha256(text.encode()).digest()
            if int.from_bytes(content[:8], "big") >= TEST_SHARE * 2**64:
                keyed.append((hashlib.sha256(f"{seed}:{index}:".encode() + content).digest(), index))
        order = [index for _, index in sorted(keyed)]
        calibration = order[:n_calibration]
        if len(calibration) < 2:
            raise DataError(
                f"data.source: {len(self)} samples leave {len(calibration)} for calibration after the {TEST_SHARE:.0%} "
                "test split; give at least 2, better 256 or more"
            )
        return self.select(calibration), self.select(order[n_calibration : n_calibration + n_head])
