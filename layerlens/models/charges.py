"""Costs that are paid once: by a group of options that share something, and by the depth of the backward pass.

What a choice uses of resource r, exactly::

    base_r + Σ options_r + Σ (group charges that its options cause)_r + (depth charge of its lowest stage)_r

How to say what a training step does:

- *A shared input* (q, k and v keep one tensor): a ``GroupCharge`` of every option that keeps it. The options' own costs
  no longer hold that tensor.
- *A block's own fixed costs*: a ``GroupCharge`` of the block; the shared inputs lie ``inside`` it.
- *Frozen blocks that the backward pass goes through*: the ``DepthCharge``.
- *Checkpointing as a choice of each block*: two options for each method and rank, one that keeps activations and one
  that recomputes them, and two group charges, "keep" (the block's memory) and "checkpoint" (the recomputation's time).
  The two need no rule that a block takes only one of them: let the recomputing option cost no more of anything than
  the one that keeps, as the time is in the charge. Then a mixture of both pays both charges, and recomputing all of
  the block costs no more than the mixture. No best choice needs a mixture, and one that is found means "recompute".
- *Checkpointing of frozen blocks above the lowest stage*: one more group of the problem for each block, with the
  options "frozen" (``below__o``: only where the backward pass does not come; costs nothing), "keep" and "checkpoint"
  (both ``reaches__o``; they cause the block's charges). The depth charge then no longer holds what these cost.

Letters: o options, g groups, r resources, s stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupCharge:
    """Paid once when any of these options is chosen, or any that a charge inside this one has.

    Args:
        name: what is paid for, as messages call it: "input of layer.3.attention".
        options: indices of the options that cause it (of a problem, or of a cost table).
        cost__r: float64 [resources], finite and >= 0, in the order of the problem's (or the table's) resources.
        inside: index of the charge that contains it, or None; whatever causes this one causes that one too.
        penalty: >= 0, what it takes off the sum of values (where ``objective_weights`` weigh a resource).
    """

    name: str
    options: tuple[int, ...]
    cost__r: np.ndarray
    inside: int | None = None
    penalty: float = 0.0


@dataclass(frozen=True)
class DepthCharge:
    """Paid for the lowest stage that the backward pass has to reach; nothing where it reaches none.

    Args:
        stage__g: int64 [groups], the stage of each group (of a problem, or each layer of a cost table), 0 = lowest,
            nearest the input; -1: a group outside the chain, which reaches nothing.
        names: of the stages.
        cost__sr: float64 [stages, resources], finite, >= 0 and not increasing in s: all that the step costs more
            because the backward pass goes down to stage s.
        reaches__o: bool [options], which options make the backward pass reach the stage of their group; None: all that
            are not "none".
        below__o: bool [options], which options are possible only where the backward pass does not reach the stage of
            their group; None: no option is so restricted.
        penalty__s: float64 [stages], >= 0 and not increasing in s, what each takes off the sum of values; None: 0.
    """

    stage__g: np.ndarray
    names: tuple[str, ...]
    cost__sr: np.ndarray
    reaches__o: np.ndarray | None = None
    below__o: np.ndarray | None = None
    penalty__s: np.ndarray | None = None


class Causes:
    """Which group charges each option causes, those that contain others included.

    Args:
        start: int64 [n_options + 1]: option o causes ``charge[start[o]:start[o + 1]]``, ascending.
        charge: int64, indices of charges.
    """

    def __init__(self, charges: tuple[GroupCharge, ...], n_options: int) -> None:
        options, caused = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for index, charge in enumerate(charges):
            own = np.asarray(charge.options, dtype=np.int64)
            seen: set[int] = set()
            at: int | None = index
            while at is not None and at not in seen:
                seen.add(at)
                options.append(own)
                caused.append(np.full(len(own), at))
                at = charges[at].inside
        pair = np.concatenate(options) * max(len(charges), 1) + np.concatenate(caused)
        pair.sort()
        pair = pair[np.concatenate(([True], pair[1:] != pair[:-1]))] if len(pair) else pair
        self.option, self.charge = np.divmod(pair, max(len(charges), 1))
        self.start = np.searchsorted(self.option, np.arange(n_options + 1))

    def of(self, option: int) -> np.ndarray:
        """int64, the charges that one option causes, ascending."""
        return self.charge[self.start[option] : self.start[option + 1]]

    def of_all(self, options: np.ndarray) -> np.ndarray:
        """int64, the charges that any of these options causes, ascending."""
        begin, count = self.start[options], self.start[options + 1] - self.start[options]
        first = np.repeat(begin - np.concatenate(([0], np.cumsum(count)[:-1])), count)
        return np.unique(self.charge[first + np.arange(len(first))])
