"""Whether the model hub can be reached, asked once: its clients try for most of a minute before they say so."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

# A network that takes longer to answer a request for nothing loads no model.
_SECONDS = 10.0


def hub_options(name: str | Path) -> dict[str, Any]:
    """Arguments of a ``from_pretrained`` for a folder or a hub name: the cache alone where there is no network."""
    return {} if Path(name).is_dir() or is_reachable() else {"local_files_only": True}


@cache
def is_reachable() -> bool:
    """Whether the hub answers, whatever it says, within ten seconds; ``HF_HUB_OFFLINE`` is left to the hub's client.

    It is asked through the client's own session, so that proxies and mirrors (``HF_ENDPOINT``) count.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return True
    answered = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception:  # of whichever HTTP library the client is built on
            return
        answered.append(True)

    # Looking up a name has a time limit of its own, which no argument shortens.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return bool(answered)


def unreachable(what: str) -> str:
    """The line for something that is neither cached nor to be had.

    Args:
        what: names it.
    """
    from huggingface_hub import constants

    return f"{what} is not in the cache and {constants.ENDPOINT} cannot be reached: check the network or give a folder"
