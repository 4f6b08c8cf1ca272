"""Windows can import what is installed: it lacks modules, signals and functions of Unix."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the documentation of Python says is there on Unix alone.
MODULES = {"crypt", "curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
SIGNALS = {"SIGABRT", "SIGBREAK", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
FUNCTIONS = {
    *("chown", "chroot", "confstr", "ctermid", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid"),
    *("getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "lockf"),
    *("major", "mkfifo", "mknod", "nice", "openpty", "pathconf", "pipe2", "posix_fadvise", "posix_fallocate", "pread"),
    *("pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setgid", "setpgid", "setpriority"),
    *("setsid", "setuid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3", "wait4", "waitid"),
    *("O_ASYNC", "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_DSYNC", "O_NOATIME", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH"),
    *("O_SYNC", "O_TMPFILE", "WNOHANG", "WIFEXITED", "WEXITSTATUS"),
}
# Behind a file of /proc, which is read first, and where there is a SIGTSTP to be handled.
BEHIND = {
    ("python/gisp/replicas/signs.py", "os.sysconf"),
    *(("python/gisp/replicas/launch.py", name) for name in ("signal.SIGSTOP", "signal.SIGCONT")),
    *(("python/gisp/replicas/launch.py", name) for name in ("os.getpgid", "os.killpg")),
}


def of_unix(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what only Unix has, but for imports that may fail and what ``hasattr`` looked for."""
    tried, looked = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type or node) for h in node.handlers):
            tried |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            looked.add(".".join(ast.unparse(argument).strip("'") for argument in node.args))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in tried:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name, of = node.attr, node.value.id
            lacks = (of == "os" and name in FUNCTIONS) or (
                of == "signal" and name.startswith("SIG") and name not in SIGNALS
            )
            if lacks and f"{of}.{name}" not in looked:
                yield node.lineno, f"{of}.{name}"


@pytest.mark.parametrize("folder", ["gisp_kernels", "python/gisp"])
def test_nothing_of_unix_alone_is_named(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} names {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in of_unix(ast.parse(path.read_text(encoding="utf-8")))
        if (path.relative_to(ROOT).as_posix(), name) not in BEHIND
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import signal\nX = signal.SIGHUP", ["signal.SIGHUP"]),
        ("import fcntl", ["fcntl"]),
        ("def f():\n    from resource import getrusage", ["resource"]),
        ("import os\nos.fork()", ["os.fork"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("import os\nX = os.getloadavg() if hasattr(os, 'getloadavg') else 0", []),
        ("import signal\nX = signal.SIGINT, signal.SIG_DFL", []),
    ],
)
def test_names_are_found(text: str, names: list[str]) -> None:
    assert [name for _, name in of_unix(ast.parse(text))] == names
