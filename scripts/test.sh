#!/usr/bin/env bash
# Makes .venv, installs LayerLens with its test extra and runs the whole test suite, two files at a time. Arguments are
# handed to pytest (`-n 0` runs one test after the other). --quick leaves out the files that take more than 0.6 s of
# processor time; --record-times prints what takes most and writes tests/times.json, by which this order and --quick go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_layerlens test
# Two busy OpenMP runtimes on few cores slow small work thirtyfold; tests that need threads ask for them, and
# tests/conftest.py has idle threads sleep.
export OMP_NUM_THREADS=1
exec .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
