"""Copy the README's picture out of notebook 03, where it is a stored output; `make outputs` calls this."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layer-position.svg"


def stored_picture() -> str:
    """The SVG of the layer-by-position heat map, as it stands in the notebook."""
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
    PICTURE.write_text(stored_picture() + "\n", encoding="utf-8")
