"""Python processes that have imported torch, transformers and PEFT already: forks of a server instead of new programs.

A new program spends four to seven seconds of processor time on these imports. The server has imported what ``PRELOAD``
names and nothing of LayerLens, has started no thread and run nothing else. So a fork of it is what a new program is
after these imports. Tests of imports, of what a program has *not* imported, and of signals start a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "numpy", "scipy.linalg", "scipy.optimize", "scipy.sparse", "pydantic", "yaml", "typer", "rich.console", "datasets",
    "torch", "torch._dynamo", "safetensors.torch", "transformers", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert", "transformers.trainer",
    "peft",
)  # fmt: skip
LONGEST_ORDER = 2**20


class WarmPython:
    """The server; started when the first process is asked for."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is for its socket and for the program that stands for Python."""
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        self.python = folder / "python"

    def _start(self) -> str:
        # Unix sockets have short names, and folders of tests long ones.
        address = f"\0layerlens-warm-python-{os.getpid()}-{id(self)}"
        if self.server is None:
            # HF_HUB_OFFLINE is read when the library is imported; so it is the same for all.
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen(64)
            command = [sys.executable, __file__, "serve", str(listener.fileno())]
            self.server = subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            listener.close()
        return address

    def run(
        self, *arguments: str | Path, cwd: str | Path = ".", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``subprocess.run([python, *arguments], ...)`` for ``-c CODE``, ``-m MODULE`` or a file, with its output."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            with open(os.devnull, "rb") as nothing:
                streams = [nothing.fileno(), out.fileno(), error.fileno()]
                words = [os.fspath(one) for one in arguments]
                code = ask(self._start(), words, os.path.abspath(cwd), os.environ if env is None else env, streams)
            said = []
            for file in (out, error):
                file.seek(0)
                said.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), code, *said)

    def program(self, name: str, *arguments: str) -> Path:
        """A program that does what ``python ARGUMENTS`` does, with its own arguments after these, by the server."""
        path = self.folder / name
        words = [sys.executable, "-S", "-E", __file__, "ask", self._start()[1:], *arguments]
        path.write_text("#!/bin/sh\nexec " + " ".join(f"'{word}'" for word in words) + ' "$@"\n')
        path.chmod(0o755)
        return path

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait()


def ask(
    address: str, arguments: list[str], cwd: str, env: Mapping[str, str], streams: list[int], forwarded: Any = ()
) -> int:
    """Have a process run, with these files as standard input, output and error; its exit code.

    Signals in ``forwarded`` are handed on to it.
    """
    order = json.dumps({"arguments": arguments, "cwd": cwd, "env": {**env}}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(order).to_bytes(8, "big")], streams)
        server.sendall(order)
        process = int.from_bytes(server.recv(8), "big")
        for number in forwarded:
            signal.signal(number, lambda number, _frame: os.kill(process, number))
        return int.from_bytes(server.recv(8), "big", signed=True)


def serve(listener: socket.socket) -> None:
    import gc
    import importlib

    gc.disable()
    _make_torchvision_importable()
    for name in PRELOAD:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    assert not [name for name in sys.modules if name.partition(".")[0] == "layerlens"]
    while select.select([listener, 0], [], [])[0] == [listener]:  # until the tests have ended, however they do
        client, _ = listener.accept()
        if not os.fork():  # one process waits for the program, so that the server can start others meanwhile
            listener.close()
            _attend(client)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _attend(client: socket.socket) -> NoReturn:
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    order = bytearray()
    while len(order) < int.from_bytes(length, "big"):
        order += client.recv(LONGEST_ORDER)
    process = os.fork()
    if not process:
        client.close()
        _become(json.loads(order), streams)
    client.sendall(process.to_bytes(8, "big"))
    _, status = os.waitpid(process, 0)
    client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
    os._exit(0)


def _make_torchvision_importable() -> None:
    """PyPI's torchvision beside a CPU torch breaks every import of transformers; see layerlens.integrations."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        from layerlens.integrations.torchvision_import import make_torchvision_importable

        make_torchvision_importable()
        for name in [name for name in sys.modules if name.partition(".")[0] == "layerlens"]:
            del sys.modules[name]


def _become(order: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the program that was ordered."""
    import atexit
    import runpy
    import traceback

    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    kind, *rest = (one for one in order["arguments"] if one != "-u")  # nothing is kept back at the end anyway
    code = 0
    try:
        if kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            module = type(sys)("__main__")
            sys.modules["__main__"] = module
            exec(compile(rest[0], "<string>", "exec"), vars(module))
        elif kind == "-m":
            sys.path.insert(0, order["cwd"])
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    kind, place, *arguments = sys.argv[1:]
    if kind == "serve":
        del sys.path[0]  # this folder, which programs know nothing of
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this
        serve(socket.socket(fileno=int(place)))
        return
    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    code = ask(f"\0{place}", arguments, os.getcwd(), os.environ, [0, 1, 2], forwarded)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
