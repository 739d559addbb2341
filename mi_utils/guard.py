"""The guard against hollow notebooks: what a notebook must have for its claims to mean something."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

MIN_CLAIMS = 3
MAX_SKIPPED = 3
MAX_LINES = 40
SKIPPING = re.compile(r"#\s*(?:NBVAL_SKIP|NBVAL_IGNORE_OUTPUT|PYTEST_VALIDATE_IGNORE_OUTPUT)", re.IGNORECASE)
SKIPPING_TAGS = {"nbval-skip", "nbval-ignore-output", "pytest-validate-ignore-output", "skip-execution"}
# as nbval reads them: a comment, or the same words as a tag
RAISING = re.compile(r"#\s*NBVAL_RAISES_EXCEPTION", re.IGNORECASE)
RAISING_TAGS = {"raises-exception", "nbval-raises-exception"}
# an outside address in a comment is a source, in code it is a request; one's own machine is not outside
ADDRESS = re.compile(r"https?://(?!(?:localhost|127\.0\.0\.1)\b)[^\s\"')]+")


def count_claims(source: str) -> int:
    """Asserts of a cell that could fail: ``assert True`` and the like claim nothing."""
    from IPython.core.inputtransformer2 import TransformerManager

    tree = ast.parse(TransformerManager().transform_cell(source))
    constants = (ast.Constant, ast.Tuple, ast.List)
    return sum(isinstance(node, ast.Assert) and not isinstance(node.test, constants) for node in ast.walk(tree))


def hollow(nb: NotebookNode, *, stored: bool = True, own_address: str | None = None) -> list[str]:
    """What is hollow about a notebook, in words; empty where nothing is.

    Args:
        nb: the notebook.
        stored: whether it must hold the outputs of one run from top to bottom.
        own_address: an address that code may name; any other one is a request to someone else's host.
    """
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    outputs = [output for cell in code for output in cell.outputs]
    tags = [set(cell.metadata.get("tags", ())) for cell in code]
    problems = []
    if not code:
        return ["no code"]
    if any(output.output_type == "error" for output in outputs):
        problems.append("a stored error")
    if any(RAISING.search(cell.source) or RAISING_TAGS & own for cell, own in zip(code, tags, strict=True)):
        problems.append("a cell that may raise: papermill stops there, catch the exception in the cell")
    if stored and [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        problems.append("execution counts are not 1, 2, 3 …: run it from a fresh kernel and save")
    if stored and not outputs:
        problems.append("no stored output, so nothing is compared")
    if sum(count_claims(cell.source) for cell in code) < MIN_CLAIMS:
        problems.append(f"fewer than {MIN_CLAIMS} asserted claims")
    skipped = sum(
        bool(SKIPPING.search(cell.source) or SKIPPING_TAGS & own) for cell, own in zip(code, tags, strict=True)
    )
    if skipped > MAX_SKIPPED:
        problems.append(f"{skipped} skipped or ignored cells, {MAX_SKIPPED} are allowed")
    longest = max(cell.source.count("\n") + 1 for cell in code)
    if longest > MAX_LINES:
        problems.append(f"a cell of {longest} lines, {MAX_LINES} are allowed")
    for cell in code:
        lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith("#")]
        addresses = [found for line in lines for found in ADDRESS.findall(line)]
        foreign = [found for found in addresses if not own_address or not found.startswith(own_address)]
        problems += [f"a code cell names {found}" for found in foreign]
    return problems


def run_in_one_kernel(paths: Sequence[Path], timeout: float = 600, **parameters: Any) -> None:
    """Run notebooks one after another in one kernel, emptied in between: a quick check that all run.

    The libraries are imported once instead of once for each notebook. ``python -m mi_utils run`` gives each notebook a
    kernel of its own.

    Args:
        paths: the notebooks, in order. The kernel starts in the first one's folder.
        timeout: seconds a single cell may take.
        parameters: set after each notebook's cell tagged ``parameters``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message shows it.
    """
    import nbformat
    from jupyter_client.manager import start_new_kernel
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    given = new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(paths[0].parent), extra_arguments=["--IPKernelApp.log_level=40"]
    )
    client.stop_channels()
    try:
        for path in paths:
            nb = nbformat.read(path, as_version=4)
            tagged = ["parameters" in cell.metadata.get("tags", ()) for cell in nb.cells]
            nb.cells.insert(tagged.index(True) + 1 if any(tagged) else 0, given)
            nb.cells.insert(0, new_code_cell("%reset -f"))
            NotebookClient(nb, km=manager, timeout=timeout).execute()
    finally:
        manager.shutdown_kernel(now=True)
