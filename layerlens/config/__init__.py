"""Configuration: pydantic models of every section, and how a YAML file becomes them."""

from layerlens.config.distributed import DistributedConfig
from layerlens.config.loader import load_run_config, parse_run_config
from layerlens.config.monitoring import TelemetryConfig, TrackingConfig
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
from layerlens.config.sweep import SweepConfig, load_sweep
from layerlens.config.training import TrainingConfig

__all__ = [
    "DataConfig",
    "DistributedConfig",
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
    "SweepConfig",
    "TelemetryConfig",
    "TrackingConfig",
    "TrainingConfig",
    "config_schema",
    "load_run_config",
    "load_sweep",
    "parse_run_config",
]
