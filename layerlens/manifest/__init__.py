"""The manifest on disk: written, read, checked against its published schema, and shown in a report."""

from layerlens.manifest.files import read_document, read_manifest, write_manifest
from layerlens.manifest.frontier import write_frontier
from layerlens.manifest.report import write_report
from layerlens.manifest.schema import manifest_schema

__all__ = ["manifest_schema", "read_document", "read_manifest", "write_frontier", "write_manifest", "write_report"]
