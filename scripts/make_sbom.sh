#!/usr/bin/env bash
# Writes a CycloneDX software bill of materials of what installing the built wheel brings: make_sbom.sh OUTPUT.json
set -euo pipefail
[ $# = 1 ] || { echo "usage: make_sbom.sh OUTPUT.json" >&2; exit 2; }
output=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
tag=cp$("$python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
wheel=$(ls dist/layerlens-*-"$tag"-*.whl 2>/dev/null) ||
  { echo "error: no wheel for $("$python" --version) in dist; run scripts/build_wheels.sh" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/installed"
"$scratch/installed/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt "${wheel}[hf]"
"$python" -m venv "$scratch/tool"
"$scratch/tool/bin/python" -m pip install --quiet --disable-pip-version-check cyclonedx-bom
"$scratch/tool/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible \
  --output-format JSON --output-file "$output" "$scratch/installed/bin/python"
