"""What a declared option is: its type, its range and its help, each written once beside the field it declares.

The fields of a dataclass are declared by :func:`option`. Checks, command-line flags and the reference follow from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from gisp.errors import GispError, quoted

# Far above any sensible count and far below what overflows a tensor of them.
LARGEST = 2**31 - 1
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a name"),
    "bool": ((bool,), "true or false"),
}


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as a plain number: what is stored is JSON and YAML. Anything else is as it was."""
    return value.item() if hasattr(value, "dtype") and not getattr(value, "shape", True) else value


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the field; the flag has dashes.
        kind: ``int``, ``float``, ``str`` or ``bool``.
        default: value of an option that is not given; ``None`` where others or the data decide it.
        help: one sentence.
        choices: values a text may have, with what each means where the mapping holds that.
        open: whether a name with a dot (a Python function's) is a choice too.
        auto: whether the text ``auto`` stands for an option that is not given.
        least, above, below: bounds of a number.
        bare: the value of the flag where none follows it; empty where one must.
        unset: what happens for a default of ``None``, in words.
        group: heading of the help that it stands under.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    open: bool = False
    auto: bool = False
    least: int | None = None
    above: int | None = None
    below: int | None = None
    bare: str = ""
    unset: str = ""
    group: str = ""

    @property
    def flag(self) -> str:
        """As the command line calls it."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> None:
        """Refuse a value of another type or out of range.

        Raises:
            GispError: names the option, the value and what is allowed.
        """
        types, what = _KINDS[self.kind]
        if self.choices:
            if not isinstance(value, str) or not (value in self.choices or (self.open and "." in value)):
                raise GispError(f"unknown {self.name} {quoted(value)}: choose one of {', '.join(self.choices)}")
        elif not isinstance(value, types) or isinstance(value, bool) != (self.kind == "bool"):
            raise GispError(f"{self.flag} is {quoted(value)}: give {what}{' or auto' if self.auto else ''}")
        elif self.kind in ("int", "float"):
            self._check_range(value)

    def _check_range(self, value: Any) -> None:
        bounds = {
            # Written so that NaN is out of every bound.
            f"more than {self.above}": self.above is None or value > self.above,
            f"at least {self.least}": self.least is None or value >= self.least,
            f"less than {self.below}": self.below is None or value < self.below,
            f"at most {LARGEST}": self.kind != "int" or value <= LARGEST,
        }
        missed = [bound for bound, kept in bounds.items() if not kept]
        if missed:
            raise GispError(f"{self.flag} is {quoted(value)}: give {' and '.join(missed)}")


def option(help: str, default: Any = MISSING, *, choices: Iterable[str] = (), **declared: Any) -> Any:
    """A dataclass field that is an option; the arguments are the attributes of :class:`Option`."""
    named = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    return dataclasses.field(default=default, metadata={"help": help, "choices": named, **declared})


def declared_options(holder: type) -> dict[str, Option]:
    """Name -> option of every field of a dataclass made of :func:`option`."""
    found = {}
    for field in dataclasses.fields(holder):
        default = None if field.default is MISSING else field.default
        found[field.name] = Option(field.name, str(field.type).split(" ")[0], default, **field.metadata)
    return found
