#!/usr/bin/env bash
# Runs the steps of the Dockerfile in a minimal Debian root, where no container engine is at hand: builder and cpu image,
# then, as the image's user, its default command, its health check, and the origin's quickstart.
#
#   scripts/check_image_steps.sh [TARGET]      # cpu (default) or runtime; needs root, debootstrap and a Debian mirror
#
# The base image is replaced by Debian's own Python of the same version; packages are collected in build/image-wheelhouse
# first and installed from there (for cuda that would be gigabytes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/debian_root.sh
python=${PYTHON:-python3.11}
scratch=$(mktemp -d)
trap 'unmount_debian_root "$scratch" && rm -rf --one-file-system "$scratch"' EXIT

house=build/image-wheelhouse
mkdir -p $house
[ ! -d build/wheelhouse ] || cp -nl build/wheelhouse/* $house/ # what check_wheel.sh has collected
rm -f $house/layerlens-*
wheel=$(ls dist/layerlens-*-cp311-*.whl 2>/dev/null) ||
  { echo "error: dist has no wheel for Python 3.11, whose requirements are collected; run scripts/build_wheels.sh" >&2; exit 2; }
"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir $house --find-links $house \
  -c scripts/constraints.txt "${wheel}[hf]" "scikit-build-core>=0.11" "cython>=3.1" "cython-cmake>=0.2" "cmake>=3.20" ninja pip
rm -f $house/layerlens-*

make_debian_root "$scratch/base" # makes the archive that the stages start from
unmount_debian_root "$scratch/base"
rm -rf "$scratch/base"
python3 scripts/image_steps.py "${1:-cpu}" "build/debian-root-$debian_suite.tar" $house "$scratch" -- \
  python -c "$(cat demos/origin_quickstart.py)"
echo "the image's steps work" >&2
