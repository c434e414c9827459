"""What a language model is asked, and whether what it answers is true: the chat made from boxes, and the check of the
report's sentences against the boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layerlens.models import Detection
from layerlens.vision_language.claims import Claim, Place, Sureness, claims_of, sentences_of

SYSTEM = "You write short factual reports. Describe only the findings that are listed."
TEMPLATE = "Findings in the image ({count}):\n{findings}\nWrite the report."
HIGH, MODERATE = 0.8, 0.5
"""From which confidence on, as it is shown, it is called so; what is below is called low."""
ROUNDED = 0.005
"""The prompt gives confidences with two digits."""

Messages = list[dict[str, str]]


def build_messages(
    detections: Sequence[Detection], *, image: str, size: tuple[int, int], template: str | None = None
) -> Messages:
    """A chat of a system and a user message that lists every finding with place and confidence.

    Args:
        detections: in the order in which they are listed.
        image: its file name.
        size: width and height in pixels.
        template: the user message instead of TEMPLATE.
    """
    content = (template or TEMPLATE).format(
        findings="\n".join(f"{number}. {describe(one, size)}" for number, one in enumerate(detections, 1)),
        image=image, width=size[0], height=size[1], count=len(detections),
    )  # fmt: skip
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def describe(detection: Detection, size: tuple[int, int]) -> str:
    """``nodule, upper left, confidence 0.93 (high)``."""
    shown = f"confidence {detection.confidence:.2f} ({level(detection.confidence)})"
    return f"{detection.label}, {place(detection.box, size)}, {shown}"


def place(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Where the middle of the box lies, by thirds of the image: ``upper left``, ``middle``, ``lower right`` ..."""
    across = min(2, int(3 * (box[0] + box[2]) / 2 / size[0]))
    down = min(2, int(3 * (box[1] + box[3]) / 2 / size[1]))
    words = (("upper", "middle", "lower")[down], ("left", "center", "right")[across])
    return "middle" if words == ("middle", "center") else " ".join(words)


def level(confidence: float) -> str:
    """``high``, ``moderate`` or ``low``, of the confidence with two digits."""
    shown = round(confidence, 2)
    return "high" if shown >= HIGH else "moderate" if shown >= MODERATE else "low"


def no_findings(confidence: float) -> str:
    """The report on an image in which nothing was detected; no language model is asked, so that none invents."""
    return f"No findings were detected (confidence {confidence:g} and above)."


def check_report(
    report: str, detections: Sequence[Detection], known: Sequence[str], size: tuple[int, int]
) -> dict[str, list[Any]]:
    """What a report says that the boxes do not, and what it leaves out.

    Every sentence is read for classes, numbers, places and confidences (``claims``). A finding that is named twice must
    be there twice. Texts that are not in English are compared with names of classes alone.

    Args:
        report: the text.
        detections: what was handed to the language model.
        known: all class names of the detector.
        size: width and height of the image, in pixels.

    Returns:
        ``left_out``: classes that were detected and are not named; ``missing``: other findings that are not named;
        ``not_detected``: classes that are named and were not detected; ``sentences``: the wrong ones, each with its
        ``number`` (from 1), ``text`` and ``faults``. All are empty for a report that is right.
    """
    check = _Check([_Found(one, place(one.box, size)) for one in detections])
    sentences = sentences_of(report)
    claims = [claims_of(sentence, known) for sentence in sentences]
    check.match(claims)
    wrong = [
        {"number": number, "text": sentence, "faults": faults}
        for number, (sentence, said) in enumerate(zip(sentences, claims, strict=True), 1)
        if (faults := list(dict.fromkeys(fault for claim in said for fault in check.faults(claim))))
    ]
    named = {claim.label for said in claims for claim in said if claim.count != 0}
    there = {one.label for one in check.found}
    missing = [str(one) for one in check.missing([claim for said in claims for claim in said]) if one.label in named]
    return {
        "left_out": sorted(there - named), "missing": missing,
        "not_detected": sorted(label for label in named - there if label is not None), "sentences": wrong,
    }  # fmt: skip


@dataclass(eq=False)
class _Found:
    """One detection, and which claim speaks of it."""

    detection: Detection
    place: str
    claim: Claim | None = None
    named: bool = False

    @property
    def label(self) -> str:
        return self.detection.label

    def __str__(self) -> str:
        return f"{self.label}, {self.place}, {self.detection.confidence:.2f}"

    def sure(self, said: Sureness) -> bool:
        confidence = self.detection.confidence
        if said.level:
            return level(confidence) == said.level
        return abs(confidence - said.share) <= said.error + ROUNDED + 1e-9

    def agrees(self, where: Place | None, sureness: Sequence[Sureness]) -> bool:
        return (where is None or where.holds(self.place)) and (not sureness or any(map(self.sure, sureness)))


@dataclass(eq=False)
class _Unit:
    """One finding that a claim names."""

    claim: Claim
    place: Place | None
    met: _Found | None = None


