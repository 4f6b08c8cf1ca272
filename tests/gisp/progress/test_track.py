"""What loops tell, who hears it, and what is shown of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gisp.progress import Progress, doing, phase, reporting, task, track
from gisp.progress.display import FIRST_SECONDS, SECONDS, UNDONE_SECONDS, Bar, Lines, clock, fitting


def test_a_callable_hears_every_unit_and_the_end() -> None:
    heard: list[Progress] = []
    with reporting(heard.append):
        assert list(track("abc", "spelling")) == ["a", "b", "c"]
        with task("thinking"):
            pass
    assert [(p.what, p.done, p.total, p.ended) for p in heard] == [
        *(("spelling", done, 3, False) for done in range(4)),
        ("spelling", 3, 3, True),
        ("thinking", 0, None, False),
        ("thinking", 0, None, True),
    ]
    assert heard[0].left is None and heard[3].left == 0


def test_what_is_under_way_is_known_to_all_threads() -> None:
    assert doing() == ""
    phase("of nothing")
    with task("pruning", 4) as running, reporting(False):
        running.advance()
        phase("select")
        assert doing() == "pruning, 1 of 4 done, select"
        with task("loading a model"):
            assert doing() == "pruning, 1 of 4 done, select; loading a model"
        with pytest.raises(ValueError, match="bad"), task("evaluating", 2):
            raise ValueError("bad")
    assert doing() == ""


def test_what_fails_ends_too() -> None:
    heard: list[Progress] = []
    with reporting(heard.append), pytest.raises(RuntimeError), task("failing", 3):
        raise RuntimeError
    assert heard[-1].ended


def test_the_outermost_decides_unless_told_otherwise() -> None:
    outer: list[Progress] = []
    inner: list[Progress] = []
    with reporting(outer.append):
        with reporting(None):
            list(track([1], "default"))
        with reporting(inner.append):
            list(track([1], "own"))
        with reporting(False):
            list(track([1], "silent"))
            with reporting(None):
                list(track([1], "silent inside"))
    assert {p.what for p in outer} == {"default"} and {p.what for p in inner} == {"own"}


def test_time_left_counts_what_was_done_here() -> None:
    assert Progress("pruning", 30, 40, 20.0, begun=20).left == 20.0


class _Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_lines_come_soon_then_seldom_and_also_in_a_long_step() -> None:
    said: list[str] = []
    now = _Clock()
    lines = Lines(said.append, now=now)
    lines(Progress("pruning", 0, 200, 0.0))
    now.time = FIRST_SECONDS
    lines(Progress("pruning", 1, 200, FIRST_SECONDS))
    assert said == ["pruning 1/200  0:02  6:38 left"]
    lines(Progress("pruning", 2, 200, 3.0, details=("sparsity 0.1",)))
    assert len(said) == 1
    now.time += SECONDS
    lines.look()
    assert said[1:] == ["pruning 2/200  sparsity 0.1  0:13  4:57 left"]
    now.time = 4000.0
    lines.look()
    now.time = 4100.0
    lines.look()
    assert len(said) == 3
    lines(Progress("pruning", 200, 200, 4101.0, ended=True))
    assert said[-1] == "pruning 200/200  1:08:21"


@pytest.mark.parametrize("total", [None, 200])
def test_what_may_yet_be_refused_has_no_line_however_slow_the_machine(total: int | None) -> None:
    said: list[str] = []
    now = _Clock()
    lines = Lines(said.append, now=now)
    # Imports on a busy machine.
    now.time = 10 * UNDONE_SECONDS
    lines(Progress("starting", 0, total, 0.0))
    now.time += UNDONE_SECONDS - 1
    lines.look()
    assert not said
    now.time += 1
    lines.look()
    assert [line.split("  ")[-1] for line in said] == [clock(UNDONE_SECONDS)]


def test_what_just_began_does_not_hide_what_lasts() -> None:
    said: list[str] = []
    now = _Clock()
    lines = Lines(said.append, now=now)
    lines(Progress("comparing sizes", 0, 9, 0.0))
    now.time = UNDONE_SECONDS
    lines(Progress("computing logits", 0, None, 0.0))
    assert said == ["comparing sizes 0/9  0:30"]


def test_what_was_not_spoken_of_ends_without_a_word() -> None:
    said: list[str] = []
    lines = Lines(said.append, now=_Clock())
    lines(Progress("evaluating", 0, 2, 0.0))
    lines(Progress("evaluating", 2, 2, 0.1, ended=True))
    assert not said


def test_every_unit_is_a_line_where_asked() -> None:
    said: list[str] = []
    lines = Lines(said.append, every=True, now=_Clock())
    for done in range(3):
        lines(Progress("pruning", done, 2, float(done)))
    assert [line.split("  ")[0] for line in said] == ["pruning 1/2", "pruning 2/2"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_fits_its_terminal(width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, highlight=False, color_system=None)
    details = ("sparsity 0.4998", "loss 3.1416", "123,456 tokens/s")
    with Bar(console) as bar:
        bar(Progress("pruning", 0, 200, 0.0))
        bar(Progress("pruning", 100, 200, 5400.0, details=details))
        bar._bars.refresh()
        (shown,) = _last_frame(bar, console)
    assert len(shown) <= width and "…" not in shown
    assert "100/200" in shown and "1:30:00 left" in shown and "━" * 5 in shown
    assert ("sparsity 0.4998" in shown) == (width >= 80) and ("tokens/s" in shown) == (width >= 120)


@pytest.mark.parametrize("name", ["a[red]b", "[/b]", "c :smile:"])
def test_names_are_no_markup(name: str) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, highlight=False, emoji=False, color_system=None)
    with Bar(console) as bar:
        bar(Progress(f"loading {name}", 0, None, 0.0))
        assert any(f"loading {name}" in line for line in _last_frame(bar, console))
        bar.say(f"{name} is loaded")
    assert f"{name} is loaded" in text.getvalue()
    assert Bar().console.render_str(name, markup=False).plain == name


def _last_frame(bar: Bar, console: Console) -> list[str]:
    lines: Any = console.render_lines(bar._bars.get_renderable())
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_words_and_times() -> None:
    assert fitting(("one", "two"), 7) == "one" and fitting(("one", "two"), 8) == "one  two" and fitting((), 9) == ""
    assert [clock(s) for s in (0.4, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
