#!/usr/bin/env bash
# Writes every export of `layerlens export` and loads it in the tool it is for, each tool in a throw-away directory of
# packages beside .venv's own, so that nothing is installed for good. Needs a package index; prints a line for each check.
#
#   scripts/check_exports.sh [TOOL ...]        peft trl axolotl llama-factory adapterhub
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/install.sh
[ -n "${LAYERLENS_NO_INSTALL:-}" ] || install_layerlens test || exit
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DISABLE_VERSION_CHECK=1 AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1
"$python" scripts/export_checks/make_exports.py "$work/exports" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

# What each tool imports and .venv lacks. --no-deps: their pins would bring another torch (gigabytes) and transformers.
declare -A packages=(
  [peft]=""
  [trl]="trl"
  [axolotl]="axolotl axolotl-contribs-lgpl axolotl-contribs-mit addict bitsandbytes fire termcolor colorama art posthog
    backoff requests urllib3 charset_normalizer certifi optimum einops distro python-dotenv python-dateutil six evaluate"
  [llama-factory]="llamafactory==0.9.5 trl==0.24.0 omegaconf antlr4-python3-runtime==4.9.3 fire termcolor httpx httpcore
    certifi einops"
  [adapterhub]="adapters==1.3.0 transformers==4.57.6 huggingface_hub<1.0 tokenizers<=0.23.0 requests urllib3
    charset_normalizer certifi"
)
failed=0
[ $# -gt 0 ] || set -- peft trl axolotl llama-factory adapterhub
for tool in "$@"; do
  if [ -n "${packages[$tool]}" ]; then
    # shellcheck disable=SC2086 # the names of packages
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/$tool" ${packages[$tool]} \
      >"$work/log" 2>&1 || { echo "$tool: cannot be installed here: $(tail -n 1 "$work/log")"; failed=1; continue; }
  fi
  if PYTHONPATH=$work/$tool "$python" scripts/export_checks/check.py "$tool" "$work/exports" >"$work/log" 2>&1; then
    grep "^$tool: " "$work/log"
  else
    echo "$tool: failed: $(grep -v '^ ' "$work/log" | tail -n 1)"
    failed=1
  fi
done
exit $failed
