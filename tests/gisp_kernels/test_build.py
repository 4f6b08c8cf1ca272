"""The build: what is compiled when, what is said when it is not, and what the compiled core contains."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from setuptools import Distribution, Extension

from gisp_kernels import _ext
from gisp_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
ALL = ("c++", "cmake", "nvcc", "ninja")


@pytest.fixture(scope="module")
def helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gisp_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gisp_setup"] = module
    spec.loader.exec_module(module)
    return module


def which(*programs: str):
    return lambda name: f"/bin/{name}" if name in programs else None


@pytest.mark.parametrize(
    ("mode", "programs", "core", "cuda", "reason"),
    [
        (None, ALL, True, True, None),
        ("auto", ("g++", "cmake"), True, False, None),
        ("auto", ("clang++", "cmake", "nvcc"), True, True, None),
        ("auto", ("cmake", "nvcc"), False, False, "a C++ compiler not found"),
        ("auto", ("g++",), False, False, "cmake not found"),
        ("auto", (), False, False, "a C++ compiler and cmake not found"),
        ("0", ALL, False, False, "GISP_BUILD_EXT=0 was set"),
        ("1", ALL, True, True, None),
    ],
)
def test_decision(
    helper: ModuleType, mode: str | None, programs: tuple[str, ...], core: bool, cuda: bool, reason: str | None
) -> None:
    environ = {} if mode is None else {"GISP_BUILD_EXT": mode}
    plan = helper.decide(environ, which(*programs))
    assert (plan.core, plan.cuda, plan.reason) == (core, cuda, reason)
    assert plan.required == (mode == "1")


def test_decision_refuses(helper: ModuleType) -> None:
    with pytest.raises(SystemExit, match="GISP_BUILD_EXT=1, but cmake not found"):
        helper.decide({"GISP_BUILD_EXT": "1"}, which("g++"))
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        helper.decide({"GISP_BUILD_EXT": "yes"}, which(*ALL))


def test_decision_follows_named_compilers(helper: ModuleType) -> None:
    plan = helper.decide({"CXX": "/opt/cxx -m64", "CUDACXX": "/opt/nvcc"}, which("/opt/cxx", "/opt/nvcc", "cmake"))
    assert plan.core and plan.cuda
    plan = helper.decide({"CXX": "nocxx"}, which(*ALL))
    assert plan.reason == "a C++ compiler (CXX=nocxx) not found"


def test_cmake_commands_carry_no_flags(helper: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    configure, build = helper.cmake_commands(ROOT, tmp_path / "b", tmp_path / "o", cuda=True, ninja=True)
    assert configure[configure.index("-G") + 1] == "Ninja"
    assert "-DGISP_CUDA=ON" in configure
    assert f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path / 'o'}" in configure
    assert not any("arch" in part.lower() or "flags" in part.lower() for part in configure)
    assert build[:2] == ["cmake", "--build"]
    without = helper.cmake_commands(ROOT, tmp_path, tmp_path, cuda=False, ninja=False)[0]
    assert "-G" not in without
    assert "-DGISP_CUDA=OFF" in without


@pytest.fixture
def command(helper: ModuleType, tmp_path: Path):
    """A build_ext command whose cmake always fails, writing below ``tmp_path``."""
    command = helper.CMakeBuild(Distribution({"name": "x", "ext_modules": []}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.extensions, command.inplace = [], False
    (tmp_path / "lib" / "gisp_kernels").mkdir(parents=True)
    return command


@pytest.mark.parametrize("required", [False, True])
def test_failed_build(
    helper: ModuleType, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    pytest.importorskip("pybind11")

    def fail(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    fake = SimpleNamespace(run=fail, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(helper, "subprocess", fake)
    monkeypatch.setattr(helper, "PLAN", helper.Plan(core=True, required=required))
    extension = Extension("gisp_kernels._core", sources=[])
    note = tmp_path / "lib" / "gisp_kernels" / helper.NOTE
    if required:
        with pytest.raises(subprocess.CalledProcessError):
            command.build_extension(extension)
        assert not note.exists()
    else:
        command.build_extension(extension)
        assert extension.optional
        reason = json.loads(note.read_text())["reason"]
        assert reason == "building it failed: 'cmake --fresh' exited with status 1"


def test_version_has_one_home(helper: ModuleType) -> None:
    assert helper.read_version() == __version__


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    _ext._load.cache_clear()
    yield
    _ext._load.cache_clear()


def test_missing_core_says_why(
    helper: ModuleType, fresh_loader: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_ext.importlib, "import_module", absent)
    monkeypatch.setattr(_ext, "BUILD_NOTE", tmp_path / helper.NOTE)
    helper.write_note(tmp_path, "cmake not found")
    info = _ext.build_info()
    assert info["core"] is False and info["cuda"] is False and info["cuda_archs"] == []
    assert info["compiler"] is None and info["nvcc"] is None
    assert info["reason"] == "the compiled core was not built: cmake not found"
    assert _ext.why_not("cpu") == info["reason"]
    with pytest.raises(RuntimeError, match="cmake not found"):
        _ext.core()
    helper.write_note(tmp_path, None)
    _ext._load.cache_clear()
    assert "GISP_BUILD_EXT=1" in str(_ext.why_not("cpu"))


def test_broken_core_says_why(fresh_loader: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libstdc++.so.6: version not found")

    monkeypatch.setattr(_ext.importlib, "import_module", broken)
    assert _ext.why_not("cuda") == "the compiled core does not load: libstdc++.so.6: version not found"


def test_cuda_needs_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_load", lambda: (SimpleNamespace(cuda=False), None))
    assert _ext.why_not("cpu") is None
    assert _ext.why_not("cuda") == "the compiled core was built without CUDA (no nvcc)"
    assert "device type 'mps'" in str(_ext.why_not("mps"))


def test_build_info() -> None:
    info = _ext.build_info()
    assert set(info) == {
        "version", "core", "reason", "cuda", "cuda_archs", "sm90", "compiler", "nvcc", "torch", "triton"
    }  # fmt: skip
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["core"] == (info["reason"] is None)
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["nvcc"] is not None)


def test_import_does_not_load_the_core() -> None:
    code = (
        "import sys, torch, gisp_kernels.compaction.compactor, gisp_kernels.ops.swap;"
        "assert 'gisp_kernels._core' not in sys.modules;"
        "assert not torch.cuda.is_initialized();"
        "from gisp_kernels._ext import build_info; build_info();"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def find_cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return shutil.which("cuobjdump")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def architectures(binary: Path) -> set[str]:
    """What machine code a binary holds."""
    program = find_cuobjdump()
    assert program is not None
    dump = subprocess.run([program, binary], capture_output=True, text=True, check=True)
    return {line.split("=")[1].strip() for line in dump.stdout.splitlines() if line.startswith("arch =")}


@pytest.mark.skipif(not _ext.build_info()["cuda"], reason="the core was not built with CUDA")
@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump")
def test_binary_holds_the_named_architectures() -> None:
    named = _ext.build_info()["cuda_archs"]
    assert {"sm_80", "sm_90a"} <= set(named)
    assert {arch for arch in named if arch.startswith("sm_")} == architectures(Path(str(_ext.core().__file__)))


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nvcc")), reason="needs cmake and nvcc")
@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump")
def test_core_compiles_for_every_architecture(tmp_path: Path) -> None:
    """Ampere, Hopper and, where nvcc knows it, Blackwell; no GPU is needed."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", version).groups()))  # type: ignore[union-attr]
    build(tmp_path, "-DGISP_CUDA=ON")
    (library,) = tmp_path.rglob("libgisp_core.a")
    assert architectures(library) == {"sm_80", "sm_90a"} | ({"sm_100"} if release >= (12, 8) else set())


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_core_alone(tmp_path: Path) -> None:
    """The core compiles without Python, torch or CUDA and passes its own test program."""
    build(tmp_path, "-DGISP_TESTS=ON")
    subprocess.run([tmp_path / "gisp_tests"], check=True)


def build(folder: Path, option: str) -> None:
    """Compile the core without Python."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DGISP_PYTHON=OFF", option, *generator]
    for step in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
