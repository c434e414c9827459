"""What is kept in a file or in memory until it is needed: an image, a clip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from layerlens.exceptions import DataError


@dataclass(frozen=True)
class StoredFile:
    """Encoded bytes in a file or in memory, or what they would be decoded to.

    Args:
        name: what messages call it, and what splits tell it apart by.
        path: the file, if there is one.
        data: the encoded bytes, if there is no file.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """The name of a file, the content of anything else."""
        return self.name if self.path is not None else hashlib.sha256(self.content()).hexdigest()

    def decoded(self) -> bytes | None:
        """What is there without an encoding, as bytes; None where it is encoded."""
        return None

    def content(self) -> bytes:
        """The encoded bytes, or what is there without an encoding.

        Raises:
            DataError: the file cannot be read.
        """
        decoded = self.decoded()
        if decoded is not None:
            return decoded
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source: cannot read {self.name}: {error.strerror or error}") from error
