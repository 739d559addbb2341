"""Code blocks of README, CLAUDE.md and references/ run; every bold term of a notebook stands in the vocabulary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CLAUDE.md", *sorted((ROOT / "references").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def code_of(page: Path) -> str:
    """The page's Python blocks, each at its own line, so that an error names the line of the page."""
    text, lines = page.read_text(encoding="utf-8"), []
    for block in BLOCK.finditer(text):
        first = text[: block.start(1)].count("\n")
        lines += [""] * (first - len(lines)) + block[1].splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))],
                         ids=lambda page: page.name)  # fmt: skip
def test_python_blocks_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "page"})


def test_the_table_of_sizes_is_what_the_estimates_say():
    sizes = run_path(str(ROOT / "docs" / "sizes.py"))
    page = sizes["PAGE"].read_text(encoding="utf-8")
    assert sizes["PLACE"].search(page) and sizes["with_table"](page) == page, "python docs/sizes.py"


# a term in running text: not a paragraph's, an item's or a cell's own heading, and no sentence
TERM = re.compile(r"(?<=[\w,;:)(] )\*\*([^*\n]*[^*\n.:?!])\*\*")


def terms(text: str) -> set[str]:
    """Bold terms of a text in Markdown, code left out."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. )", text))
    return {term for paragraph in paragraphs for term in TERM.findall(paragraph)}


def test_terms_are_told_from_headings():
    text = (
        "**Claim.** An **attractor** stands by.\n\n- **One.** the **canary**; see `**this**`\n\n**3. Open (easy).** So"
    )
    assert terms(text) == {"attractor", "canary"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_vocabulary_has_every_bold_term_of_a_notebook(path):
    vocabulary = (ROOT / "references" / "vocabulary.md").read_text(encoding="utf-8").lower().replace("-", " ")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {term for cell in cells if cell["cell_type"] == "markdown" for term in terms("".join(cell["source"]))}
    missing = {term for term in found if term.lower().replace("-", " ") not in vocabulary}
    assert not missing, "explain them there, or write what is stressed and no term in italics"
