"""The command line before a command runs."""

from __future__ import annotations

import subprocess
import sys

from gisp.cli import main


def test_a_bad_option_is_refused_before_torch_is_imported():
    code = (
        "import sys; from gisp.cli import main; import gisp.config.reference; "
        "print(main(['prune', 'model', '--data', 'x', '--out', 'y', '--ratio', '0.3'])); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n[]\n"


def test_the_version_is_printed(capsys):
    import gisp_kernels

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gisp {gisp_kernels.__version__}\n"
