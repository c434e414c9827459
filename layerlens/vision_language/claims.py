"""What the sentences of a report say of findings: of which class, how many, where, and how sure.

English alone is read. A sentence that says nothing of findings makes no claim.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
DOWN = {"upper": "upper", "top": "upper", "lower": "lower", "bottom": "lower"}
ACROSS = {"left": "left", "right": "right"}
BETWEEN = ("middle", "mid", "center", "centre", "central")
NUMBERS = {word: number for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
)} | {"single": 1, "pair": 2, "couple": 2}  # fmt: skip
FINDINGS = ("finding", "detection", "object", "abnormality", "anomaly", "lesion", "item")
"""Words for a finding of any class, where a number or a `no` stands before them."""
IRREGULAR = {"person": ("people",), "man": ("men",), "woman": ("women",), "child": ("children",), "mouse": ("mice",)}

_VERTICAL, _HORIZONTAL, _MIDDLE = "|".join(DOWN), "|".join(ACROSS), "|".join(BETWEEN)
_PLACE = re.compile(
    rf"\b(?:(?P<down>{_VERTICAL})(?:[\s-]+(?P<across>{_HORIZONTAL}|{_MIDDLE}))?"
    rf"|(?P<middle>{_MIDDLE})(?:[\s-]+(?P<across2>{_HORIZONTAL}|{_VERTICAL}))?"
    rf"|(?P<across3>{_HORIZONTAL})(?:[\s-]+(?P<down3>{_VERTICAL}|{_MIDDLE}))?)\b(?!\s+(?:out|away|now)\b)",
    re.IGNORECASE,
)
_SURE = r"(?:confidence|certainty|probability)"
_LEVEL = re.compile(
    rf"\b(high|moderate|medium|low)(?:[\s-]+level)?[\s-]+{_SURE}|{_SURE}(?:\s+level)?\W+(?:is\s+|of\s+)?(high|moderate|"
    r"medium|low)\b|\((high|moderate|medium|low)\)", re.IGNORECASE,
)  # fmt: skip
_SHARE = re.compile(r"(?<![\d.,])(?:(\d{1,3}(?:\.\d+)?)\s?%|([01]?\.\d+)(?!\d|\s?(?:%|[cmk]?m\b|px\b|pixel|inch)))")
_ABOUT_SURENESS = re.compile(r"confiden|certain|probab|score|likel|\bsure\b|\(\s*[\d.]+\s?%?\s*\)", re.IGNORECASE)
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|$)|$)")
_MARKER = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_NUMBER = rf"(?<![\d.,])(?:\d{{1,4}}(?![\d%]|[.,]\d)|{'|'.join(NUMBERS)})"
_BEFORE = re.compile(rf"\b({_NUMBER})(?:\s+of)?\s+(?:[\w-]+\s+){{0,3}}$", re.IGNORECASE)
_AFTER = re.compile(rf"^\s*(?:[:=(]|\|)\s*({_NUMBER})\b(?!\.\d)", re.IGNORECASE)
_BACK = re.compile(
    rf"\b(?:the|this|that|these|those|both|its|said|each)\s+(?:(?:{_VERTICAL}|{_HORIZONTAL}|{_MIDDLE}|first|second|third|"
    r"same|other|detected|listed)[\s-]+)*(?:[\w-]+\s+)?$", re.IGNORECASE,
)  # fmt: skip
_NONE = re.compile(
    r"\b(?:no|not|without|neither|nor|absence\s+of|free\s+of|negative\s+for)\s+(?:[\w-]+\s+){0,4}$", re.I
)
_NO_OTHER = re.compile(r"\bno\s+(?:other|others|further|additional|more|new)\b[^,;:]*$", re.IGNORECASE)
_NOT_AFTER = re.compile(r"^\W*(?:(?:was|were|is|are|has|have|had|been|could|can)\W+)*(?:not|none|absent|never)\b", re.I)
_JOINT = re.compile(r"^\s*(?:,|/|\band\b|\bor\b|\bnor\b|,\s*(?:and|or|nor)\b)\s*(?:[\w-]+\s+){0,2}$", re.IGNORECASE)
_CLAUSE = re.compile(r";|\b(?:but|however|although|while|whereas|except|apart)\b", re.IGNORECASE)
_POINTS_BACK = re.compile(r"\b(?:it|they|one|other|another|this|that|both|first|second|third|former|latter)\b", re.I)


@dataclass(frozen=True)
class Place:
    """Where a finding is said to be; None for a direction of which nothing is said."""

    down: str | None = None
    across: str | None = None

    def holds(self, words: str) -> bool:
        """Whether what is at ``words`` (see ``prompt.place``) can be said to be here."""
        down, _, across = ("middle center" if words == "middle" else words).partition(" ")
        return self.down in (None, down) and self.across in (None, across)

    def __str__(self) -> str:
        if (self.down, self.across) == ("middle", "center"):
            return "middle"
        return " ".join(word for word in (self.down, self.across) if word)


@dataclass(frozen=True)
class Sureness:
    """How sure a finding is said to be: a level in words, or a share with the largest error of its rounding."""

    level: str = ""
    share: float = 0.0
    error: float = 0.0

    def __str__(self) -> str:
        return self.level or f"{self.share:g}"


@dataclass(frozen=True, eq=False)
class Claim:
    """What is said of findings of one class.

    Args:
        label: the class; None for findings of any.
        count: the number that is said, 0 for none; None where none is.
        plural: more than one is said, without a number.
        points_back: it speaks of findings that were named before, and names no further ones.
        places, sureness: what is said of them.
    """

    label: str | None
    count: int | None = None
    plural: bool = False
    points_back: bool = False
    places: tuple[Place, ...] = ()
    sureness: tuple[Sureness, ...] = ()


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    claim: Claim
    none: bool = False


def sentences_of(report: str) -> list[str]:
    """The sentences of a text, and the lines of its lists."""
    lines = (_MARKER.sub("", line) for line in report.splitlines())
    return [found.strip() for line in lines for found in _SENTENCE.findall(line)]


def claims_of(sentence: str, known: Sequence[str]) -> list[Claim]:
    """What one sentence says of findings.

    Args:
        sentence: one of ``sentences_of``.
        known: names of all classes.
    """
    text = sentence.replace("*", "").replace("`", "")
    clauses = [part for part in _CLAUSE.split(text) if part.strip()]
    if len(clauses) > 1 and all(_mentions(part, known) or not _says_more(part) for part in clauses):
        return [claim for part in clauses for claim in _claims_of_clause(part, known)]
    return _claims_of_clause(text, known)


def _says_more(clause: str) -> bool:
    return bool(_PLACE.search(clause) or _sureness(clause))


def _claims_of_clause(text: str, known: Sequence[str]) -> list[Claim]:
    mentions = _mentions(text, known)
    places = [(found.start(), _place(found)) for found in _PLACE.finditer(text)]
    sureness = _sureness(text)
    if not mentions:
        pointing = bool(_POINTS_BACK.search(text)) and bool(places or sureness)
        where = _merged(tuple(place for _, place in places))
        return [Claim(None, None, False, True, where, tuple(s for _, s in sureness))] if pointing else []
    there, surely = _assigned(text, mentions, places), _assigned(text, mentions, sureness)
    found, none = [], False
    for number, mention in enumerate(mentions):
        claim = replace(mention.claim, places=_merged(tuple(there[number])), sureness=tuple(surely[number]))
        joint = text[mentions[number - 1].end : mention.start] if number else ""
        words = joint.split()
        goes_on = bool(_JOINT.match(joint)) and not {"a", "an", "the"} & set(words)
        goes_on = goes_on and ("or" in words or "nor" in words or not claim.places)
        none = mention.none or (none and goes_on and claim.count is None)
        found.append(replace(claim, count=0, plural=False, points_back=False) if none else claim)
    return [claim for claim in found if claim.label is not None or claim.count is not None]


def _mentions(text: str, known: Sequence[str]) -> list[_Mention]:
    """Where the text names a class, or findings of any class."""
    forms, pattern = _names(tuple(known))
    found: list[_Mention] = []
    for match in pattern.finditer(text):
        label, plural = forms[re.sub(r"[\s_-]+", " ", match.group().lower())]
        since = found[-1].end if found else 0
        clause, after = re.split("[;:]", text[since : match.start()])[-1], text[match.end() :]
        number = _BEFORE.search(clause) or _AFTER.match(after)
        if _NO_OTHER.search(clause):
            continue
        count = _number(number.group(1)) if number else None
        none = bool(_NONE.search(clause)) or bool(_NOT_AFTER.search(after))
        back = count is None and not none and bool(_BACK.search(clause))
        if label is None and count is None:
            if not none:
                continue
            count = 0
        claim = Claim(label, count, plural and count is None, back)
        found.append(_Mention(match.start(), match.end(), claim, none or count == 0))
    return found


@functools.cache
def _names(known: tuple[str, ...]) -> tuple[dict[str, tuple[str | None, bool]], re.Pattern[str]]:
    """Every way to write a class or a finding, with the class and whether it is the plural; and what finds them."""
    forms: dict[str, tuple[str | None, bool]] = {}
    for label in FINDINGS:
        forms |= {form: (None, plural) for form, plural in _forms(label)}
    for label in known:
        forms |= {form: (label, plural) for form, plural in _forms(label)}
    longest = sorted(forms, key=len, reverse=True)
    pattern = rf"(?<![\w-])(?:{'|'.join(map(_spaced, longest))})(?![\w-])"
    return forms, re.compile(pattern, re.IGNORECASE)


def _forms(label: str) -> list[tuple[str, bool]]:
    """(a way to write the name, whether it is the plural), in lower case with spaces."""
    name = re.sub(r"[\s_-]+", " ", label.strip().lower())
    head, _, last = name.rpartition(" ")
    ends = [f"{last}s", f"{last}es", *IRREGULAR.get(last, ())]
    ends += [f"{last[:-1]}ies"] if last.endswith("y") else []
    ends += [f"{last.removesuffix('fe').removesuffix('f')}ves"] if last.endswith(("f", "fe")) else []
    return [(name, False), *((f"{head} {end}".strip(), True) for end in ends)]


def _spaced(form: str) -> str:
    return r"[\s_-]+".join(map(re.escape, form.split()))


def _number(word: str) -> int:
    return int(word) if word.isdigit() else NUMBERS[word.lower()]


def _place(found: re.Match[str]) -> Place:
    words = {name: (word or "").lower() for name, word in found.groupdict().items()}
    if words["down"]:
        across = words["across"]
        return Place(DOWN[words["down"]], ACROSS.get(across, "center") if across else None)
    if words["middle"]:
        other = words["across2"]
        if not other:
            return Place("middle", "center")
        return Place("middle", other) if other in ACROSS else Place(DOWN[other], "center")
    down = words["down3"]
    return Place(DOWN.get(down, "middle") if down else None, words["across3"])


def _merged(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """``on the left, in the upper third`` is one place."""
    found: list[Place] = []
    for place in places:
        last = found[-1] if found else None
        if last and ((last.down is None and place.across is None) or (last.across is None and place.down is None)):
            found[-1] = Place(last.down or place.down, last.across or place.across)
        else:
            found.append(place)
    return tuple(dict.fromkeys(found))


def _sureness(text: str) -> list[tuple[int, Sureness]]:
    found = []
    for match in _LEVEL.finditer(text):
        level = next(word for word in match.groups() if word).lower()
        found.append((match.start(), Sureness("moderate" if level == "medium" else level)))
    about = bool(_ABOUT_SURENESS.search(text))
    for match in _SHARE.finditer(text):
        if about or match.group(2):
            written, scale = (match.group(1), 0.01) if match.group(1) else (match.group(2), 1.0)
            digits = len(written.partition(".")[2])
            found.append((match.start(), Sureness("", float(written) * scale, 0.5 * scale * 10.0**-digits)))
    return sorted(found, key=lambda one: one[0])


def _assigned(text: str, mentions: Sequence[_Mention], items: Sequence[tuple[int, T]]) -> list[list[T]]:
    """For each mention the items that are said of it.

    An item belongs to the mention before it; where the sentence begins with one and ends with a mention, to the one
    after it. Mentions that are joined (``a nodule and a fracture in the upper left``) share theirs.
    """
    found: list[list[T]] = [[] for _ in mentions]
    ahead = bool(items) and items[0][0] < mentions[0].start and items[-1][0] < mentions[-1].start
    for position, item in items:
        if ahead:
            owner = next(n for n, mention in enumerate(mentions) if mention.start > position)
        else:
            owner = max((n for n, mention in enumerate(mentions) if mention.end <= position), default=0)
        found[owner].append(item)
    steps = range(1, len(mentions)) if ahead else range(len(mentions) - 2, -1, -1)
    for number in steps:
        other = number - 1 if ahead else number + 1
        first, second = sorted((number, other))
        if not found[number] and _JOINT.match(text[mentions[first].end : mentions[second].start]):
            found[number] = found[other]
    return found
