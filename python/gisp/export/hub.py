"""Pushing an exported folder to the Hugging Face hub, through huggingface_hub's own interface."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from gisp.errors import GispError
from gisp.export.card import FOLDER_ON_CARD

_CARD = "README.md"
# What the hub puts into a new repository.
_OF_THE_HUB = (".gitattributes",)
_SECONDS = 10


def check_push(repo: str, private: bool) -> None:
    """Refuse a place that an export could not be pushed to, before the work.

    Args:
        repo: name on the hub, ``ORGANISATION/NAME`` or ``NAME``.

    Raises:
        GispError: no name, no token, a hub that does not answer, or a repository that holds files or is open to others
            than asked.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise GispError(f"--push-to-hub {repo} is no name on the hub: give ORGANISATION/NAME") from None
    if get_token() is None:
        raise GispError(f"--push-to-hub {repo} needs a token of the hub: run hf auth login, or set HF_TOKEN")
    try:
        found = HfApi().model_info(repo, timeout=_SECONDS)
    except GatedRepoError as error:
        _refuse(f"cannot push to {repo}", error)
    except RepositoryNotFoundError:
        return
    except Exception as error:  # What a client raises that reaches no hub depends on the HTTP library beneath.
        _refuse(f"cannot push to {repo}", error)
    inside = [item.rfilename for item in found.siblings or () if item.rfilename not in _OF_THE_HUB]
    if inside:
        raise GispError(f"--push-to-hub {repo} exists on the hub and holds files ({inside[0]}): give another name")
    if bool(found.private) != private:
        is_, want = ("private", "leave out --public") if found.private else ("public", "add --public")
        raise GispError(f"--push-to-hub {repo} exists on the hub and is {is_}: {want}, or give another name")


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Make a repository and upload an exported folder, whose card then names the repository; its address.

    The token is the one huggingface_hub finds.

    Raises:
        GispError: it did not arrive; the folder stays as it was.
    """
    card = folder / _CARD
    text = card.read_text(encoding="utf-8")
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        card.write_text(text.replace(FOLDER_ON_CARD, made.repo_id), encoding="utf-8")
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Add a pruned model")
    except BaseException as error:
        card.write_text(text, encoding="utf-8")
        if not isinstance(error, Exception):
            raise
        _refuse(f"{folder} is written, but was not pushed to {repo}", error)
    return str(made)


def _refuse(what: str, error: Exception) -> NoReturn:
    """One line; the hub's own words can be many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    raise GispError(f"{what}: {reason.rstrip('.')}") from None
