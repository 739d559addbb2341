"""nbval plugin: compare figures by their words and shapes, not by the last digits of their numbers.

The same figure differs in its last digits between processors, and nbval compares plotly's JSON and its still SVG to the
letter. What the numbers have to be is asserted in the cells, with tolerances. Progress bars (stderr) are not compared;
a notice that the fast path was left is, because the embedded models never leave it.
"""

from __future__ import annotations

import re
from typing import Any

from nbval.plugin import IPyNbCell

_sanitize_text = IPyNbCell.sanitize
_compare = IPyNbCell.compare_outputs


def without_numbers(value: Any) -> Any:
    """A figure with every float, and every encoded array, replaced by a word. Lengths and nesting stay."""
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return "number"
    if isinstance(value, dict):
        return {key: "array" if key == "bdata" else without_numbers(item) for key, item in value.items()}
    # a whole number may be written 1 or 1.0 from one run to the next
    return ["number" if type(item) in (int, float) else without_numbers(item) for item in value]


def _sanitize(cell: IPyNbCell, output: Any) -> Any:
    if isinstance(output, dict):
        return without_numbers(output)
    if output.lstrip().startswith("<svg"):  # the words of the picture; plotly's JSON beside it has the shapes
        return re.findall(r"<text[^>]*>([^<]*[A-Za-z][^<]*)<", output)
    return _sanitize_text(cell, output)


def _without_progress(cell: IPyNbCell, test: list, ref: list, skip_compare: tuple | None = None) -> bool:
    def is_compared(output: dict) -> bool:
        return output.get("name") != "stderr" or "SlowPath" in output["text"]

    kept = ([output for output in outputs if is_compared(output)] for outputs in (test, ref))
    return _compare(cell, *kept, skip_compare=skip_compare)


IPyNbCell.sanitize = _sanitize
IPyNbCell.compare_outputs = _without_progress
