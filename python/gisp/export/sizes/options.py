"""Formats of an export, the sizes they round to, and their checks, which need no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gisp.config.evaluation import check_stride, is_whole
from gisp.errors import GispError, quoted


@dataclass(frozen=True)
class SizeOptions:
    """Sizes asked for; ``None`` = not asked for.

    Attributes:
        round_mlp: MLP widths are multiples of it.
        align_heads: numbers of query heads are multiples of it (tensor parallelism).
        min_heads: fewest query heads of a layer.
    """

    round_mlp: int | None = None
    align_heads: int | None = None
    min_heads: int | None = None

    def given(self) -> dict[str, int]:
        """The options asked for, by name.

        Raises:
            GispError: a value below 1.
        """
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in values.items():
            if not is_whole(value) or value < 1:
                raise GispError(f"{option_text({name: value})}: give 1 or more")
        return values


def option_text(options: dict[str, int]) -> str:
    """Options as they are typed: ``--round-mlp 64 --align-heads 4``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        home: ``module:function`` that writes it; imported when it is asked for.
        about: what it is, in a few words.
        loading: lines of code or a command that load it; ``{path}`` is the folder and ``{file}`` its GGUF file.
        sizes: the options of :class:`SizeOptions` it follows.
        adds_biases: whether it holds output biases that the base model has not.
    """

    home: str
    about: str
    loading: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    adds_biases: bool = False

    @property
    def writer(self) -> Callable[..., Any]:
        """Writes a base model and a spec, and returns the report of it."""
        module, name = self.home.split(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


_STOCK = ("load: AutoModelForCausalLM.from_pretrained({path}), as any model of its kind",)
FORMATS = {
    "hf": Format(
        "gisp.export.formats.hf:export_hf",
        "layers differ in size",
        (
            "load: gisp.load({path})",
            "load without gisp: AutoModelForCausalLM.from_pretrained({path}, trust_remote_code=True), "
            "transformers 5.14",
        ),
        sizes=("round_mlp", "align_heads", "min_heads"),
        adds_biases=True,
    ),
    "gguf": Format(
        "gisp.export.formats.gguf.write:export_gguf",
        "for llama.cpp, layers differ in size",
        ("load: llama-cli -m {file}",),
        sizes=("round_mlp",),
    ),
    "uniform": Format(
        "gisp.export.formats.uniform:export_uniform",
        "one size for all layers, a stock checkpoint",
        _STOCK,
        sizes=("round_mlp", "align_heads", "min_heads"),
    ),
    "masked": Format("gisp.export.formats.masked:export_masked", "dense shapes, removed structures are zero", _STOCK),
}


def check_options(format: str, sizes: SizeOptions, dtype: str | None, data: str | None, window: int | None) -> None:
    """Refuse what does not go together.

    Args:
        data, window: what is measured, and the longest input.

    Raises:
        GispError: an unknown format, or an option it does not follow.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise GispError(f"format {quoted(format)} is not available: choose one of {', '.join(FORMATS)}")
    if format != "gguf" and dtype is not None:
        raise GispError(f"--dtype {dtype} is for --format gguf: {format} keeps the dtype of the base model")
    if window is not None and data is None:
        raise GispError(f"--window {window} is about --data: give --data SPEC or leave it out")
    if window is not None:
        check_stride(window, None)
    for name, value in sizes.given().items():
        if name not in FORMATS[format].sizes:
            formats = " or ".join(other for other, each in FORMATS.items() if name in each.sizes)
            raise GispError(
                f"{option_text({name: value})} changes nothing in format {format}: leave it out, or --format {formats}"
            )
