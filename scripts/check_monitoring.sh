#!/usr/bin/env bash
# The tests that need servers from outside Python: MLflow (in .venv-mlflow), Prometheus, its push gateway and promtool
# (Debian: apt-get install prometheus prometheus-pushgateway). Here a missing one is a failure, not a skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv-mlflow/bin/python ] || "${PYTHON:-python3}" -m venv .venv-mlflow
.venv-mlflow/bin/python -m pip install --quiet --disable-pip-version-check "mlflow>=3.1"
export OMP_NUM_THREADS=1 LAYERLENS_REQUIRE_SERVERS=1
exec .venv/bin/pytest tests/tracking tests/telemetry "$@"
