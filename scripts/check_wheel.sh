#!/usr/bin/env bash
# Installs the wheel of dist/ where nothing else is, and runs kernels, solver, the origin's quickstart and the first
# manifest there: in a new virtual environment, and in a minimal Debian root that has Python and no compiler.
#
#   scripts/build_wheels.sh && scripts/check_wheel.sh          # the second needs root, debootstrap and a Debian mirror
#   scripts/check_wheel.sh --environment-only
#
# Packages are collected in build/wheelhouse first and installed from there, without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=bookworm           # its Python is 3.11
python=${PYTHON:-python3.11}

tag=cp$("$python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
wheel=$(ls dist/layerlens-*-"$tag"-*.whl 2>/dev/null) ||
  { echo "error: no wheel for $("$python" --version) in dist; run scripts/build_wheels.sh" >&2; exit 2; }

house=build/wheelhouse
mkdir -p $house
rm -f $house/layerlens-*
"$python" -m pip download --quiet --disable-pip-version-check --dest $house -c scripts/constraints.txt \
  "$wheel[quickstart]" pip

install_and_check() { # runs in the folder that holds wheelhouse, checks and demos; $1: the Python to use
  "$1" -m venv environment
  environment/bin/python -m pip install --quiet --no-index --find-links wheelhouse 'layerlens[quickstart]'
  environment/bin/python scripts/wheel_checks.py demos/origin_quickstart.py
  environment/bin/layerlens run demos/quickstart/config.yaml
  test -s demos/quickstart/out/manifest.json
}

stage() { # everything that the checks need, and nothing of the source tree
  mkdir -p "$1/scripts" "$1/demos/quickstart"
  cp -r $house "$1/wheelhouse"
  cp scripts/wheel_checks.py "$1/scripts/"
  cp demos/origin_quickstart.py "$1/demos/"
  cp demos/quickstart/config.yaml "$1/demos/quickstart/"
}

timed() { local start=$SECONDS; "$@"; echo "$((SECONDS - start)) s from pip install to the first manifest" >&2; }

scratch=$(mktemp -d)
mounted=
cleanup() { [ -z "$mounted" ] || umount "$scratch/root/proc"; rm -rf "$scratch"; }
trap cleanup EXIT

echo "== a new virtual environment" >&2
stage "$scratch/environment"
(cd "$scratch/environment" && timed install_and_check "$python")
[ "${1:-}" != --environment-only ] || exit 0

echo "== a minimal $suite root with Python alone" >&2
[ "$(id -u)" = 0 ] || { echo "error: chroot needs root" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "error: no debootstrap; apt-get install debootstrap" >&2; exit 2; }
debootstrap --variant=minbase --include=python3,python3-venv $suite "$scratch/root" >"$scratch/debootstrap.log" ||
  { tail -n 5 "$scratch/debootstrap.log" >&2; exit 1; }
mount -t proc proc "$scratch/root/proc"
mounted=yes
stage "$scratch/root/srv"
if chroot "$scratch/root" sh -c 'command -v cc gcc g++ clang || ldconfig -p | grep libgomp'; then
  echo "error: the root has a compiler or a libgomp, so it proves nothing" >&2
  exit 1
fi

timed env -i PATH=/usr/bin:/bin HOME=/srv LAYERLENS_CACHE=/srv/cache chroot "$scratch/root" \
  bash -c "$(declare -f install_and_check); set -e; cd /srv; install_and_check python3"
