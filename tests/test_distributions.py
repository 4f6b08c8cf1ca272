"""What users install: kernels that need torch alone, the driver tied to them, both from one checkout."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from gisp_kernels._version import __version__

pytest.importorskip("build", reason="needs build: pip install build")
ROOT = Path(__file__).resolve().parents[1]
# What a distribution is made of; the folders that builds write stay out of the checkout.
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "CHANGELOG.md", "README.md", "LICENSE")
FOLDERS = ("csrc", "gisp_kernels", "python")
KERNELS, DRIVER = f"gisp_kernels-{__version__}", f"gisp-{__version__}"
FILES = "import gisp, gisp_kernels; print(gisp.__file__, gisp_kernels.__file__)"
SCORE = """
import torch
from torch import nn
import gisp_kernels as gk
up, down = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
group = gk.StructureGroup("mlp", (gk.Projection(up, "row"), gk.Projection(down, "column")))
with gk.record_importance([group]) as recorder:
    down(up(torch.ones(2, 3))).square().sum().backward()
scores = recorder.scores()["mlp"]
assert scores.shape == (4,) and (scores > 0).all(), scores
gk.Compactor([group]).remove({"mlp": scores.argsort()[:2]})
assert up.weight.shape == (2, 3) and down.weight.shape == (3, 2)
info = gk.build_info()
assert info["reason"] == "the compiled core was not built: GISP_BUILD_EXT=0 was set", info
print(gk.__file__)
"""


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed, seeing nothing of this process's paths."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "GISP_"))}
    done = subprocess.run(list(map(str, command)), env={**kept, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, "docs/kernels.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "build", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distributions of both packages, and wheels built from them without a compiler."""
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out)
    for source in (checkout, checkout / "python"):
        run(*command, source, GISP_BUILD_EXT="0")
    return out


def wheel(dist: Path, name: str) -> Path:
    (found,) = dist.glob(f"{name}-*.whl")
    return found


def requirements(path: Path) -> list[str]:
    """What a wheel always needs."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode())
    return [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]


def closure(names: list[str]) -> set[metadata.Distribution]:
    """Installed distributions that the named ones need, themselves included; what is not installed is left out."""
    found: dict[str, metadata.Distribution] = {}
    while names:
        name = re.split(r"[^\w.-]", names.pop())[0]
        if name not in found:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            names += [line for line in found[name].requires or () if "extra ==" not in line]
    return set(found.values())


@pytest.fixture
def environment(tmp_path: Path):
    """Makes a virtual environment that sees only the given folder of packages beside its own."""

    def make(packages: Path) -> Path:
        run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
        python = tmp_path / "venv" / "bin" / "python"
        purelib = run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        (Path(purelib) / "beside.pth").write_text(f"{packages}\n")
        return python

    return make


def install(python: Path, *what: str | Path, **environ: str) -> None:
    run(sys.executable, "-m", "pip", "--isolated", "--python", python, "install", "--no-index", *what, **environ)


def test_contents(dist: Path) -> None:
    kernels = set(zipfile.ZipFile(wheel(dist, KERNELS)).namelist())
    driver = set(zipfile.ZipFile(wheel(dist, DRIVER)).namelist())
    assert {"gisp_kernels/py.typed", "gisp_kernels/ops/importance.py", "gisp_kernels/_build.json"} <= kernels
    assert {"gisp/py.typed", "gisp/demo/decoder/model.safetensors", "gisp/report/page.html"} <= driver
    assert {"gisp/export/cards/hf.md", f"{DRIVER}.dist-info/entry_points.txt"} <= driver
    assert {name.split("/")[0] for name in kernels} == {"gisp_kernels", f"{KERNELS}.dist-info"}
    assert {name.split("/")[0] for name in driver} == {"gisp", f"{DRIVER}.dist-info"}
    for name, names in ((KERNELS, kernels), (DRIVER, driver)):
        assert f"{name}.dist-info/licenses/LICENSE" in names
    with tarfile.open(dist / f"{KERNELS}.tar.gz") as archive:
        held = archive.getnames()
        assert f"{KERNELS}/csrc/include/gisp/swap.h" in held and f"{KERNELS}/CMakeLists.txt" in held
        assert not {"python", "tests", "benchmarks"} & {name.split("/")[1] for name in held if "/" in name}
    with tarfile.open(dist / f"{DRIVER}.tar.gz") as archive:
        # What links to the checkout's own files is a file here.
        for name in ("LICENSE", "README.md"):
            assert archive.getmember(f"{DRIVER}/{name}").isreg()


def test_versions_are_locked(dist: Path) -> None:
    assert requirements(wheel(dist, KERNELS)) == ["torch>=2.8", 'triton>=3.4; sys_platform == "linux"']
    assert f"gisp-kernels=={__version__}" in requirements(wheel(dist, DRIVER))


def test_kernels_need_torch_alone(dist: Path, environment, tmp_path: Path) -> None:
    """Neither numpy nor anything of the driver is there, and pip finds nothing missing."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for distribution in closure(requirements(wheel(dist, KERNELS))):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    python = environment(packages)
    install(python, wheel(dist, KERNELS))
    done = run(python, "-I", "-X", "importtime", "-c", "import torch, gisp_kernels")
    lines = [line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    # What is tried beside torch: the package itself and the standard library.
    added = {name.split(".")[0] for name in lines[lines.index("torch") + 1 :]}
    assert added - {"torch"} - set(sys.stdlib_module_names) == {"gisp_kernels"}
    found = run(python, "-I", "-c", SCORE).stdout
    assert str(tmp_path / "venv") in found


def test_both_wheels(dist: Path, environment, tmp_path: Path) -> None:
    python = environment(Path(sysconfig.get_path("purelib")))
    install(python, "--no-deps", wheel(dist, KERNELS), wheel(dist, DRIVER))
    assert run(python.parent / "gisp", "--version").stdout == f"gisp {__version__}\n"
    found = run(
        python, "-I", "-c", "import gisp.demo, gisp_kernels; print(gisp.demo.__file__, gisp_kernels.__file__)"
    ).stdout
    assert found.count(str(tmp_path / "venv")) == 2


def test_checkout_installs_editable_in_one_command(checkout: Path, environment) -> None:
    python = environment(Path(sysconfig.get_path("purelib")))
    both = ("--editable", checkout, "--editable", checkout / "python")
    install(python, "--no-deps", "--no-build-isolation", *both, GISP_BUILD_EXT="0")
    found = run(
        python, "-I", "-c", "import gisp, gisp_kernels; print(gisp.__file__, gisp_kernels.__file__)"
    ).stdout.split()
    assert found == [str(checkout / "python" / "gisp" / "__init__.py"), str(checkout / "gisp_kernels" / "__init__.py")]
    assert run(python.parent / "gisp", "--version").stdout == f"gisp {__version__}\n"


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_wheel_without_nvcc_has_the_core_for_cpus(dist: Path, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pip = (sys.executable, "-m", "pip", "--isolated", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", tmp_path, dist / f"{KERNELS}.tar.gz", GISP_BUILD_EXT="1", CUDACXX="no-nvcc-here")
    with zipfile.ZipFile(wheel(tmp_path, KERNELS)) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import json, gisp_kernels as g; print(json.dumps(g.build_info()))"
    )
    info = json.loads(run(sys.executable, "-I", "-c", code, tmp_path / "installed").stdout)
    assert info["core"] and info["reason"] is None and not info["cuda"]
