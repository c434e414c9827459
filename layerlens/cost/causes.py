"""Costs by what causes them, made into charges that are nested or apart.

A cause is a set of options, as the bits of an integer: as soon as one of them is chosen, the cost is paid, once. Of
two causes that cross, one is changed to what is nested in the other or apart from it: widened to both, where what adds
up shall be an upper bound, or narrowed, where it shall be a lower one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from layerlens.models import NONE, DepthCharge, GroupCharge, Option

ALWAYS = -1
"""The cause of what every choice pays for: all bits."""


class Paid:
    """Adds up costs by what causes them.

    Args:
        options: of the table.
        names: of the layers of the model, in their order.
        place__o: int64 [options], the layer of each option on the axis of a record's causes; -1 for none of them.
        n_recorded: layers on that axis.
        n_rows: figures of each cost.
        lowest: layers of which one is adapted for sure, and nothing below them; None where nothing is known.
        below: layers that are not adapted then.
        chosen: further layers that are adapted for sure.
    """

    def __init__(
        self,
        options: Sequence[Option],
        names: Sequence[str],
        place__o: np.ndarray,
        n_recorded: int,
        n_rows: int,
        lowest: Collection[str] | None = None,
        below: Collection[str] = (),
        chosen: Collection[str] = (),
    ) -> None:
        self.options, self.names = options, names
        self.entries = [(option, entry) for entry, option in enumerate(options) if option.method != NONE]
        of_layer = defaultdict[str, int](int)
        self.of_recorded = [0] * n_recorded
        for option, entry in self.entries:
            of_layer[option.layer] |= 1 << entry
            if place__o[entry] >= 0:
                self.of_recorded[place__o[entry]] |= 1 << entry
        self.possible = ALWAYS
        self.is_deep = lowest is None
        one_of = 0
        for name in lowest or ():
            one_of |= of_layer[name]
        self.certain = [options for options in (one_of, *(of_layer[name] for name in chosen)) if options]
        """Sets of options of each of which one is chosen for sure."""
        for name in below:
            self.possible &= ~of_layer[name]
        self.of_layer = [of_layer[name] for name in names]
        self.own = np.zeros((n_rows, len(options)))
        self.base = np.zeros(n_rows)
        self.causes: dict[int, np.ndarray] = {}
        self._known: dict[bytes, int] = {}

    def of(self, layers: np.ndarray) -> int:
        """The options of some layers, bool [l + 1] as in ``StepRecord.cause__cl``."""
        if layers[-1]:  # what trains in every choice
            return ALWAYS
        known = layers.tobytes()
        if known not in self._known:
            cause = 0
            for number in np.flatnonzero(layers[:-1]):
                cause |= self.of_recorded[number]
            self._known[known] = self.settled(cause)
        return self._known[known]

    def settled(self, cause: int) -> int:
        """A cause without options that are not possible; ALWAYS where one of it is chosen for sure."""
        if any(cause & options == options for options in self.certain):
            return ALWAYS
        return cause if cause == ALWAYS else cause & self.possible

    def add(self, cause: int, cost: np.ndarray) -> None:
        """A cost that any option of ``cause`` makes due."""
        cause = self.settled(cause)
        if cause == ALWAYS:
            self.base += cost
        elif cause and cost.any():
            self.causes[cause] = self.causes[cause] + cost if cause in self.causes else np.array(cost, dtype=np.float64)

    def charges(self, *, narrow: bool = False) -> tuple[tuple[GroupCharge, ...], DepthCharge | None]:
        """Causes that are nested or apart: those of the longest chain as depth, the others as group charges.

        What a single option causes is added to ``own``.
        """
        causes = nested(self.causes, self._narrowed if narrow else widened, self._weight__r(narrow))
        chain = self._chain({cause: cost for cause, cost in causes.items() if cause & (cause - 1)})
        depth = self._depth(chain, causes) if len(chain) > 1 and self.is_deep else None
        if depth is not None:
            for cause in chain:
                del causes[cause]
        if narrow and depth is not None:
            causes = self._confined(causes, depth.stage__g)
        for cause in [cause for cause in causes if cause & (cause - 1) == 0]:  # of one option alone
            self.own[:, cause.bit_length() - 1] += causes.pop(cause)
        ordered = sorted(causes, key=lambda cause: (-cause.bit_count(), cause))
        found = []
        for number, cause in enumerate(ordered):
            inside = [other for other in range(number) if cause & ordered[other] == cause]
            entries = self._entries(cause)
            named = dict.fromkeys(self.options[entry].layer for entry in entries)
            first, *others = named
            name = first if not others else f"{first} and {len(others)} more"
            found.append(GroupCharge(name, entries, causes[cause], inside[-1] if inside else None))
        return tuple(found), depth

    def _narrowed(self, one: int, other: int, cost_of: Callable[[int], float]) -> tuple[int, int]:
        """One loses what it has in common with the other, or what it has not: fewer choices pay for it.

        The change is taken that leaves out the least: the share of its options, times its cost. A cause of whole layers
        loses whole layers, so that it can be one of a chain.
        """

        def left_out(change: tuple[int, int]) -> tuple[float, int, int]:
            cause, to = change
            return cost_of(cause) * (1.0 - to.bit_count() / cause.bit_count()), cause, to

        both = one & other
        changes = []
        for cause in (one, other):
            shared = both
            if self._is_whole(cause):
                for layer in self.of_layer:
                    shared |= layer if layer & both else 0
            changes += [(cause, both), (cause, cause & ~shared)]
        return min(changes, key=left_out)

    def _is_whole(self, cause: int) -> bool:
        return all(cause & layer in (0, layer) for layer in self.of_layer)

    def _confined(self, causes: dict[int, np.ndarray], stage__g: np.ndarray) -> dict[int, np.ndarray]:
        """The same costs with no cause that joins layers of several stages: each keeps the stage with most of it."""
        of_stage = defaultdict[int, int](int)
        for stage, of_layer in zip(stage__g.tolist(), self.of_layer, strict=True):
            of_stage[stage] |= of_layer
        found: dict[int, np.ndarray] = {}
        for cause, cost in causes.items():
            to = max((cause & stage for stage in of_stage.values()), key=lambda part: (part.bit_count(), part))
            found[to] = found[to] + cost if to in found else cost
        return found

    def _weight__r(self, narrow: bool) -> np.ndarray:
        """What figures count where costs are compared: as shares of their sums where they are narrowed."""
        total = np.sum(list(self.causes.values()), axis=0) if narrow and self.causes else np.ones_like(self.base)
        return np.divide(1.0, total, out=np.zeros_like(total), where=total > 0.0)

    def _entries(self, cause: int) -> tuple[int, ...]:
        n_bytes = (len(self.options) + 7) // 8
        bits = np.unpackbits(np.frombuffer(cause.to_bytes(n_bytes, "little"), dtype=np.uint8), bitorder="little")
        return tuple(np.flatnonzero(bits).tolist())

    def _chain(self, causes: dict[int, np.ndarray]) -> list[int]:
        """The longest chain of nested causes, all options of whole layers, the smallest first."""
        whole = [cause for cause in causes if self._is_whole(cause)]
        whole.sort(key=lambda cause: cause.bit_count())
        best: dict[int, list[int]] = {}
        for number, cause in enumerate(whole):
            below = [best[other] for other in whole[:number] if other & cause == other]
            best[cause] = [*max(below, key=len, default=[]), cause]
        return max(best.values(), key=len, default=[])

    def _depth(self, chain: Sequence[int], causes: dict[int, np.ndarray]) -> DepthCharge:
        stage__g = np.full(len(self.names), -1, dtype=np.int64)
        for stage in range(len(chain) - 1, -1, -1):
            for number, of_layer in enumerate(self.of_layer):
                if of_layer and of_layer & chain[stage] == of_layer:
                    stage__g[number] = stage
        names = []
        for stage in range(len(chain)):
            own = [self.names[number] for number in np.flatnonzero(stage__g == stage).tolist()]
            names.append(", ".join(own))
        cost__sr = np.cumsum(np.array([causes[cause] for cause in chain])[::-1], axis=0)[::-1]
        return DepthCharge(stage__g, tuple(names), np.ascontiguousarray(cost__sr))


Crossing = Callable[[int, int, Callable[[int], float]], tuple[int, int]]
"""(one cause, another that crosses it, what a cause costs) -> (which of the two is changed, to what)."""


def widened(one: int, other: int, cost_of: Callable[[int], float]) -> tuple[int, int]:
    """The cheaper becomes both: more choices pay for it."""
    cheaper, dearer = sorted((one, other), key=lambda cause: (cost_of(cause), cause))
    return cheaper, cheaper | dearer


def nested(costs: dict[int, np.ndarray], crossing: Crossing, weight__r: np.ndarray) -> dict[int, np.ndarray]:
    """The same costs with causes that are nested or apart."""
    left = dict(costs)

    def cost_of(cause: int) -> float:
        return float(np.dot(left[cause], weight__r))

    waiting = sorted(left, key=lambda cause: (cause.bit_count(), cause))
    while waiting:
        cause = waiting.pop()
        if cause not in left:
            continue
        found = next((other for other in left if other & cause not in (0, cause, other)), None)
        if found is None:
            continue
        changed, to = crossing(cause, found, cost_of)
        cost = left.pop(changed)
        left[to] = left[to] + cost if to in left else cost
        waiting += [to, cause if changed == found else found]
    return left
