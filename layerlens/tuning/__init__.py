"""From a manifest to a model that trains: injection of LoRA, adapters and prefixes, and the adapter directory."""

from layerlens.tuning.export import export_adapter

__all__ = ["export_adapter"]
