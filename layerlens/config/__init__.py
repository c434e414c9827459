"""Configuration: pydantic models of every section."""

from layerlens.config.sections import (
    DataConfig,
    LatencyProfile,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    ProfilingConfig,
    RunConfig,
    RuntimeConfig,
)

__all__ = [
    "DataConfig",
    "LatencyProfile",
    "ModelConfig",
    "OptimizationConfig",
    "OutputConfig",
    "ProfilingConfig",
    "RunConfig",
    "RuntimeConfig",
]
