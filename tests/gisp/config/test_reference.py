"""The reference of all options."""

from __future__ import annotations

from gisp.cli import main
from gisp.config.options import OPTIONS
from gisp.config.reference import help_text, markdown


def test_every_option_has_a_flag_and_a_line_of_help(capsys):
    assert main(["prune", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in OPTIONS.values():
        assert option.flag in shown
        assert f"| `{option.flag}` | {help_text(option)} |" in markdown()
    assert "default fast: 200, paper: 50, official: 112" in help_text(OPTIONS["steps"])
    assert "default fast: on, paper and official: off" in help_text(OPTIONS["keep_minimum"])
    assert "(whole key/value heads, so that the cache shrinks)" in help_text(OPTIONS["gqa"])
