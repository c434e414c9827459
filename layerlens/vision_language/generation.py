"""What a language model hands back: the answer, with the time of every token and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from layerlens.exceptions import LayerLensError


@dataclass(frozen=True)
class Communication:
    """Time that goes into reaching the language model rather than into its work.

    Args:
        method: how it was found: "in process", "client time minus server time", or "bounds".
        ms: the value; None where there are only bounds.
        lower_ms, upper_ms: bounds; equal to ``ms`` if it is known.
        note: what the bounds rest on.
    """

    method: str
    ms: float | None
    lower_ms: float
    upper_ms: float
    note: str = ""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Args:
        text: the whole answer.
        steps_ms: consecutive steps and their wall time; their sum is the wall time of the call.
        time_to_first_token_ms: from sending (or starting) the request that succeeded to its first token.
        token_ms: time between tokens, one entry for each token after the first.
        token_unit: "token", or "chunk" where the server sends several tokens at once.
        prompt_tokens, completion_tokens: as counted by the model or server; None where it does not say.
        finish_reason: "stop" or "length", as given.
        communication: see there.
        attempts: requests made, failed ones included.
        streamed: False where the server answered in one piece, so that there are no times of tokens.
        failures: why earlier attempts failed, a line each.
    """

    text: str
    steps_ms: dict[str, float]
    time_to_first_token_ms: float | None
    token_ms: tuple[float, ...]
    token_unit: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    communication: Communication
    attempts: int = 1
    streamed: bool = True
    failures: tuple[str, ...] = ()


class GenerationError(LayerLensError):
    """The language model gave no whole answer; what came of it is kept.

    Args:
        reason: one line.
        partial_text: what had arrived.
        steps_ms: how the time up to the failure splits.
        attempts: requests made.
        unreachable: nobody answers there.
    """

    def __init__(
        self,
        reason: str,
        *,
        partial_text: str = "",
        steps_ms: dict[str, float] | None = None,
        attempts: int = 1,
        unreachable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.partial_text, self.attempts, self.unreachable = partial_text, attempts, unreachable
        self.steps_ms = steps_ms or {}


@dataclass
class Tokens:
    """Arrival times of the tokens of one answer, in seconds of one clock."""

    started: float
    times: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float | None:
        """From the start to the first token."""
        return 1e3 * (self.times[0] - self.started) if self.times else None

    @property
    def intervals_ms(self) -> tuple[float, ...]:
        """Between one token and the next."""
        return tuple(1e3 * (new - old) for old, new in zip(self.times, self.times[1:], strict=False))


class LanguageModel(Protocol):
    """A model in this process or behind a server."""

    def generate(self, messages: list[dict[str, str]], max_new_tokens: int) -> Generation:
        """The answer to a chat.

        Raises:
            GenerationError: there is none.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the result records of it; no secrets."""
        ...
