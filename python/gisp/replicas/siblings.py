"""Looks at other processes of this host, and ends one of the same launcher that no longer listens.

One that is stopped, or waits inside a driver, does not hear the launcher's TERM. The launcher of ``torch.distributed``
sends KILL half a minute later, and nothing makes it wait for less.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gisp.replicas.environment import launched

# Of /proc/PID/stat, behind the name in brackets: when the process started. A number alone may be another's by then.
_START = "open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[19]"
_END = f"""
import os, sys, time
pid, start, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
time.sleep(seconds)
if {_START} == start:
    os.kill(pid, 9)
"""


def this_process() -> dict[str, Any]:
    """What others need to end this one, JSON; without a start where the system does not tell it."""
    try:
        start = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "launcher": os.getppid(), "start": start}


def state_of(process: Mapping[str, Any]) -> str:
    """``gone``, ``stopped`` or ``runs``; empty of a process that cannot be seen from here."""
    if not process["start"] or process["host"] != socket.gethostname():
        return ""
    try:
        found = Path(f"/proc/{process['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "gone"
    if found[19] != process["start"] or found[0] in "ZX":
        return "gone"
    return "stopped" if found[0] in "Tt" else "runs"


def children() -> list[int]:
    """Numbers of the processes that this one has started and that are there; none where the system does not tell."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            if int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def end_sibling(process: Mapping[str, Any], seconds: float) -> None:
    """Kill a process in so many seconds, if the launcher of this one has started it too and it is still there.

    A process of its own does that: this one has ended by then, and its exit code is the one that counts.
    """
    here = this_process()
    if not launched() or not process["start"] or any(process[name] != here[name] for name in ("host", "launcher")):
        return
    given = (str(process["pid"]), str(process["start"]), str(seconds))
    quiet = subprocess.DEVNULL
    subprocess.Popen(
        [sys.executable, "-IS", "-c", _END, *given], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )
