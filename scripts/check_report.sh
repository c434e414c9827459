#!/usr/bin/env bash
# Opens a report in headless Chromium, as scripts/report_checks.py tells: no message, no request, nothing too wide on a
# phone, no accessibility violation (axe-core), reached by keyboard, printed in black on white.
#
#   scripts/check_report.sh [REPORT.html] [--pictures DIRECTORY]
#
# Without a report it makes the quickstart's. Needs Chromium or Chrome: apt-get install chromium, or set CHROMIUM.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
[ -n "${LAYERLENS_NO_INSTALL:-}" ] || install_layerlens test
if [ $# = 0 ] || [ "${1#--}" != "$1" ]; then
  .venv/bin/layerlens run demos/quickstart/config.yaml --quiet
  set -- "$PWD/demos/quickstart/out/report.html" "$@"
fi
python=$PWD/.venv/bin/python checks=$PWD/scripts/report_checks.py
cd "$called_from"
exec "$python" "$checks" "$@"
