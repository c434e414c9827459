#!/usr/bin/env bash
# Builds the documentation site into build/site; any warning, such as a dead link, is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_layerlens test
exec .venv/bin/mkdocs build --strict "$@"
