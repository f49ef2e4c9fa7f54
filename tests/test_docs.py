"""The pages hold together: links lead somewhere, also on GitHub, drawings and the notebook are what the code does."""

import json
import re
import runpy
from pathlib import Path

import pytest

import flexivid

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "findings/README.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(page: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`|^    .*?$", "", page, flags=re.S | re.M)


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, page: str) -> list[str]:
    broken = []
    for link in LINK.findall(without_code(page)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        to = path.parent / target
        if not to.exists() or (anchor and anchor not in anchors(to.read_text() if target else page)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_a_broken_link_is_found():
    page = "# A\n\n[a](#a) [b](#b) [c](log.md) [d](lag.md) [e](log.md#no) `[f](no)` [g](https://example.org)\n"
    assert broken_links(DOCS / "page.md", page) == ["#b", "lag.md", "log.md#no"]


def test_the_site_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in navigation] == []


def test_the_page_about_python_has_the_whole_public_surface():
    named = re.findall(r"^::: flexivid\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(flexivid.__all__)


def test_drawings_are_those_of_the_script():
    figures = runpy.run_path(str(DOCS / "figures.py"))["FIGURES"]
    for name, draw in figures.items():
        assert (DOCS / name).read_text() == draw(), "python docs/figures.py"


@pytest.mark.slow
def test_the_notebook_runs(capsys):
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text())
    names = {"__name__": "quickstart"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["summary"].ratio <= 0.25
    assert names["quarter"].shape == names["full"].shape == (17, 64, 64, 3)
    assert "75.0% saved" in capsys.readouterr().out
