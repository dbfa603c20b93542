"""What a process gives up before it touches strangers' bytes, and what little of our environment it sees."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
from pathlib import Path

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that stop a program."""
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 15, 38

_PASSED = re.compile(
    r"PATH|LD_LIBRARY_PATH|LD_PRELOAD|LANG|LC_\w+|TZ|HOME|USER|LOGNAME|TMPDIR|XDG_CACHE_HOME|MPLCONFIGDIR|SYSTEMROOT|PYTHONPATH|"
    r"(OMP|GOMP|KMP|MKL|MALLOC|GLIBC|CUDA|NVIDIA|NCCL|TORCH|TORCHINDUCTOR|PYTORCH|TRITON)_\w+"
)
"""Names of variables that a child gets; all others, secrets among them, it does not."""
KEPT_PAGES = {"MALLOC_TRIM_THRESHOLD_": str(1 << 27), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""For glibc: keep the pages of the last file or batch; fetching them anew costs a tenth of a short video."""


def child_environment(**added: str) -> dict[str, str]:
    """The environment of a child: of ours only what is on the list, and `added` where ours says nothing else."""
    kept = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    return {**KEPT_PAGES, "PYTHONSAFEPATH": "1", **added, **kept}


def confine(memory_bytes: int) -> None:
    """From here on: so much more memory at most, no file written, no core dumped, no privileges gained."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    for what, bound in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        lowest = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (lowest, lowest))
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def leave_network() -> bool:
    """Moves into a network namespace without any interface; whether the kernel allowed it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWUSER | _CLONE_NEWNET, _CLONE_NEWNET))


def settle_in(name: str) -> None:
    """A name to be seen by, and a session of its own, so that a Ctrl-C or a signal to our group does not reach it."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def time_limit(seconds: float, cpu_seconds: float = 0.0) -> None:
    """The kernel ends this process after so long, whatever it is doing, with SIGALRM or SIGPROF; 0 takes it back."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
