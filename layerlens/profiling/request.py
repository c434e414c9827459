"""Which statistics are wanted. Each can be asked for alone, and only what is asked for is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerlens import registry
from layerlens.exceptions import ConfigurationError
from layerlens.models import LORA

if TYPE_CHECKING:
    from layerlens.profiling.statistics import Statistic
    from layerlens.profiling.sums import Place, Sum

NTK_SAMPLES = 64
EXACT_NTK_SAMPLES = 256
"""The activations and gradients of more samples are not kept; their kernel is sketched."""


def __getattr__(name: str) -> Any:
    """STATISTICS, the names as they are registered now; BY_SAMPLES and OF_MODULES, which of them are what."""
    if name == "STATISTICS":
        return registry.STATISTICS.names()
    if name in ("BY_SAMPLES", "OF_MODULES"):
        of_modules = {known for known in registry.STATISTICS if registry.STATISTICS[known].module_values is not None}
        return tuple(known for known in registry.STATISTICS if (known in of_modules) == (name == "OF_MODULES"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class StatisticsRequest:
    """What one pass is to find, beside the loss.

    Args:
        names: the statistics, in the order in which they are registered.
        ntk_samples: the neural tangent kernel is the Gram matrix of per-sample gradients of so many first samples:
            exact from kept activations and gradients up to 256, sketched beyond.
    """

    names: tuple[str, ...] = ()
    ntk_samples: int = NTK_SAMPLES

    @classmethod
    def of(cls, names: Iterable[str], *, ntk_samples: int = NTK_SAMPLES) -> StatisticsRequest:
        """The request for the statistics with these names.

        Raises:
            ConfigurationError: a name is unknown.

        >>> StatisticsRequest.of(["ntk", "fisher"]).names
        ('fisher', 'ntk')
        """
        wanted, known = set(names), registry.STATISTICS.names()
        unknown = sorted(wanted - set(known))
        if unknown:
            raise ConfigurationError(f"unknown statistic {unknown[0]!r}; known: {', '.join(known)}")
        return cls(tuple(name for name in known if name in wanted), ntk_samples)

    @cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics themselves."""
        return tuple(registry.STATISTICS[name] for name in self.names)

    @property
    def of_modules(self) -> tuple[Statistic, ...]:
        """Those that are measured on the whole model in memory."""
        return tuple(statistic for statistic in self.statistics if statistic.module_values is not None)

    @cached_property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return len(self.of_modules) < len(self.names)

    def place(
        self, shape: tuple[int, int, int], method: str, *, projected: bool, tokens: int = 0, looked_up: bool = False
    ) -> Place:
        """A matrix of this shape in the pass, whose layer has projections or not, and is an embedding or not."""
        from layerlens.profiling.accumulators import place_of

        return place_of(
            shape, method, projected=projected, kernel_samples=self.ntk_samples, kernel_sketched=self.sketched_ntk,
            tokens=tokens, looked_up=looked_up,
        )  # fmt: skip

    def sums(self, place: Place) -> tuple[Sum, ...]:
        """What is summed of a matrix: each sum once, and none that another one makes needless."""
        wanted = {one.name: one for statistic in self.statistics for one in statistic.sums(place)}
        needless = {one.instead_of for one in wanted.values()}
        return tuple(one for one in wanted.values() if one.name not in needless)

    @cached_property
    def input_sums(self) -> tuple[Sum, ...]:
        """What is summed of inputs, which must be zero then where they are padding."""
        return tuple({one.name: one for statistic in self.statistics for one in statistic.input_sums}.values())

    @property
    def sketched_ntk(self) -> bool:
        """Whether the kernel is of more samples than are kept."""
        return self.ntk_samples > EXACT_NTK_SAMPLES

    @cached_property
    def projects(self) -> bool:
        """Whether anything is projected."""
        from layerlens.profiling.sums import Place

        largest = Place((1, 2**30, 2**30), LORA, True, True, self.ntk_samples, self.sketched_ntk)
        return any(one.projects for one in (*self.sums(largest), *self.input_sums))
