"""What `make outputs` does to notebooks that were run: drop progress bars, copy out the README's picture."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layer-position.svg"


def drop_progress(path: Path) -> None:
    """Take out what was written to stderr: progress bars, whose every step would be stored."""
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(nb, path)


def stored_picture() -> str:
    """The SVG of the layer-by-position heat map, as it stands in notebook 03."""
    nb = nbformat.read(ROOT / "notebooks" / "03_implementation.ipynb", as_version=4)
    pictures = [
        output.data["image/svg+xml"]
        for cell in nb.cells
        if cell.cell_type == "code" and 'over=("layer", "pos")' in cell.source
        for output in cell.outputs
        if "image/svg+xml" in output.get("data", {})
    ]
    return pictures[0]


if __name__ == "__main__":
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        drop_progress(notebook)
    PICTURE.write_text(stored_picture() + "\n", encoding="utf-8")
