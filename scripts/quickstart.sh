#!/usr/bin/env bash
# From a fresh clone to the first manifest: makes .venv, installs LayerLens, runs the quickstart job.
# Arguments are handed to `layerlens run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_layerlens quickstart
exec .venv/bin/layerlens run demos/quickstart/config.yaml "$@"
