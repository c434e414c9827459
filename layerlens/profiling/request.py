"""Which statistics are wanted. Each can be asked for alone, and only what is asked for is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerlens import registry
from layerlens.exceptions import ConfigurationError

STATISTICS: tuple[str, ...] = registry.STATISTICS.names()
OF_MODULES = ("activation_memory", "flops", "time")
BY_SAMPLES = tuple(name for name in STATISTICS if name not in OF_MODULES)
NTK_SAMPLES = 64
EXACT_NTK_SAMPLES = 256
"""The activations and gradients of more samples are not kept; their kernel is sketched."""


@dataclass(frozen=True)
class StatisticsRequest:
    """What one pass is to find, beside the loss.

    Args:
        fisher: the trace of the empirical Fisher, from per-sample norms; the mean gradient is not formed for it.
        gradient: the energy of the mean gradient G; together with ``fisher`` also the noise-corrected signal.
        input_scale: mean square of the inputs.
        spectrum: split-half spectrum of G.
        whitened_spectrum: the same of S^-½ G A^-½, for which the exact K-FAC factors A and S are formed.
        factors: A and S themselves, as output.
        sketched_spectrum, sketched_factors: approximations of these by random projections, with their errors.
        ntk: the Gram matrix of per-sample gradients of the first ``ntk_samples`` samples: exact from kept activations
            and gradients up to 256, sketched beyond.
        activation_memory, flops, time: costs of every module (``ModuleCosts``).
        ntk_samples: see ``ntk``.
    """

    fisher: bool = False
    gradient: bool = False
    input_scale: bool = False
    spectrum: bool = False
    whitened_spectrum: bool = False
    factors: bool = False
    sketched_spectrum: bool = False
    sketched_factors: bool = False
    ntk: bool = False
    activation_memory: bool = False
    flops: bool = False
    time: bool = False
    ntk_samples: int = NTK_SAMPLES

    @classmethod
    def of(cls, names: Iterable[str], *, ntk_samples: int = NTK_SAMPLES) -> StatisticsRequest:
        """The request for the statistics with these names.

        Raises:
            ConfigurationError: a name is unknown.

        >>> StatisticsRequest.of(["ntk", "fisher"]).names
        ('fisher', 'ntk')
        """
        wanted = set(names)
        unknown = sorted(wanted - set(STATISTICS))
        if unknown:
            raise ConfigurationError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}")
        return cls(**{name: name in wanted for name in STATISTICS}, ntk_samples=ntk_samples)

    @property
    def names(self) -> tuple[str, ...]:
        """What is asked for, in the order of ``STATISTICS``."""
        return tuple(name for name in STATISTICS if getattr(self, name))

    @property
    def halves(self) -> bool:
        """Whether G is needed for each half of the samples."""
        return self.spectrum or self.whitened_spectrum

    @property
    def mean(self) -> bool:
        """Whether G is needed at all."""
        return self.gradient or self.halves

    @property
    def exact_factors(self) -> bool:
        """Whether A and S are summed."""
        return self.whitened_spectrum or self.factors

    @property
    def sketched_ntk(self) -> bool:
        """Whether the kernel is of more samples than are kept."""
        return self.ntk and self.ntk_samples > EXACT_NTK_SAMPLES

    @property
    def sketches(self) -> bool:
        """Whether anything is projected."""
        return self.sketched_spectrum or self.sketched_factors or self.sketched_ntk

    @property
    def masked_inputs(self) -> bool:
        """Whether padded inputs must be zero; for gradients alone their zero output gradients do."""
        return self.exact_factors or self.input_scale or self.sketched_factors

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return any(getattr(self, name) for name in BY_SAMPLES)
