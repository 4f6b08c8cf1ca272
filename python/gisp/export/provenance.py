"""What a model card says of the base model and of the calibration data: names, licence, languages, data sets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

_CARD = "README.md"
_UNKNOWN_LICENSE, _UNKNOWN_LANGUAGE = "unknown", "und"
"""The hub's own words for a licence, and ISO 639's for a language, that is not known."""
_NOT_KNOWN = "not known: neither the base model's card nor its configuration says it"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A snapshot in the hub's cache.
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\][0-9a-f]+")
_SECONDS = 5
# Of a table of two columns.
_ROW = re.compile(r"\| ([^|]+?) \| (.+) \|")


@dataclass(frozen=True)
class BaseCard:
    """What the base model's card or configuration says, empty where neither does.

    Attributes:
        name: hub name, or the last part of a folder.
        on_hub: whether the name is known to be one of the hub.
        license_fields: ``license_name`` and ``license_link`` of a licence the hub has no word for.
    """

    name: str
    on_hub: bool
    license: str = ""
    license_fields: tuple[tuple[str, str], ...] = ()
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @classmethod
    def of(cls, base: Any, path: str) -> BaseCard:
        """Read the card of a base model.

        Args:
            path: folder or hub name it was loaded from; empty for a model in memory, whose configuration may know.
        """
        path = path or str(getattr(base.config, "_name_or_path", "") or "")
        name, on_hub = base_name(base, path)
        card = _card(path if Path(path).is_dir() else name, on_hub)
        known = {**base.config.to_dict(), **{key: value for key, value in card.items() if value is not None}}
        fields = tuple((key, str(known[key])) for key in ("license_name", "license_link") if known.get(key))
        return cls(
            name=name,
            on_hub=on_hub,
            license=" ".join(_words(known.get("license"))[:1]),
            license_fields=fields,
            languages=_words(known.get("language")),
            datasets=_words(known.get("datasets")),
        )

    def front(self, calibration: dict[str, Any]) -> dict[str, Any]:
        """Entries of a card's front matter.

        Args:
            calibration: the run's record of its data.
        """
        named = [name for name in _specs(calibration) if _is_hub_name(name)]
        return {
            "base_model": self.name,
            "license": self.license or _UNKNOWN_LICENSE,
            **dict(self.license_fields),
            "language": list(self.languages) or [_UNKNOWN_LANGUAGE],
            "datasets": list(dict.fromkeys((*self.datasets, *named))),
        }

    def facts(self, calibration: dict[str, Any]) -> list[tuple[str, str]]:
        """Lines of the table of facts; what is not known is said."""
        where = "" if self.on_hub else " (its name on the hub, if it has one, is not known)"
        license = " ".join((self.license, *(value for _, value in self.license_fields)))
        return [
            ("base model", f"`{self.name}`{where}"),
            ("licence", license.strip() or f"{_NOT_KNOWN}, and it holds for this model too"),
            ("languages", ", ".join(self.languages) or _NOT_KNOWN),
            ("training data of the base model", ", ".join(self.datasets) or _NOT_KNOWN),
            ("calibration data", _calibration(calibration)),
        ]


def card_facts(folder: Path) -> dict[str, str]:
    """``base model``, and the table of facts, of the card that an export was written with; what is gone is left out."""
    front = _card(str(folder), False)
    found = {"base model": str(front["base_model"])} if front.get("base_model") else {}
    with contextlib.suppress(OSError, ValueError):
        _, _, table = (folder / _CARD).read_text(encoding="utf-8").partition("\n| | |\n|---|---|\n")
        rows = (_ROW.fullmatch(line) for line in table.partition("\n\n")[0].splitlines())
        found = {row[1]: row[2].replace("`", "") for row in rows if row} | found
    return found


def base_name(base: Any, path: str) -> tuple[str, bool]:
    """A base model's name, which tells no local path, and whether it is known to be one of the hub.

    Args:
        path: folder or hub name it was loaded from; empty for a model in memory, whose configuration may know.
    """
    path = path or str(getattr(base.config, "_name_or_path", "") or "")
    snapshot = _SNAPSHOT.search(path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}", True
    return (path, True) if _is_hub_name(path) else (Path(path).name or type(base).__name__, False)


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def _card(path: str, on_hub: bool) -> dict[str, Any]:
    """Front matter of the base model's card: of a folder, of the hub's cache, or of the hub, which is asked once.

    Empty where there is none that can be read: the hub may be out of reach, which no export is to fail for.
    """
    file: Any = Path(path) / _CARD
    if not Path(path).is_dir() and on_hub:
        file = try_to_load_from_cache(path, _CARD)
        if not isinstance(file, str):
            with contextlib.suppress(Exception):  # What it raises depends on the HTTP library beneath.
                data = HfApi().model_info(path, timeout=_SECONDS).card_data
                return data.to_dict() if data is not None else {}
            return {}
    try:
        return dict(ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}


def _words(value: Any) -> tuple[str, ...]:
    """One word or several as a card may hold them."""
    several = value if isinstance(value, (list, tuple)) else [value]
    # YAML takes Norwegian's "no" for false.
    texts = ("no" if word is False else word for word in several)
    return tuple(word for word in texts if isinstance(word, str) and word)


def _specs(calibration: dict[str, Any]) -> Iterable[str]:
    tasks = calibration.get("tasks") or ()
    specs = [task.get("name") for task in tasks if isinstance(task, dict)] or [calibration.get("spec")]
    return [str(spec) for spec in specs if spec]


def _calibration(calibration: dict[str, Any]) -> str:
    """The data a run was scored on; of a file its name only."""
    names = [spec if _is_hub_name(spec) else spec.replace("\\", "/").rsplit("/", 1)[-1] for spec in _specs(calibration)]
    if not names:
        return "not recorded"
    counts = [(calibration.get("sequences"), "sequences"), (calibration.get("tokens"), "tokens scored in all steps")]
    return ", ".join([*(f"`{name}`" for name in names), *(f"{n:,} {what}" for n, what in counts if isinstance(n, int))])
