"""Flags of commands that are declared elsewhere, once: a command takes them as ``**keywords``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from gisp.config.declare import Option
from gisp.errors import GispError, quoted

Command = TypeVar("Command", bound=Callable[..., None])


def flag(
    name: str,
    help: str,
    *,
    kind: Any = str,
    panel: str | None = None,
    names: Sequence[str] = (),
    **settings: Any,
) -> inspect.Parameter:
    """A flag that is ``None`` where it is not given.

    Args:
        names: as typer takes them, if not ``--name`` (and ``--no-name``).
        settings: further arguments of ``typer.Option``.
    """
    dashed = name.replace("_", "-")
    usual = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    info = typer.Option(*(names or (usual,)), help=help, rich_help_panel=panel, **settings)
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def flag_text(name: str, value: Any) -> str:
    """A flag as it was typed."""
    dashed = f"--{name.replace('_', '-')}"
    return dashed if value is True else f"{dashed} {value}"


def with_flags(flags: Sequence[inspect.Parameter]) -> Callable[[Command], Command]:
    """Give a command that ends with ``**keywords`` these flags in their place."""

    def give(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return command

    return give


def with_bare_values(arguments: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Arguments of a command with a value after every flag that may stand alone and does."""
    alone = {option.flag: option for option in options if option.bare}
    found = []
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option = alone.get(given)
        bare = option is not None and following not in option.choices
        found.append(f"{given}={option.bare}" if option and bare else given)
    return found


def numbers(text: str) -> list[float]:
    """The value of ``--sparsities``.

    Raises:
        GispError: it holds something else than numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise GispError(
            f"--sparsities is {quoted(text)}: give numbers with commas between them, as 0.2,0.3,0.5"
        ) from None
