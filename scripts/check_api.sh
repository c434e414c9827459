#!/usr/bin/env bash
# Lets schemathesis try every operation of the server's OpenAPI document, with every check that it has, with a token,
# without one, and on a server that has none; see benchmarks/service_api.py, which this calls.
#
#   scripts/check_api.sh [--examples N] [--out FILE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${LAYERLENS_PYTHON:-.venv/bin/python}" benchmarks/service_api.py --examples "${EXAMPLES:-100}" "$@"
