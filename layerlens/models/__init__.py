"""Frozen dataclasses that the stages pass to each other. They depend neither on torch nor on files."""

from layerlens.models.allocation import (
    Allocation,
    AllocationProblem,
    FrontierRow,
    FrozenStage,
    LayerExplanation,
    SolverEvent,
)
from layerlens.models.charges import DepthCharge, GroupCharge
from layerlens.models.choice import Choice
from layerlens.models.detection import Box, Detection, LabelledImage
from layerlens.models.facts import CalibrationSummary, LoraSettings, ModelFacts, Predicted, Provenance, Saving
from layerlens.models.manifest import Manifest, ManifestRow, ResourceUse, choice_of
from layerlens.models.model_spec import ADAPTER, DORA, LORA, LORA_KINDS, NONE, PREFIX, LayerSpec, ModelSpec, Option
from layerlens.models.statistics import (
    Calibration,
    FactorSketch,
    Footprint,
    KernelStatistics,
    LayerStatistics,
    MethodStatistics,
    ModelStatistics,
    ModuleCosts,
    Prediction,
    ProxyGain,
    ProxyStudy,
)
from layerlens.models.tables import RESOURCES, CostTable, UtilityTable

__all__ = [
    "ADAPTER",
    "DORA",
    "LORA",
    "LORA_KINDS",
    "NONE",
    "PREFIX",
    "RESOURCES",
    "Allocation",
    "AllocationProblem",
    "Box",
    "Calibration",
    "CalibrationSummary",
    "Choice",
    "CostTable",
    "DepthCharge",
    "Detection",
    "FactorSketch",
    "Footprint",
    "FrontierRow",
    "FrozenStage",
    "GroupCharge",
    "KernelStatistics",
    "LabelledImage",
    "LayerExplanation",
    "LayerSpec",
    "LayerStatistics",
    "LoraSettings",
    "Manifest",
    "ManifestRow",
    "MethodStatistics",
    "ModelFacts",
    "ModelSpec",
    "ModelStatistics",
    "ModuleCosts",
    "Option",
    "Predicted",
    "Prediction",
    "Provenance",
    "ProxyGain",
    "ProxyStudy",
    "ResourceUse",
    "Saving",
    "SolverEvent",
    "UtilityTable",
    "choice_of",
]
