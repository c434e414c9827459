"""What tensor operations take on a device: rates that were measured on it, or a roofline of three figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from layerlens.config import LatencyProfile
from layerlens.methods import Operation
from layerlens.models.step import MATMUL, MEMORY, VIEW, TracedOperation

if TYPE_CHECKING:
    from layerlens.cost.trace import StepTrace

FLOAT_BYTES = 4

NOMINAL = {"cpu": (100.0, 20.0, 5.0), "gpu": (150_000.0, 1500.0, 5.0)}
"""Device type -> (GFLOP/s, GB/s, µs for each operation): about half of what data sheets say of a two-core server slice
and of an A100. Used where the latency profile does not give the user's own figures."""


class Device(Protocol):
    """What predicts the time of a step."""

    @property
    def parameter_us(self) -> float:
        """µs of the optimiser for each tensor."""

    def operation_ms(self, operation: TracedOperation) -> float:
        """Milliseconds of one operation."""


@dataclass(frozen=True)
class Rates:
    """What one kind of operation costs: µs for each, ms for a GFLOP, ms for a GB."""

    overhead_us: float
    ms_per_gflop: float
    ms_per_gb: float


@dataclass(frozen=True)
class DeviceProfile:
    """A measured device.

    Args:
        device: what it is, and how many threads were used.
        rates: by kind of operation.
        parameter_us: µs of the optimiser step for each parameter tensor.
        fresh_ms_per_gb: ms for a GB of memory that the process gets anew, on top of writing it.
        fit_error: median relative error of the fit, by kind.
    """

    device: str
    threads: int
    rates: dict[str, Rates]
    parameter_us: float
    fresh_ms_per_gb: float = 0.0
    fit_error: dict[str, float] = field(default_factory=dict)

    def operation_ms(self, operation: TracedOperation) -> float:
        """Predicted milliseconds of one operation."""
        rates = self.rates[operation.kind]
        return (
            1e-3 * rates.overhead_us
            + 1e-9 * rates.ms_per_gflop * operation.flops
            + 1e-9 * rates.ms_per_gb * operation.n_bytes
            + 1e-9 * self.fresh_ms_per_gb * operation.fresh_bytes
        )

    def step_ms(self, trace: StepTrace, parameters: int, elements: int) -> float:
        """Predicted milliseconds of a training step with AdamW on so many tensors of so many elements together."""
        # fused AdamW reads weight, gradient and two moments and writes all but the gradient: 7 float32 for an element
        update = TracedOperation(MEMORY, 0.0, 28.0 * elements)
        passes = sum(map(self.operation_ms, trace.operations))
        return passes + self.operation_ms(update) + 1e-3 * self.parameter_us * parameters

    def scaled(self, factor: float) -> DeviceProfile:
        """A device on which everything takes ``factor`` times as long."""
        rates = {
            kind: Rates(factor * each.overhead_us, factor * each.ms_per_gflop, factor * each.ms_per_gb)
            for kind, each in self.rates.items()
        }
        update, fresh = factor * self.parameter_us, factor * self.fresh_ms_per_gb
        return replace(self, rates=rates, parameter_us=update, fresh_ms_per_gb=fresh)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> DeviceProfile:
        """From the fields of one, as JSON values."""
        rates = {kind: Rates(**values) for kind, values in fields["rates"].items()}
        return cls(**{**fields, "rates": rates})

    def latency_profile(self, profile: LatencyProfile) -> LatencyProfile:
        """``profile`` with the roofline figures of this device."""
        matmul, memory = self.rates[MATMUL], self.rates[MEMORY]
        return profile.model_copy(
            update={
                "peak_gflops": 1e3 / matmul.ms_per_gflop,
                "memory_bandwidth_gb_s": 1e3 / memory.ms_per_gb,
                "op_overhead_us": memory.overhead_us,
            }
        )


@dataclass(frozen=True)
class Roofline:
    """Time of an operation = max(FLOPs / peak, bytes / bandwidth) + fixed overhead (Williams et al. 2009)."""

    peak_gflops: float
    bandwidth_gb_s: float
    overhead_us: float

    @classmethod
    def of(cls, profile: LatencyProfile) -> Roofline:
        """The profile's own figures, nominal ones of its device type where it has none."""
        peak, bandwidth, overhead = NOMINAL[profile.device_type]
        return cls(
            profile.peak_gflops if profile.peak_gflops is not None else peak,
            profile.memory_bandwidth_gb_s if profile.memory_bandwidth_gb_s is not None else bandwidth,
            profile.op_overhead_us if profile.op_overhead_us is not None else overhead,
        )

    def time_ms(self, flops: float, n_bytes: float) -> float:
        """Milliseconds for one operation."""
        seconds = max(flops / (self.peak_gflops * 1e9), n_bytes / (self.bandwidth_gb_s * 1e9))
        return 1e3 * seconds + 1e-3 * self.overhead_us

    @property
    def parameter_us(self) -> float:
        """Of the optimiser for each tensor: one operation."""
        return self.overhead_us

    def operation_ms(self, operation: TracedOperation) -> float:
        """Milliseconds of one traced operation; a view takes none."""
        return 0.0 if operation.kind == VIEW else self.time_ms(operation.flops, operation.n_bytes)

    def added_ms(self, operation: Operation, tokens: int) -> float:
        """Milliseconds for one operation that a method adds, on a batch of ``tokens``."""
        n_bytes = FLOAT_BYTES * (operation.elements * tokens + operation.weights)
        return self.time_ms(operation.flops * tokens + operation.call_flops, n_bytes)
