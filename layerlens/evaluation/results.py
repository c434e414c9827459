"""The results of a study: JSON lines that are only ever appended to, so that an interrupted study goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerlens.exceptions import DataError

Record = dict[str, Any]


def allocation_key(ranks: Mapping[str, int], kind: str = "lora") -> str:
    """A short name of an allocation: arms that choose the same one share its runs."""
    text = json.dumps([kind, sorted(ranks.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class ResultsFile:
    """One task's records.

    Kinds of record: "arm" (what an arm chose at a budget), "run" (one fine-tune), "reference" (the frozen model, full
    fine-tuning), "single" (one layer adapted alone) and "profile".
    """

    path: Path
    records: list[Record] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> ResultsFile:
        """The file's records; none where it is not there. A last line that was cut off is removed from it.

        Raises:
            DataError: another line is no JSON object.
        """
        found = cls(path)
        if found.refresh():
            whole = path.read_text(encoding="utf-8").rpartition("\n")
            path.write_text(whole[0] + whole[1], encoding="utf-8")
        return found

    def refresh(self) -> bool:
        """Read the file again, to which another process may have added; whether its last line is cut off.

        Raises:
            DataError: another line is no JSON object.
        """
        self.records = []
        if not self.path.is_file():
            return False
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith("\n"):
                return True
            try:
                self.records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{self.path}:{number}: not a JSON object ({error}); remove the line") from error
        return False

    def append(self, records: Iterable[Record]) -> None:
        """Add records to the file, all in one write."""
        added = list(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in added))
        self.records += added

    def select(self, **values: Any) -> list[Record]:
        """Records that have all these values."""
        return [record for record in self.records if all(record.get(key) == value for key, value in values.items())]
