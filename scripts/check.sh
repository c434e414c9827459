#!/usr/bin/env bash
# Lint, format, types and import rules, as tests/house has them, in .venv; without the other tests it takes seconds.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/install.sh
install_layerlens test || exit
failed=0
for checker in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do
  # shellcheck disable=SC2086 # the words of a command
  .venv/bin/$checker || { echo "failed: $checker" >&2; failed=1; }
done
exit $failed
