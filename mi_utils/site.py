"""The course as a static site: notebooks as they are stored, reference pages, benchmark results.

The site lies as the repository does, so that links lead to the same places::

    index.html                 the README, and a list of all pages
    notebooks/01_….html        each notebook with its stored outputs
    references/….html, benchmarks/RESULTS.html
    assets/                    style sheet and scripts, once for all pages

It asks nothing of other hosts; only links lead there.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mi_utils.course import list_notebooks
from mi_utils.pages import frame, markdown_html, notebook_html, write_assets

MARK = ".mi_utils-site"  # an empty file in a folder that holds a site and may be built again


@dataclass(frozen=True)
class Source:
    """A file that becomes a page; `path` and `page` from the repository's and the site's root."""

    path: Path
    page: Path
    title: str
    text: str  # Markdown, of a notebook that of its text cells


def sources(root: Path) -> list[Source]:
    """The files that become pages, in reading order: README, notebooks, references, benchmark results."""
    texts = [root / "README.md", *sorted((root / "references").glob("*.md")), root / "benchmarks" / "RESULTS.md"]
    paths = [texts[0], *list_notebooks(root / "notebooks"), *(path for path in texts[1:] if path.is_file())]
    return [_source(path.relative_to(root), root) for path in paths]


def _source(path: Path, root: Path) -> Source:
    import nbformat

    if path.suffix == ".ipynb":
        cells = nbformat.read(root / path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = (root / path).read_text(encoding="utf-8")
    heading = re.search(r"^#\s+(.+)$", text, flags=re.MULTILINE)
    title = re.sub(r"[*`$]", "", heading[1]).strip() if heading else path.stem
    return Source(path, Path("index.html") if path.name == "README.md" else path.with_suffix(".html"), title, text)


def build_site(root: Path, target: Path) -> list[Path]:
    """Render the site from the stored notebooks; nothing is executed. Returns its pages.

    Args:
        root: the repository.
        target: the site's folder. What an earlier build left in it is removed.

    Raises:
        ValueError: the folder is not empty and no site, or there is no README.
    """
    if not (root / "README.md").is_file():
        raise ValueError(f"{root} has no README.md, which becomes the site's first page.")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise ValueError(f"{target} is not empty and holds no site. Give another folder, or empty it yourself.")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / MARK).touch()
    write_assets(target)
    found = sources(root)
    pages = {source.path: source.page for source in found}
    repository = repository_address(root)
    for i, source in enumerate(found):
        before, after = found[i - 1] if i else None, found[i + 1] if i + 1 < len(found) else None
        more = "" if before else _list_of_pages(found[1:])
        _write(source, before, after, more, root=root, target=target, pages=pages, repository=repository)
    return [target / source.page for source in found]


def repository_address(root: Path) -> str:
    """The project's address in ``pyproject.toml``, to which links lead whose file is no page of the site."""
    import tomllib

    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].rstrip("/")


def _list_of_pages(found: list[Source]) -> str:
    items = (f'<li><a href="{source.page.as_posix()}">{escape(source.title)}</a></li>' for source in found)
    return f'<h2 id="all-pages">All pages</h2>\n<ul>{"".join(items)}</ul>'


def _write(
    source: Source, before: Source | None, after: Source | None, more: str, *, root: Path, target: Path,
    pages: dict[Path, Path], repository: str,
) -> None:  # fmt: skip
    import nbformat

    here = source.page.parent

    def link(href: str) -> str:
        if re.match(r"[a-z]+:|#|//", href):
            return href
        place, hash_sign, anchor = href.partition("#")
        path = Path(os.path.normpath(source.path.parent / place))
        if path in pages:
            return _relative(pages[path], here) + hash_sign + anchor
        return f"{repository}/blob/main/{path.as_posix()}{hash_sign}{anchor}"

    folder = (root / source.path).parent
    if source.path.suffix == ".ipynb":
        body = notebook_html(nbformat.read(root / source.path, as_version=4), folder=folder, link=link)
    else:
        # In a text, links to headings are written as GitHub makes them: in small letters.
        body = re.sub(r'(<h\d id="|href="#)([^"]+)"', lambda found: f'{found[1]}{found[2].lower()}"',
                      markdown_html(source.text, folder=folder, link=link))  # fmt: skip

    def step(to: Source | None, kind: str, arrow: str) -> str:
        if to is None:
            return ""
        return f'<a class="{kind}" rel="{kind}" href="{_relative(to.page, here)}">{arrow.format(escape(to.title))}</a>'

    contents = f'<a href="{_relative(Path("index.html"), here)}">Contents</a>'
    steps = [step(before, "prev", "\u2190 {}"), contents if before else "", step(after, "next", "{} \u2192")]
    navigation = f"<nav>{''.join(steps)}</nav>"
    page = target / source.page
    page.parent.mkdir(parents=True, exist_ok=True)
    html = frame(
        source.title, f"{body}\n{more}", assets=_relative(Path("assets"), here), top=navigation,
        bottom=f"<footer>{navigation}</footer>",
    )  # fmt: skip
    page.write_text(html, encoding="utf-8")


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()
