"""What every option means, as text: ``python -m gisp.config.reference`` prints Markdown for the documentation."""

from __future__ import annotations

from typing import Any

from gisp.config.declare import Option
from gisp.config.options import OPTIONS, PRESETS


def default_text(option: Option) -> str:
    """The value of an option that is not given; by preset where presets differ."""
    presets: dict[Any, list[str]] = {}
    for name, values in PRESETS.items():
        if option.name in values:
            presets.setdefault(_word(values[option.name]), []).append(name)
    if presets:
        return ", ".join(f"{' and '.join(names)}: {value}" for value, names in presets.items())
    return option.unset or _word(option.default)


def help_text(option: Option) -> str:
    """Help, choices and default in one sentence."""
    choices = [
        f"{name} ({meaning})" if meaning and isinstance(meaning, str) else name
        for name, meaning in option.choices.items()
    ]
    listed = f": {', '.join(choices)}" if choices else ""
    return f"{option.help}{listed}; default {default_text(option)}."


def markdown() -> str:
    """All options, a table for every group."""
    lines = []
    for group in dict.fromkeys(option.group for option in OPTIONS.values()):
        lines += [f"## {group or 'Options'}", "", "| option | meaning |", "|---|---|"]
        lines += [f"| `{o.flag}` | {help_text(o)} |" for o in OPTIONS.values() if o.group == group]
        lines.append("")
    return "\n".join(lines)


def with_options(docstring: str) -> str:
    """The docstring of a function that takes all options as keywords, with what each of them means at its end."""
    listed = "".join(f"        {option.name}: {help_text(option)}\n" for option in OPTIONS.values())
    return f"{docstring.rstrip()}\n\n    Options:\n{listed}    "


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(markdown(), end="")
