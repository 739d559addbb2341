"""What `make outputs` does to notebooks: no progress bars, prints in one piece, the same Colab cell in all; and the
README's picture."""

from pathlib import Path

import nbformat
from nbval.plugin import coalesce_streams

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layer-position.svg"
FIRST = ROOT / "notebooks" / "01_environment_setup.ipynb"  # its Colab cell is the model for all others


def tidy_prints(path: Path) -> None:
    """Take out what was written to stderr: progress bars, whose every step would be stored. What a cell prints may have
    come in several pieces: it is stored as one."""
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = coalesce_streams([output for output in cell.outputs if output.get("name") != "stderr"])
    nbformat.write(nb, path)


def colab_cell(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell that makes a notebook run on Colab."""
    (cell,) = [cell for cell in nb.cells if "colab" in cell.metadata.get("tags", ())]
    return cell


def same_colab_cell(path: Path) -> None:
    """Write the Colab cell of notebook 01 into a notebook, with the notebook's own name in it."""
    nb, model = nbformat.read(path, as_version=4), nbformat.read(FIRST, as_version=4)
    colab_cell(nb).source = colab_cell(model).source.replace(FIRST.stem, path.stem)
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
        tidy_prints(notebook)
        same_colab_cell(notebook)
    PICTURE.write_text(stored_picture() + "\n", encoding="utf-8")