@dataclass
class _Check:
    """Findings, the units of all claims that were matched with them, and claims of one finding without a place."""

    found: list[_Found]
    units: list[_Unit] = field(default_factory=list)
    bare: list[Claim] = field(default_factory=list)

    def match(self, claims: Sequence[Sequence[Claim]]) -> None:
        """Give every finding that is named with a place or confidence to a detection of its own: exact ones first."""
        for claim in (claim for said in claims for claim in said):
            self.units += [_Unit(claim, where) for where in _units_of(claim)]
            self.bare += [claim] if _is_bare(claim) else []
        for exact in (True, False):
            for unit in self.units:
                rest = [one for one in self.found if one.claim is None and one.label == unit.claim.label]
                if unit.met is None:
                    near = [one for one in rest if one.agrees(unit.place, unit.claim.sureness)]
                    near = near or ([] if exact else [one for one in rest if one.agrees(unit.place, ())] or rest)
                    if near:
                        unit.met = near[0]
                        near[0].claim, near[0].named = unit.claim, True

    def faults(self, claim: Claim) -> list[str]:
        """What is wrong with one claim, as halves of sentences."""
        of_class = [one for one in self.found if claim.label in (None, one.label)]
        what = claim.label or "finding"
        if claim.label is not None and not of_class:
            return [] if claim.count == 0 else [f"no {what} was detected"]
        wanted = [
            one for one in of_class
            if not claim.places or any(one.agrees(where, claim.sureness) for where in claim.places)
        ]  # fmt: skip
        if claim.count == 0:
            return [f"there is a {one}" for one in wanted]
        if claim.points_back:
            return self._faults_of_back_reference(claim, of_class, what)
        if claim.label is None:
            counted = [one for one in wanted if not claim.sureness or one.agrees(None, claim.sureness)]
            return [] if len(counted) == claim.count else [f"{len(counted)} detected, {claim.count} said"]
        return self._faults_of_units(claim, what) + self._faults_of_number(claim, len(of_class), len(wanted), what)

    def _faults_of_units(self, claim: Claim, what: str) -> list[str]:
        faults = []
        for unit in self.units:
            if unit.claim is not claim:
                continue
            met = unit.met
            if met is None:
                count = sum(one.label == claim.label for one in self.found)
                faults.append(f"{count} {what} detected, and named more often")
                continue
            if unit.place is not None and not unit.place.holds(met.place):
                faults.append(f"no {what} in the {unit.place} ({met} is not named elsewhere)")
            elif claim.sureness and not any(map(met.sure, claim.sureness)):
                said = ", ".join(map(str, claim.sureness))
                faults.append(f"the confidence is {met.detection.confidence:.2f} ({met}), not {said}")
        return faults

    def _faults_of_back_reference(self, claim: Claim, of_class: Sequence[_Found], what: str) -> list[str]:
        faults = []
        for where in claim.places or (None,):
            right = [one for one in of_class if one.agrees(where, claim.sureness)]
            for one in right[:1]:
                one.named = True
            if not right and where is not None and not any(one.agrees(where, ()) for one in of_class):
                faults.append(f"no {what} in the {where}")
            elif not right:
                faults.append(f"no {what} has the confidence {', '.join(map(str, claim.sureness))}")
        return faults

    def _faults_of_number(self, claim: Claim, n: int, n_there: int, what: str) -> list[str]:
        """Numbers without a place or a confidence are of all findings of the class."""
        if _is_bare(claim):
            before = [one.label for one in self.bare[: self.bare.index(claim)]]
            return [f"{n} {what} detected, and named more often"] if before.count(claim.label) >= n else []
        if claim.plural and not claim.places:
            return [f"{n} {what} detected, several said"] if n < 2 else []
        if claim.count is None:
            return []
        if len(claim.places) > 1:
            said_wrong = claim.count > len(claim.places) and claim.count != n_there
            return [f"{n_there} {what} detected there, {claim.count} said"] if said_wrong else []
        whole = not claim.places and not claim.sureness
        return [f"{n} {what} detected, {claim.count} said"] if whole and claim.count != n else []

    def missing(self, claims: Sequence[Claim]) -> list[_Found]:
        """Findings of which no claim speaks, alone or in a number."""
        found = []
        for label in dict.fromkeys(one.label for one in self.found):
            own = [claim for claim in claims if claim.label == label and claim.count != 0]
            group = [one for one in self.found if one.label == label]
            whole = any(claim.count == len(group) or (claim.plural and not claim.places) for claim in own)
            bare = sum(_is_bare(claim) for claim in own)
            if not whole:
                found += [one for one in group if not one.named][bare:]
        return found


def _units_of(claim: Claim) -> list[Place | None]:
    """The place of each finding that a claim names one by one; none for numbers alone."""
    if claim.label is None or claim.points_back or claim.count == 0 or not (claim.places or claim.sureness):
        return []
    places: list[Place | None] = list(claim.places or (None,))
    more = (claim.count or 1) - len(places)
    return places + ([places[0]] * more if len(places) == 1 and more > 0 else [])


def _is_bare(claim: Claim) -> bool:
    return claim.count is None and not (claim.plural or claim.points_back or claim.places or claim.sureness)
