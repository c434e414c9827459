"""Configuration: pydantic models of every section, and how a YAML file becomes them."""

from layerlens.config.loader import load_run_config, parse_run_config
from layerlens.config.model_and_data import DataConfig, ModelConfig
from layerlens.config.optimization import LatencyProfile, OptimizationConfig, ProxyCheckConfig
from layerlens.config.profiling import ProfilingConfig, ProxyConfig
from layerlens.config.schema import config_schema
from layerlens.config.sections import (
    DistributedConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    TelemetryConfig,
    TrackingConfig,
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
