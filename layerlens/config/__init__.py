"""Configuration: pydantic models of every section, and how a YAML file becomes them."""

from layerlens.config.loader import load_run_config, parse_run_config
from layerlens.config.proxy_check import ProxyCheckConfig
from layerlens.config.schema import config_schema
from layerlens.config.sections import (
    DataConfig,
    LatencyProfile,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    ProfilingConfig,
    ProxyConfig,
    RunConfig,
    RuntimeConfig,
)
from layerlens.config.study import StudyConfig
from layerlens.config.training import TrainingConfig

__all__ = [
    "DataConfig",
    "LatencyProfile",
    "ModelConfig",
    "OptimizationConfig",
    "OutputConfig",
    "ProfilingConfig",
    "ProxyCheckConfig",
    "ProxyConfig",
    "RunConfig",
    "RuntimeConfig",
    "StudyConfig",
    "TrainingConfig",
    "config_schema",
    "load_run_config",
    "parse_run_config",
]
