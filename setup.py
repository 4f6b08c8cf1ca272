"""The kernels' version and optional compiled core; the rest is in pyproject.toml, compiler flags in CMakeLists.txt.

``GISP_BUILD_EXT``: ``auto`` (default) compiles the core when a C++ compiler and cmake are there and otherwise
installs pure Python, with the reason in ``gisp_kernels.build_info()``; ``1`` fails when it cannot; ``0`` skips it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NOTE = "_build.json"
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Plan:
    """What to compile: the core, its CUDA kernels, and otherwise why not."""

    core: bool
    cuda: bool = False
    required: bool = False
    reason: str | None = None


def decide(environ: Mapping[str, str], which: Callable[[str], str | None]) -> Plan:
    """The plan for an environment; ``which`` finds programs.

    Raises:
        SystemExit: an unknown ``GISP_BUILD_EXT``, or a demanded core that cannot be compiled.
    """
    mode = environ.get("GISP_BUILD_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"GISP_BUILD_EXT must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return Plan(core=False, reason="GISP_BUILD_EXT=0 was set")
    missing = []
    compiler = environ.get("CXX", "").split()
    if not (which(compiler[0]) if compiler else any(which(name) for name in COMPILERS)):
        missing.append("a C++ compiler" + (f" (CXX={environ['CXX']})" if compiler else ""))
    if not which("cmake"):
        missing.append("cmake")
    if missing:
        reason = f"{' and '.join(missing)} not found"
        if mode == "1":
            raise SystemExit(f"GISP_BUILD_EXT=1, but {reason}")
        return Plan(core=False, reason=reason)
    return Plan(core=True, cuda=which(environ.get("CUDACXX", "nvcc")) is not None, required=mode == "1")


def write_note(folder: Path, reason: str | None) -> None:
    """Leave the reason for a missing core beside the package's modules, or remove an outdated one."""
    if reason is None:
        (folder / NOTE).unlink(missing_ok=True)
    elif folder.is_dir():
        (folder / NOTE).write_text(json.dumps({"reason": reason}) + "\n", encoding="utf-8")


def cmake_commands(source: Path, build: Path, output: Path, cuda: bool, ninja: bool) -> list[list[str]]:
    """Configure and build commands."""
    import pybind11

    # --fresh: a cache from an isolated build names programs that no longer exist.
    configure = ["cmake", "--fresh", "-S", str(source), "-B", str(build)]
    configure += ["-G", "Ninja"] if ninja else []
    configure += [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        f"-DGISP_CUDA={'ON' if cuda else 'OFF'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    return [configure, ["cmake", "--build", str(build), "--config", "Release"]]


def describe(error: Exception) -> str:
    """One short line; the output of the failed program is in the build log."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"'{' '.join(error.cmd[:2])}' exited with status {error.returncode}"
    return str(error)


class CMakeBuild(build_ext):
    """Hands the extension to CMake; in ``auto`` mode a failed build becomes a pure Python install with a reason."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") is not None
        try:
            for command in cmake_commands(ROOT, build, output, PLAN.cuda, ninja):
                subprocess.run(command, check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if PLAN.required:
                raise
            reason = f"building it failed: {describe(error)}"
            self.warn(f"gisp-kernels: the compiled core is left out; {reason}")
            # An editable install copies the module it expects, unless it is optional.
            ext.optional = True
            write_note(output, reason)
        else:
            write_note(output, None)


class PackageModules(build_py):
    """Adds the reason for a missing core to what is installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_note(Path(self.build_lib) / "gisp_kernels", PLAN.reason)


def read_version() -> str:
    text = (ROOT / "gisp_kernels" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', text)
    if match is None:
        raise SystemExit("gisp_kernels/_version.py holds no __version__")
    return match.group(1)


PLAN = decide(os.environ, shutil.which)

if __name__ == "__main__":
    setup(
        version=read_version(),
        ext_modules=[Extension("gisp_kernels._core", sources=[])] if PLAN.core else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": PackageModules},
    )
