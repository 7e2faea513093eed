"""Files of the repository beside docs/ as parts of the site, so that the same links hold on a code host and here.

What a page links to outside of docs/ is added as repository/PATH: Markdown as pages, everything else as files; links
are turned to there. Links to folders become plain text. A notebook NAME.ipynb is shown as NAME.md. MkDocs calls the
functions by their names.
"""

import base64
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "repository"
_PAGES = ("kernels/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")  # of the navigation
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)|!\[[^\]]*\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the navigation, and what pages link to, and what these link to."""
    waiting = [*_PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, f"{PREFIX}/{path}", abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += [found for found in map(_target, _links(path)) if found is not None]
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for part in _notebook(file, config):
            files.append(part)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from and to files outside of docs/ as the site has them."""
    source = _path_of(page.file.src_uri)

    def turned(link: re.Match) -> str:
        text, address = link[1], link[2] or link[4]
        there = _resolved(source, address)
        if there is None or not (ROOT / there).exists():
            return link[0]  # an address of the web, or a broken link, which MkDocs names
        if (ROOT / there).is_dir():
            return text
        uri = there.removeprefix("docs/") if there.startswith("docs/") else f"{PREFIX}/{there}"
        shown = re.sub(r"\.ipynb$", ".md", uri)
        uri = uri if shown == page.file.src_uri else shown  # a notebook's own page links to the notebook
        return link[0].replace(f"({address}", f"({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}")

    return _LINK.sub(turned, markdown)


def _notebook(file: File, config: MkDocsConfig) -> list[File]:
    """A page of a notebook's text, its code, and what that printed and drew; and the pictures."""
    name = file.src_uri.removesuffix(".ipynb")
    first, *cells = json.loads(Path(file.abs_src_path).read_text())["cells"]
    parts, pictures = ["".join(first["source"]), f"[The notebook]({posixpath.basename(file.src_uri)}) as it ran:"], []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
                continue
            uri = f"{name}_{number}.jpg"
            data = base64.b64decode(output["data"]["image/jpeg"])
            pictures.append(File.generated(config, uri, content=data))
            parts.append(f"![what the code above drew]({posixpath.basename(uri)})")
    return [File.generated(config, f"{name}.md", content="\n\n".join(parts) + "\n"), *pictures]


def _path_of(uri: str) -> str:
    """Where a source of the site lies in the repository."""
    return uri.removeprefix(f"{PREFIX}/") if uri.startswith(f"{PREFIX}/") else f"docs/{uri}"


def _links(path: str) -> list[tuple[str, str]]:
    return [(path, found[2] or found[4]) for found in _LINK.finditer((ROOT / path).read_text())]


def _resolved(source: str, address: str) -> str | None:
    if ":" in address or address.startswith(("/", "#")):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), address))


def _target(link: tuple[str, str]) -> str | None:
    """The file of the repository outside of docs/ that is linked to."""
    path = _resolved(*link)
    return path if path and not path.startswith("docs/") and (ROOT / path).is_file() else None
