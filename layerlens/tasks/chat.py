"""Texts and conversations as token ids, by the tokenizer and its chat template: as TRL's SFTTrainer makes them."""

from __future__ import annotations

import re
from typing import Any

from layerlens.data.conversations import OddRow, Turn, is_trained
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.encoded import common_prefix

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
UNLEARNT = (
    "turns of the assistant that are marked as not trained (weight: 0, train: false, loss: false) have no loss, as "
    "OpenAI, axolotl and ms-swift take these marks; TRL's trainers do not know them"
)
TRL = "trl (pip install 'layerlens[trl]')"


class Chat:
    """A tokenizer as the writer of samples.

    Args:
        pretrained: has the tokenizer.

    Attributes:
        end: its end-of-text token; "" where it has none.
        template: whether it has a chat template.
        said: what the user should know of it.
    """

    def __init__(self, pretrained: PretrainedModel) -> None:
        self.tokenizer: Any = pretrained.tokenizer
        self.path = pretrained.path
        self.end: str = self.tokenizer.eos_token or ""
        self.template = bool(getattr(self.tokenizer, "chat_template", None))
        self.said: dict[str, None] = {}
        self._marked: str | None = None
        self._by_prefix: bool | None = None

    def ended(self, text: str) -> str:
        """The text with the end-of-text token, without which a model never learns to stop."""
        if not self.end:
            self.said["the tokenizer has no end-of-text token (eos_token), so no sample ends with one"] = None
        return text if text.endswith(self.end) else text + self.end

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return found

    def turns(self, turns: list[Turn], *, prompt: bool = False, tools: Any = None) -> list[int]:
        """Token ids of a conversation; as a prompt with the beginning of the assistant's next turn.

        Raises:
            OddRow: the template refuses these turns.
            ConfigurationError: there is no template.
        """
        found: list[int] = self._rendered(turns, add_generation_prompt=prompt, tools=tools)["input_ids"]
        return found

    def continued(self, prompt: Any, answer: Any) -> tuple[list[int], int]:
        """A prompt with its answer (both texts, or both turns), and where the answer begins.

        As TRL does, the answer begins where the tokens of the prompt alone and of both together differ.
        """
        if isinstance(prompt, str):
            whole, alone = self.ids(prompt + self.ended(answer)), self.ids(prompt)
        else:
            whole, alone = self.turns(prompt + answer), self.turns(prompt, prompt=True)
        return whole, common_prefix(alone, whole)

    def assistant(self, turns: list[Turn], tools: Any = None) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant says.

        A template that marks them (``{% generation %}``) is taken at its word; for one of a known model family TRL has
        a marked twin; of any other, a turn is what the conversation is longer by with it.

        Raises:
            OddRow: the template refuses these turns, or none of the tokens are the assistant's.
        """
        if self._by_prefix is None:
            self._find_marks()
        if self._by_prefix:
            ids, said = self._turn_by_turn(turns, tools)
        else:
            more = {"chat_template": self._marked} if self._marked else {}
            found = self._rendered(turns, tools=tools, return_assistant_tokens_mask=True, **more)
            ids, said = found["input_ids"], [bool(one) for one in found["assistant_masks"]]
        unlearnt = [turn["role"] == "assistant" and not is_trained(turn) for turn in turns]
        if any(unlearnt) and any(said):
            self.said[UNLEARNT] = None
            said = self._without(said, unlearnt, turns, tools)
            if not any(said):
                raise OddRow("every turn of the assistant is marked as not trained")
        if not any(said):
            raise OddRow("the chat template produces no token for an assistant turn")
        return ids, said

    def _find_marks(self) -> None:
        template = self.tokenizer.chat_template if self.template else ""
        template = template.get("default", "") if isinstance(template, dict) else template or ""
        self._by_prefix = False
        if not template or MARKED.search(template):
            return
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            self._by_prefix = True
            self.said[
                "the chat template does not mark the assistant's tokens, so LayerLens finds them turn by turn (with "
                f"{TRL}, as its SFTTrainer does)"
            ] = None
            return
        try:
            self._marked = get_training_chat_template(self.tokenizer)
        except ValueError:
            self._by_prefix = True

    def _without(self, said: list[bool], unlearnt: list[bool], turns: list[Turn], tools: Any) -> list[bool]:
        """What the assistant says, without the turns that are not to be learnt."""
        starts = [place for place, own in enumerate(said) if own and (place == 0 or not said[place - 1])]
        own_turns = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(starts) != len(own_turns):  # turns that follow one another are one run of tokens
            _, off = self._turn_by_turn(turns, tools, unlearnt)
            return [own and not out for own, out in zip(said, off, strict=True)]
        kept = list(said)
        for start, end, number in zip(starts, [*starts[1:], len(said)], own_turns, strict=True):
            if unlearnt[number]:
                kept[start:end] = [False] * (end - start)
        return kept

    def _turn_by_turn(
        self, turns: list[Turn], tools: Any, chosen: list[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        ids = self.turns(turns, tools=tools)
        said = [False] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant" and (chosen is None or chosen[number]):
                start = common_prefix(self.turns(turns[:number], prompt=True, tools=tools), ids) if number else 0
                end = common_prefix(self.turns(turns[: number + 1], tools=tools), ids)
                said[start:end] = [True] * (end - start)
        return ids, said

    def _rendered(self, turns: list[Turn], *, tools: Any = None, **options: Any) -> Any:
        if not self.template:
            raise ConfigurationError(
                f"data.source: has conversations, and the tokenizer of {self.path} has no chat template; use the chat "
                "(instruct) model, or save its tokenizer with a chat_template"
            )
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, tools=tools or None, verbose=False, **options
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise OddRow(f"the chat template refuses it: {' '.join(str(error).split())[:120]}") from error
