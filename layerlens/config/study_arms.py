"""Arms of a study that are written with numbers: blocks by depth, kinds of layers, manifests, and the cheapest choice.

top:4             uniform LoRA on the upper 4 blocks, at the same number of parameters
bottom:2:v,o      the same on value and output projections of the lower 2 blocks (v+o where commas part a list)
only:ffn          the same on the feed-forward layers of all blocks
cheapest:0.95     the least step time that is predicted to keep 95 % of uniform LoRA's improvement
cheapest:0.9:vram_gb
manifest:PATH     the LoRA ranks of a manifest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from layerlens.config.optimization import CHEAPEST, STEP, Minimised

TOP, BOTTOM, ONLY, MANIFEST = "top", "bottom", "only", "manifest"
KINDS = {
    "q": ("query",),
    "k": ("key",),
    "v": ("value",),
    "o": ("attention_output",),
    "qkv": ("query_key_value",),
    "up": ("ffn_up",),
    "gate": ("ffn_gate",),
    "down": ("ffn_down",),
    "attention": ("query", "key", "value", "query_key_value", "attention_output"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_gate_up", "ffn_down"),
}
"""Short words for the roles of layers; every role, and every pattern for names, stands for itself."""
WRITTEN = ("top:N", "bottom:N", "top:N:v+o", "only:v+o", "cheapest:SHARE", "manifest:PATH")
"""How such arms are written, for messages."""


@dataclass(frozen=True)
class LayersArm:
    """Uniform LoRA on some of the layers.

    Args:
        end: ``top``, ``bottom``, or ``only`` for all blocks.
        blocks: how many; 0 for all.
        kinds: roles or patterns for names, as they were written; none for every layer.
    """

    end: str
    blocks: int = 0
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheapestArm:
    """The cheapest choice that is predicted to keep this share of uniform LoRA's improvement.

    Args:
        share: between 0 and 1; None for 1 - ``optimization.quality_margin``.
        minimised: the resource whose use is least.
    """

    share: float | None = None
    minimised: Minimised = STEP


@dataclass(frozen=True)
class ManifestArm:
    """The LoRA ranks of the manifest at a path."""

    path: str


WrittenArm = LayersArm | CheapestArm | ManifestArm


def written_arm(arm: str) -> WrittenArm | None:
    """What ``arm`` says; None where it is the name of something.

    Raises:
        ValueError: it begins like one of these arms and cannot be read; the message shows what would do.

    >>> written_arm("top:3:v,o")
    LayersArm(end='top', blocks=3, kinds=('v', 'o'))
    >>> written_arm("uniform") is None
    True
    """
    word, colon, rest = arm.partition(":")
    if word == CHEAPEST:
        return _cheapest(arm, rest)
    if not colon and word not in (TOP, BOTTOM, ONLY, MANIFEST):
        return None
    if word in (TOP, BOTTOM):
        count, _, kinds = rest.partition(":")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"arm {arm!r}: {count!r} is not a number of blocks; write {word}:3, or {word}:3:v+o")
        return LayersArm(word, int(count), _kinds(arm, kinds) if rest.count(":") else ())
    if word == ONLY:
        return LayersArm(ONLY, 0, _kinds(arm, rest))
    if word == MANIFEST:
        if not rest:
            raise ValueError(f"arm {arm!r}: gives no file; write manifest:out/manifest.json")
        return ManifestArm(rest)
    return None


def _kinds(arm: str, text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in text.replace("+", ",").split(",")))
    if not all(kinds):
        known = ", ".join(KINDS)
        raise ValueError(f"arm {arm!r}: names no kind of layer after the colon; known: {known}, roles, and patterns")
    return kinds


def _cheapest(arm: str, rest: str) -> CheapestArm:
    share_text, _, resource = rest.partition(":")
    known = get_args(Minimised)
    if resource and resource not in known:
        raise ValueError(f"arm {arm!r}: {resource!r} is not a resource; known: {', '.join(known)}")
    minimised = cast(Minimised, resource) if resource else STEP
    if not share_text:
        return CheapestArm(None, minimised)
    try:
        share = float(share_text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"arm {arm!r}: {share_text!r} is not a share above 0 and up to 1; write cheapest:0.95")
    return CheapestArm(share, minimised)
