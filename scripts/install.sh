#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv in the checkout and installs LayerLens into it with the given extra.
#
#   source scripts/install.sh && install_layerlens quickstart
#
# Installs again only when a source that the installation depends on has changed. PYTHON chooses the interpreter.

# PyPI's torchvision is built for PyPI's torch. Beside another one (a build for the CPU) its import fails, and with it that
# of transformers. Where that is so, each Python of .venv defines the operators that are missing, as LayerLens itself does:
# by a copy of that module, so that no Python imports LayerLens unasked.
fit_torchvision() {
  local packages
  packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -f "$packages"/layerlens_torchvision.pth "$packages"/fitting_torchvision.py
  .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torchvision") is None)' || return 0
  .venv/bin/python -c 'import torchvision' 2>/dev/null && return 0
  echo "torchvision is not built for this torch: letting .venv import it without its compiled operators" >&2
  cp layerlens/integrations/torchvision_import.py "$packages"/fitting_torchvision.py
  echo 'import fitting_torchvision; fitting_torchvision.make_torchvision_importable()' >"$packages"/layerlens_torchvision.pth
  .venv/bin/python -c 'import torchvision'
}

install_layerlens() {
  local extra=$1 python=${PYTHON:-python3} stamp state
  command -v "$python" >/dev/null || { echo "error: no $python; install Python 3.10 or newer, or set PYTHON" >&2; return 1; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: $("$python" --version) is too old; LayerLens needs Python 3.10 or newer (set PYTHON)" >&2; return 1; }
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    { echo "error: this Python has no venv; on Debian or Ubuntu: apt-get install python3-venv" >&2; return 1; }
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    { echo "error: no C++ compiler; on Debian or Ubuntu: apt-get install g++" >&2; return 1; }

  stamp=.venv/installed-$extra
  state=$(
    "$python" --version
    find cpp cython_bindings layerlens CMakeLists.txt pyproject.toml scripts/constraints.txt \
      -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum
  )
  if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then return 0; fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "Installing layerlens[$extra] into .venv (a few minutes the first time) ..." >&2
  # Editable: Python started in the checkout, as by torchrun, would find sources without kernels before an installed copy.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[$extra]"
  fit_torchvision
  rm -f .venv/installed-*
  echo "$state" >"$stamp"
  if [ "$extra" = test ]; then echo "$state" >.venv/installed-quickstart; fi # the test extra includes it
}
