#!/usr/bin/env bash
# Builds the sdist and one wheel twice, from copies of the tracked files in two folders, and compares every byte.
#
#   scripts/check_reproducible.sh              # PYTHON (default python3) is what the wheel is for
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p build
for copy in one "the other"; do
  mkdir -p "$scratch/$copy/build"
  git ls-files -z | xargs -0 cp --parents -t "$scratch/$copy"
  find "$scratch/$copy" -exec touch -d "$((RANDOM % 9 + 1)) days ago" {} + # bytes must not depend on when files were written
  for kept in wheel-tools libgomp; do # downloaded once
    [ ! -d build/$kept ] || ln -s "$PWD/build/$kept" "$scratch/$copy/build/$kept"
  done
done
for copy in one "the other"; do
  (cd "$scratch/$copy" && PYTHONS=${PYTHON:-python3} scripts/build_wheels.sh >/dev/null) || exit
done
if ! diff "$scratch/one/dist/SHA256SUMS" "$scratch/the other/dist/SHA256SUMS"; then
  echo "error: two builds of the same files differ" >&2
  exit 1
fi
cat "$scratch/one/dist/SHA256SUMS"
echo "two builds in two folders: equal bytes" >&2
