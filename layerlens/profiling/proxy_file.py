"""Proxy gains as bytes: what the sensitivity cache keeps of a study, finished or not, and statistics files hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from layerlens.models import Option, ProxyGain, ProxyStudy

FORMAT = "layerlens-proxies-1"


@dataclasses.dataclass(frozen=True)
class SavedProxies:
    """Where the gains of a study are kept, one after the other.

    Args:
        read: what was written last, None when there is nothing or it is damaged.
        write: keeps bytes in place of what was kept.
    """

    read: Callable[[], bytes | None]
    write: Callable[[bytes], None]

    def restore(self) -> dict[str, Any]:
        """The content that was kept last: ``study`` (see ``study_from_json``) and ``joint``; {} where there is none."""
        data = self.read()
        try:
            content = json.loads(data) if data else {}
        except ValueError:
            return {}
        return content if isinstance(content, dict) and content.get("format") == FORMAT else {}

    def keep(self, **parts: Any) -> None:
        """Replace these parts of the content."""
        self.write(json.dumps({**self.restore(), "format": FORMAT, **parts}).encode())


def study_to_json(study: ProxyStudy | None) -> dict[str, Any] | None:
    """The study as JSON values."""
    return None if study is None else dataclasses.asdict(study)


def study_from_json(content: dict[str, Any] | None) -> ProxyStudy | None:
    """What ``study_to_json`` made.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    if content is None:
        return None
    return ProxyStudy(**{**content, "gains": tuple(map(gain_from, content["gains"]))})


def gain_from(content: dict[str, Any]) -> ProxyGain:
    """One gain from its JSON values."""
    return ProxyGain(Option(**content["option"]), content["gain"], content["standard_error"])
