"""Makes the repository's pages into a site (mkdocs calls this): links that work on GitHub lead to the same thing there.

README.md is the home page. What pages link to outside docs/, and folders, get pages of their own.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
IN_NAVIGATION = [HOME, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "findings/README.md"]
LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[#)])")  # relative ones
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}
NOT_SEARCHED = "---\nsearch: {exclude: true}\n---\n"


def uri_of(path: Path) -> str:
    """Where a file or folder of the repository stands among the sources of the site."""
    if path == HOME:
        return "index.md"
    inside = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    if path.is_dir():
        return f"{inside}/index.md"
    return inside if path.suffix == ".md" or path.is_relative_to(DOCS) else f"{inside}.md"


def text_of(path: Path) -> str:
    """A page of the site in Markdown: its own, the files of a folder, or the lines of a file."""
    if path.suffix == ".md":
        return path.read_text()
    title = f"{NOT_SEARCHED}# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith(("_", ".")))
        return title + "\n".join(f"- [{name}]({name})" for name in names)
    return f"{title}````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n"


def target_of(link: str, source: Path) -> Path | None:
    """What a relative link on the page of a file or folder leads to, if that is in the repository."""
    path = ((source if source.is_dir() else source.parent) / link).resolve()
    return path if path.exists() and path.is_relative_to(ROOT) else None


def targets(source: Path) -> Iterator[Path]:
    if source.suffix == ".md" or source.is_dir():
        for link in LINK.findall(text_of(source)):
            if (path := target_of(link, source)) is not None:
                yield path


_sources: dict[str, Path] = {}


def on_files(files: Files, config: MkDocsConfig) -> None:
    waiting = [*IN_NAVIGATION, *(Path(file.abs_src_path) for file in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        uri = uri_of(path)
        if uri in _sources:
            continue
        _sources[uri] = path
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=text_of(path)))
        waiting += targets(path)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri

    def on_the_site(match: re.Match) -> str:
        path = target_of(match[0], _sources[uri])
        return match[0] if path is None else posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")

    return LINK.sub(on_the_site, markdown)
