"""Peak memory of a stretch of work: what the accelerator allocated, or the resident set of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


class PeakMemory:
    """Starts to watch when made; ``gb()`` is the peak since then, in GB (1e9 bytes), and ``source`` says of what."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self._cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            self.source = "peak allocated on the GPU"
            return
        try:
            _CLEAR.write_text("5")  # resets the high-water mark of the resident set (proc(5))
            self.source = "peak resident set of the process"
        except OSError:  # not Linux, or not allowed: the mark of the whole process stays
            self.source = "peak resident set of the process since its start"

    def gb(self) -> float:
        """The peak so far."""
        if self._cuda is not None:
            return 1e-9 * float(self._cuda.max_memory_allocated())
        try:
            for line in _STATUS.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return 1e-9 * 1024 * int(line.split()[1])
        except OSError:
            pass
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
        return 1e-9 * unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """Memory of this process that is resident now; where the system does not say, its peak so far."""
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return int(1e9 * PeakMemory().gb())


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
