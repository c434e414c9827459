"""Configuration: pydantic models of every section, and how a YAML file becomes them."""

from layerlens.config.loader import load_run_config, parse_run_config
from layerlens.config.schema import config_schema
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
from layerlens.config.study import StudyConfig

__all__ = [
    "DataConfig",
    "LatencyProfile",
    "ModelConfig",
    "OptimizationConfig",
    "OutputConfig",
    "ProfilingConfig",
    "RunConfig",
    "RuntimeConfig",
    "StudyConfig",
    "config_schema",
    "load_run_config",
    "parse_run_config",
]
