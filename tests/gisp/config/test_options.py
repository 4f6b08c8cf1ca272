"""Presets, overrides and their errors; what of a stored config goes into another run; the keywords of prune."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

import gisp
from gisp.config.options import OPTIONS, criterion_text, make_config, read_yaml, without_defaults
from gisp.config.reference import help_text
from gisp.errors import GispError


def test_presets_are_the_documented_sets():
    fast, paper, official = (make_config(preset=name) for name in ("fast", "paper", "official"))
    assert (fast.engine, fast.steps, fast.align, fast.ema, fast.sparsity) == ("stream", 200, 16, 0.9, 0.5)
    assert (paper.engine, paper.steps, paper.align, paper.ema, paper.norm) == ("exact", 50, 1, 0.0, "params")
    assert (official.schedule, official.norm, official.ratio) == ("structures", "official", 0.7)
    assert (official.steps, official.sparsity) == (112, None)
    assert (fast.criterion, paper.criterion, official.criterion) == ("second-order", "gisp", "gisp")
    assert (fast.first_order, paper.first_order, official.first_order) == ("shrunk", "plain", "plain")
    assert make_config(preset="paper", criterion="second-order").first_order == "shrunk"
    assert make_config(criterion="gisp").first_order == "plain"
    assert make_config(one_shot=True).first_order == "plain"
    assert criterion_text(fast.to_dict()) == "second-order, first-order term shrunk"
    assert criterion_text(paper.to_dict()) == "gisp"
    gates = make_config(criterion="learned-gates")
    assert (gates.steps, gates.gate_steps, gates.gate_rate, gates.norm, gates.ema) == (1, 1200, 0.02, "none", 0.0)
    assert make_config(preset="official", criterion="learned-gates").schedule == "parameters"
    assert make_config() == fast
    assert make_config(criterion="gisp", sparsity=0.5).criterion == "gisp"


def test_options_override_the_preset_and_none_means_not_given():
    config = make_config(preset="paper", steps=9, align=4, ema=None, sparsity=0.45)
    assert (config.steps, config.align, config.ema, config.sparsity) == (9, 4, 0.0, 0.45)


def test_official_runs_its_whole_ratio_unless_a_sparsity_alone_is_given():
    assert make_config(preset="official", ratio=0.6, sparsity=0.3).sparsity is None
    stopping = make_config(preset="official", sparsity=0.3)
    assert (stopping.sparsity, stopping.ratio) == (0.3, None)
    assert make_config(**stopping.to_dict()) == stopping


def test_a_resolved_config_resolves_to_itself():
    for name in ("fast", "paper", "official"):
        config = make_config(preset=name, seed=3)
        assert make_config(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"engine": "magic"}, "unknown engine 'magic'"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"protect_first": 1.0}, "protect-first is 1.0"),
        ({"speed": 3}, "unknown option 'speed'"),
        ({"steps": "ten"}, "steps is 'ten'"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"seed": 2**50}, "seed is"),
        ({"ratio": 0.6}, r"belongs to --schedule structures \(preset official\)"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"preset": "paper", "fp8": True}, "fp8 goes with one batch"),
        ({"gate_steps": 5}, "--gate-steps 5 belongs to --criterion learned-gates, not second-order"),
        ({"gate_rate": 0.1, "criterion": "flap"}, "--gate-rate 0.1 belongs to --criterion learned-gates, not flap"),
        ({"criterion": "learned-gates", "gate_rate": 0.0}, "gate-rate is 0.0: give more than 0"),
        ({"criterion": "learned-gates", "schedule": "structures"}, "give --schedule parameters, not structures"),
        ({"criterion": "learned-gates", "one_shot": True}, "leave --one-shot out"),
        ({"preset": ["fast"]}, r"unknown preset \['fast'\]"),
        ({"device": 0}, "--device is 0: give a name"),
        ({"batch_size": "many"}, "--batch-size is 'many': give a whole number or auto"),
        *(
            ({name: 10**20}, f"{name.replace('_', '-')} is 10+: give at most")
            for name in ("align", "seq_len", "samples")
        ),
    ],
)
def test_bad_options_name_option_and_value(options, message):
    with pytest.raises(GispError, match=message):
        make_config(**options)


def test_numbers_of_numpy_become_plain_ones():
    config = make_config(sparsity=np.float32(0.25), steps=np.int64(3), fp8=np.bool_(False))
    assert [type(v) for v in (config.sparsity, config.steps, config.fp8)] == [float, int, bool]
    assert (config.sparsity, config.steps) == (0.25, 3)


def test_an_option_that_changes_nothing_may_state_its_default():
    assert make_config(preset="paper", batch_tokens=8192) == make_config(preset="paper")
    assert make_config(batch_size="auto") == make_config()


def test_yaml_takes_dashes_and_refuses_what_is_no_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\nprotect-last: 2\n")
    assert make_config(**read_yaml(path)).protect_last == 2
    unconvertible = ("steps: 2024-13-45", "steps: !!int x", "steps: !!timestamp x", f"steps: {'9' * 5000}", "[" * 3000)
    for text, message in (
        ("- a\n", "must map options"),
        *((bad, "not valid YAML") for bad in ("a: [\n", *unconvertible)),
    ):
        path.write_text(text)
        with pytest.raises(GispError, match=message):
            read_yaml(path)
    with pytest.raises(GispError, match="cannot read config"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({}, {"preset": "official"}),
        ({}, {"preset": "paper"}),
        ({"preset": "official"}, {"preset": "fast"}),
        ({"criterion": "wanda-sp"}, {"criterion": "gisp"}),
        ({"criterion": "random"}, {"criterion": "second-order"}),
        ({"criterion": "block-influence"}, {"criterion": "flap"}),
        ({"criterion": "learned-gates"}, {"criterion": "gisp"}),
        ({}, {"criterion": "learned-gates"}),
        ({}, {"one_shot": True}),
        ({"one_shot": True}, {"criterion": "signed"}),
    ],
)
def test_a_stored_config_gives_way_to_another_preset_or_criterion(made, asked):
    """What a run resolved is not what anyone asked for: only that goes into a run of another kind."""
    own = {"protect_first": 0.3, "seed": 5}
    stored = dataclasses.asdict(make_config(**own, **made))
    stored = {name: value for name, value in stored.items() if value is not None}
    found = make_config(**{**without_defaults(stored, asked), **asked})
    wanted = make_config(**own, **{**made, **asked}, sparsity=stored.get("sparsity"))
    assert found == wanted
    assert without_defaults(stored, {name: stored[name] for name in asked}) == stored
    # What differs from the default was asked for.
    assert without_defaults({**stored, "steps": 17}, asked)["steps"] == 17


def test_keywords_of_prune_are_the_declared_options():
    keywords = inspect.signature(gisp.prune).parameters
    assert all(help_text(option) in str(gisp.prune.__doc__) for option in OPTIONS.values())
    own = ("model", "data", "out", "resume", "on_step", "progress", "process_group", "stages")
    assert tuple(keywords) == (*own, *OPTIONS)
    # Beside the declared type: a loss of the user's own, and "auto".
    wider = {"objective": "str | SequenceLoss | None", "batch_size": "int | str | None"}
    for name, option in OPTIONS.items():
        assert keywords[name].annotation == wider.get(name, f"{option.kind} | None")
        assert keywords[name].default is None
