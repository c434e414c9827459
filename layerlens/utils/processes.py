"""Several processes that do one job: who is who, heartbeats, and what one has to tell the others.

torchrun (or any launcher that sets the same variables) starts the processes; everything they tell each other in words
goes through torch's key-value store, pickled, since all of them run the same program for the same user; only sums of
statistics go through collectives. Each process counts up in the
store every few seconds from a thread of its own, so that one that is killed, or whose machine is lost, is missed within
``timeout_s`` however long its own work takes; one that fails says why, and the others stop with that reason.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from layerlens.exceptions import ConfigurationError, LayerLensError, ProcessLostError
from layerlens.utils.launch import Place, place_of_this_process

if TYPE_CHECKING:
    import torch

BEATS_PER_TIMEOUT = 10
POLL_S = 0.02
GOODBYE_S, FAILED_GOODBYE_S = 30.0, 2.0
"""How long process 0, which may hold the store, waits for the others to have read what it told them last."""


class Processes:
    """The processes of one job, seen from one of them. Alone, everything here is immediate and sends nothing.

    ``bytes_sent`` counts the tensors that this process has put into collectives or sent to another.
    """

    def __init__(self, place: Place | None = None, store: Any = None, timeout_s: float = 300.0) -> None:
        self.place = place or Place()
        self.rank, self.size = self.place.rank, self.place.size
        self.timeout_s = timeout_s
        self.bytes_sent = 0
        self._store = store
        self._told: dict[str, int] = {}
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._next_look = 0.0

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone solves and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def share_of(self, numbers: range) -> range:
        """This process's share of what there is to do: every ``size``-th, from its rank on."""
        return numbers[self.rank :: self.size]

    def everyone(self, topic: str, value: Any) -> list[Any]:
        """What every process says on ``topic``, by rank; all of them must ask."""
        if self.alone:
            return [value]
        key = self._key(topic)
        self._guard(lambda: self._store.set(f"{key}/{self.rank}", pickle.dumps(value)))
        return [pickle.loads(self._await(f"{key}/{rank}")) for rank in range(self.size)]

    def from_first(self, topic: str, value: Any = None) -> Any:
        """What process 0 says on ``topic``; what the others pass is not looked at."""
        if self.alone:
            return value
        key = self._key(topic)
        if self.first:
            self._guard(lambda: self._store.set(key, pickle.dumps(value)))
            return value
        return pickle.loads(self._await(key))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum ``tensor`` over the processes; process 0 has the sum in it afterwards, the others' is undefined."""
        import torch.distributed as dist

        self.bytes_sent += 0 if self.first else tensor.nbytes
        self._guard(lambda: dist.reduce(tensor, dst=0))

    def add_and_share(self, share: torch.Tensor, parts: torch.Tensor) -> None:
        """Sum ``parts`` over the processes and put this one's equal share of the first axis into ``share``."""
        import torch.distributed as dist

        self.bytes_sent += parts.nbytes - share.nbytes
        self._guard(lambda: dist.reduce_scatter_tensor(share, parts))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Process 0 gets the tensors of all, by rank, which have one shape; the others get nothing back."""
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else []
        self.bytes_sent += 0 if self.first else tensor.nbytes
        self._guard(lambda: dist.gather(tensor, parts or None, dst=0))
        return parts

    def copy_from_first(self, tensor: torch.Tensor) -> None:
        """Put process 0's values into ``tensor`` everywhere."""
        import torch.distributed as dist

        if not self.alone:
            self.bytes_sent += tensor.nbytes if self.first else 0
            self._guard(lambda: dist.broadcast(tensor, src=0))

    def bytes_to_first(self, data: bytes) -> list[bytes]:
        """Process 0 gets the others' bytes, by rank (its own among them); the others get nothing back."""
        import torch
        import torch.distributed as dist

        sizes = self.everyone("bytes", len(data))
        if not self.first:
            self.bytes_sent += len(data)
            self._guard(lambda: dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0))
            return []
        found = [data]
        for rank in range(1, self.size):
            buffer = torch.empty(sizes[rank], dtype=torch.uint8)
            self._guard(partial(dist.recv, buffer, src=rank))
            found.append(buffer.numpy().tobytes())
        return found

    def check(self) -> None:
        """Notice that another process has failed or is lost.

        Raises:
            ProcessLostError: with the reason.
        """
        if self.alone or time.monotonic() < self._next_look:
            return
        if self._guard(lambda: self._store.check(["failed"])):
            rank, host, line, code = pickle.loads(self._guard(lambda: self._store.get("failed")))
            raise ProcessLostError(f"process {rank} on {host} stopped: {line}", code, told=True)
        now = time.monotonic()
        self._next_look = now + self.timeout_s / BEATS_PER_TIMEOUT / 2
        for rank in range(self.size):
            count = self._guard(partial(self._store.add, f"alive/{rank}", 0))
            before, since = self._beats.get(rank, (-1, now))
            self._beats[rank] = (count, now if count != before else since)
            if rank != self.rank and now - since > self.timeout_s and count == before:
                raise ProcessLostError(
                    f"process {rank} has sent no heartbeat for {self.timeout_s:g} s (distributed.timeout_s); it "
                    "was killed or its machine is lost"
                )

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process stops; only the first reason of all is kept."""
        if self.alone or self._store is None or (isinstance(error, ProcessLostError) and error.told):
            return
        line = (str(error) or type(error).__name__).strip().splitlines()[0]
        code = error.exit_code if isinstance(error, LayerLensError) else 1
        with suppress(RuntimeError):  # the store itself may be what was lost
            if self._store.add("failures", 1) == 1:
                self._store.set("failed", pickle.dumps((self.rank, socket.gethostname(), line, code)))

    def first_failed_alike(self, error: BaseException) -> bool:
        """Whether process 0 reports the same failure within a moment, as when a model is nowhere to be found."""
        if self.first:
            return False
        words = str(error)
        with suppress(RuntimeError):
            self._store.set(f"stopped/{self.rank}", words)
            self._store.wait(["stopped/0"], timedelta(seconds=2))
            return bool(self._store.get("stopped/0").decode() == words)
        return False

    def _start(self) -> None:
        heart = self._store.clone()

        def beat() -> None:
            while not self._stop.wait(self.timeout_s / BEATS_PER_TIMEOUT):
                try:
                    heart.add(f"alive/{self.rank}", 1)
                except RuntimeError:  # the store is gone: whoever looks next says so
                    return

        self._heart = threading.Thread(target=beat, name="layerlens heartbeat", daemon=True)
        self._heart.start()

    def _leave(self, patience_s: float) -> None:
        self._stop.set()
        with suppress(RuntimeError):
            self._store.add("left", 1)
            end = time.monotonic() + patience_s
            while self.first and self._store.add("left", 0) < self.size and time.monotonic() < end:
                time.sleep(POLL_S)

    def _key(self, topic: str) -> str:
        """A topic may be spoken of several times; everyone counts alike."""
        self._told[topic] = self._told.get(topic, 0) + 1
        return f"{topic}#{self._told[topic]}"

    def _await(self, key: str) -> bytes:
        pause = POLL_S / 10
        while not self._guard(lambda: self._store.check([key])):
            self._next_look = min(self._next_look, time.monotonic() + POLL_S)
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, POLL_S)
        return bytes(self._guard(lambda: self._store.get(key)))

    def _guard(self, ask: Callable[[], Any]) -> Any:
        """Ask the store or the group; that it does not answer means that another process is gone.

        Raises:
            ProcessLostError: with the reason where the others left one.
        """
        try:
            return ask()
        except RuntimeError as error:
            self._lost(error)

    def _lost(self, error: RuntimeError) -> NoReturn:
        reason = str(error).strip().splitlines()[0][:200]
        with suppress(RuntimeError):
            for _ in range(20):  # a process that fails tells so before its connections close, but not always sooner
                if self._store.check(["failed"]):
                    rank, host, line, code = pickle.loads(self._store.get("failed"))
                    raise ProcessLostError(f"process {rank} on {host} stopped: {line}", code, told=True) from error
                time.sleep(POLL_S)
        raise ProcessLostError(f"lost the connection to another process of this run ({reason})") from error


ALONE = Processes()


@contextmanager
def joined(backend: str, device: str, timeout_s: float) -> Iterator[Processes]:
    """The processes that the launcher started with this one; they leave together when the block ends.

    Args:
        backend: "auto" (nccl on cuda, else gloo), "gloo" or "nccl": what sums go through.
        device: "cpu" or "cuda".
        timeout_s: how long to wait for the others to come, for a heartbeat of theirs, and for one collective.

    Raises:
        ConfigurationError: the launcher's variables are incomplete, or the backend cannot be had.
        ProcessLostError: the others did not come in time; while the block runs, see ``Processes.check``.
    """
    place = place_of_this_process()
    if place.size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise ConfigurationError(
            "torch.distributed is already in use in this process; call this before init_process_group, or after "
            "destroy_process_group"
        )
    wanted = ("nccl" if device == "cuda" else "gloo") if backend == "auto" else backend
    _refuse_backend(wanted, device, place)
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    patience = timedelta(seconds=timeout_s)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        found, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=patience))
        store = dist.PrefixStore(f"layerlens/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if wanted == "nccl" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=patience,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ProcessLostError(
            f"process {place.rank} waited {timeout_s:g} s (distributed.timeout_s) for {place.size} processes to meet "
            f"at {address}: {reason}"
        ) from error
    processes = Processes(place, store, timeout_s)
    processes._start()
    patience_s = FAILED_GOODBYE_S
    try:
        yield processes
        patience_s = GOODBYE_S
    except BaseException as error:
        processes.fail(error)
        if processes.first:
            with suppress(RuntimeError):
                store.set("stopped/0", str(error))
        elif processes.first_failed_alike(error) and isinstance(error, LayerLensError):
            raise ProcessLostError(str(error), error.exit_code, told=True) from error
        raise
    finally:
        processes._leave(patience_s)
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _refuse_backend(wanted: str, device: str, place: Place) -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigurationError(f"this build of torch {torch.__version__} has no torch.distributed; run one process")
    if wanted == "nccl" and device != "cuda":
        raise ConfigurationError(
            f"distributed.backend: nccl needs runtime.device: cuda, got {device}; use gloo, or auto to have it chosen"
        )
    if wanted == "nccl" and not dist.is_nccl_available():
        raise ConfigurationError(f"distributed.backend: torch {torch.__version__} was built without nccl; use gloo")
    if device == "cuda" and place.local_rank >= torch.cuda.device_count():
        raise ConfigurationError(
            f"{place.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; start one for each GPU "
            "(torchrun --nproc-per-node gpu)"
        )
