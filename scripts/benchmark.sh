#!/usr/bin/env bash
# The regression gate of the kernels: measures their ratios to NumPy, torch and numba, and fails where one has dropped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_layerlens test
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt numba
exec .venv/bin/pytest benchmarks/profile_batch_benchmark.py --benchmark-enable "$@"
