"""A run of several processes ends in words when one of them dies.

JAX lets all processes share the fate of one that dies: its coordination client notices, from a C++
thread, and aborts the process. Whether that, or an error from the collective under way, comes first
is a race, and the abort cannot be caught within the process (as of JAX 0.10 a
``missed_heartbeat_callback`` in Python ends in ``std::bad_cast``). So the process forks before JAX
starts: the child trains, the parent waits and puts into words how the child ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings

# What the coordination client logs before it aborts, since 2021.
FATE_SHARED = b"the JAX distributed service detected fatal errors"
GO_ON = "Start all processes again with --resume."
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def supervise(prog: str) -> int | None:
    """Fork. Returns None in the child, which is to train; its exit code in the parent, once ended.

    Elsewhere than on Linux, or in a process that already has threads of Python's, nothing is forked
    and None returned: the run then ends as JAX ends it.

    Args:
        prog: the name before messages, such as "msdspn train".
    """
    if not sys.platform.startswith("linux") or threading.active_count() > 1:
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 warns of OpenBLAS's threads, which survive a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(parent, writing)
        return None
    os.close(writing)
    return _watch(prog, child, reading)


def _be_child(parent: int, log: int) -> None:
    import ctypes

    # A group of its own: Ctrl-C reaches it once, through the parent, and not twice.
    os.setpgid(0, 0)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Python goes on writing to the terminal; what C++ logs goes through the parent.
    sys.stderr = os.fdopen(
        os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )
    os.dup2(log, 2)
    os.close(log)


def _watch(prog: str, child: int, log: int) -> int:
    """Pass signals to the child and its log to stderr; returns the exit code."""

    def forward(number, frame):
        del frame
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for name in _FORWARDED:
        signal.signal(getattr(signal, name), forward)
    kept: list[bytes] = []
    reader = threading.Thread(target=_pass_on, args=(log, kept), daemon=True)
    reader.start()
    _, status = os.waitpid(child, 0)
    # The pipe may outlive the child in a process that it left behind.
    reader.join(timeout=5)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        code, message = explained(-code, b"".join(kept))
        print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return code


def explained(number: int, log: bytes) -> tuple[int, str]:
    """Exit code and message for a process ended by a signal.

    Args:
        number: the signal.
        log: what it logged from the line with `FATE_SHARED` on.
    """
    name = signal.Signals(number).name
    if number == signal.SIGABRT and FATE_SHARED in log:
        text = log.decode(errors="replace").partition("absl::Status: ")[2]
        # One line, or one that announces the next: the processes that are gone.
        first, _, rest = text.partition("\n")
        reason = f"{first} {rest.partition(chr(10))[0]}" if first.endswith(":") else first
        return 2, f"another process is gone: {reason[:300]}\n{GO_ON}"
    hint = {
        signal.SIGABRT: ": an error inside JAX or a library, which may be logged above",
        signal.SIGKILL: ": out of memory, or someone asked for it",
    }.get(signal.Signals(number), "")
    return 128 + number, f"the training process was ended by {name}{hint}.\n{GO_ON}"


def _pass_on(log: int, kept: list[bytes]) -> None:
    """Copy lines to stderr, up to the one that begins JAX's farewell; keep what follows."""
    with os.fdopen(log, "rb") as lines:
        for line in lines:
            if kept or FATE_SHARED in line:
                kept.append(line)
            else:
                os.write(2, line)
