"""What ``mkdocs build`` adds to docs/: pages from the root of the repository and the command-line reference.

Links are written for the files as they lie in the repository. Here they are turned to pages of the site; a file that
is no page is named by its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> file in the repository.
OUTSIDE = {
    "results.md": "benchmarks/RESULTS.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
CLI = "reference/cli.md"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?(?:\w+\.)*([\w()]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, CLI, content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between files of the repository as links between pages."""
    here = page.file.src_uri
    source = OUTSIDE.get(here, f"docs/{here}")
    pages = {path: name for name, path in OUTSIDE.items()}

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return f"{text} (`{path}`)" if text != path else f"`{path}`"
        return f"[{text}]({posixpath.relpath(name, posixpath.dirname(here))}{anchor})"

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of the docstrings as plain code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def _command_line() -> str:
    """The reference of ``gisp`` by typer, behind it the options of a run by preset."""
    import typer.main
    from typer.cli import get_docs_for_click

    from gisp.cli.app import app
    from gisp.config.reference import markdown

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="gisp")
    return text + "\n## Options of a run\n\n" + re.sub(r"(?m)^## ", "### ", markdown())
