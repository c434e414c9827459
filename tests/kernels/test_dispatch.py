"""The choice of instruction set, LAYERLENS_ISA, the thread count, and forked children."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from layerlens import kernels
from layerlens.exceptions import ConfigurationError
from layerlens.kernels import _aggregate, _dispatch, _fisher, _ghost, _moments, _rademacher, reference


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=Path(sys.executable).parent,  # not a checkout, whose layerlens folder would hide the installed one
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_scalar_is_always_available_and_the_best_is_chosen() -> None:
    assert kernels.available_isas()[0] == "scalar"
    code = "from layerlens import kernels; print(kernels.isa() == kernels.available_isas()[-1])"
    assert run_python(code, LAYERLENS_ISA="").stdout.strip() == "True"


@pytest.mark.parametrize("name", kernels.available_isas())
def test_environment_forces_an_isa(name: str) -> None:
    shown = run_python("from layerlens import kernels; print(kernels.isa())", LAYERLENS_ISA=name.upper() + " ")
    assert shown.stdout.strip() == name


@pytest.mark.parametrize("name", ["sse9", *({"avx2", "avx512"} - set(kernels.available_isas()))])
def test_unusable_environment_is_refused_at_first_use_not_at_import(name: str) -> None:
    shown = run_python(
        """
        import numpy as np
        from layerlens import kernels
        print("imported", flush=True)
        kernels.gradient_energy(np.ones(3))
        """,
        LAYERLENS_ISA=name,
    )
    assert shown.stdout.strip() == "imported"
    assert f"ConfigurationError: LAYERLENS_ISA='{name}'" in shown.stderr
    assert "scalar" in shown.stderr


def test_forcing_an_unknown_isa_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="names no instruction set; available here: scalar"):
        _dispatch._force("neon9")
    assert issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize("module", [_aggregate, _dispatch, _fisher, _ghost, _moments, _rademacher, reference])
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    with np.printoptions(linewidth=75):  # ultralytics, which other tests import, changes NumPy's
        result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_importing_the_kernels_does_not_import_torch() -> None:
    shown = run_python(
        "import sys; import layerlens.kernels, layerlens.kernels.reference; print('torch' in sys.modules)"
    )
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("threads", "error"), [(0, ValueError), (-1, ValueError), (10**6, ValueError), (1.5, TypeError)]
)
def test_wrong_thread_counts_are_refused(threads: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="threads must be"):
        kernels.gradient_energy(np.ones(3), threads=threads)


def test_a_forked_child_does_not_hang() -> None:
    """libgomp's workers do not survive a fork; a child that opened a parallel region would wait for them for ever."""
    shown = run_python(
        """
        import os, sys
        import numpy as np
        from layerlens import kernels
        from layerlens.kernels import _dispatch

        x = np.ones((64, 65536), dtype=np.float32)
        kernels.row_sum_of_squares(x, threads=2)
        assert not _dispatch._serial_because_forked()
        child = os.fork()
        if child == 0:
            right = _dispatch._serial_because_forked()
            right &= bool((kernels.row_sum_of_squares(x, threads=2) == 65536).all())
            right &= kernels.fisher_diagonal(x, threads=2)[-1] == 1.0
            os._exit(0 if right else 3)
        print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print("parent:", kernels.gradient_energy(x, threads=2))
        """
    )
    assert shown.stdout.splitlines() == ["child: 0", "parent: 4194304.0"], shown.stderr


def test_the_gil_is_released() -> None:
    row = np.ones(4096, dtype=np.float32)
    x = np.broadcast_to(row, (1 << 19, 4096))
    worker = threading.Thread(target=kernels.row_sum_of_squares, args=(x,))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
    assert turns > 100, "the main thread stood still while the kernel ran"
