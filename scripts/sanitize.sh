#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of every family with them,
# and those of the solver that go through its kernels.
#
#   scripts/sanitize.sh [pytest arguments]
#
# PYTHON (default python3) must have numpy, torch, pytest, hypothesis, cython, cython-cmake, scikit-build-core, cmake and
# ninja, as `pip install -e .[dev]` leaves it. Nothing of that Python or of the checkout is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# -fno-sanitize=vptr needs no run-time type information; float-cast and division by zero are defined by IEEE 754.
flags="-fsanitize=address,undefined -fno-sanitize=vptr,float-divide-by-zero -fno-sanitize-recover=undefined"
flags="$flags -fno-omit-frame-pointer -g1 -O1"
CXXFLAGS=$flags LDFLAGS="-fsanitize=address,undefined" "$python" -m pip install --quiet --no-deps \
  --no-build-isolation --disable-pip-version-check --target "$work/site" \
  -C build-dir="$work/build" -C cmake.build-type=Debug -C install.strip=false .

# An editable install finds the checkout's modules before PYTHONPATH is asked; Python imports this file after it set up.
cat > "$work/site/sitecustomize.py" << 'END'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
END

# The interpreter is not instrumented, so the runtime is loaded before it. Python keeps memory until exit (no leak check)
# and importing torch uses alternative signal stacks.
compiler=${CXX:-c++}
runtime="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so) $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS="detect_leaks=0:use_sigaltstack=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
export OMP_NUM_THREADS=1

cp -r tests "$work/tests" # away from the checkout, whose layerlens folder would hide the instrumented one
cp pyproject.toml "$work"
cd "$work"
LD_PRELOAD=$runtime PYTHONPATH="$work/site" "$python" -c \
  "import layerlens.kernels as k; assert k.__file__.startswith('$work'), k.__file__; print('instrumented:', k.isa())"
LD_PRELOAD=$runtime PYTHONPATH="$work/site" "$python" -m pytest -q -p no:cacheprovider tests/kernels \
  tests/optimization/test_knapsack_kernels.py tests/optimization/test_knapsack_property.py \
  tests/optimization/test_beam_search.py "$@"
