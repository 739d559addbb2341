"""The table of model sizes in references/compute-awareness.md, made by the estimates: `python docs/sizes.py`."""

from __future__ import annotations

import re
from pathlib import Path

from mi_utils.compute import choose_tool, format_bytes, known_shape
from mi_utils.estimates import estimate

PAGE = Path(__file__).parents[1] / "references" / "compute-awareness.md"
MODELS = ("gpt2-small", "gpt2-xl", "pythia-70m", "pythia-1.4b", "pythia-12b", "llama-3.1-8b", "llama-3.1-70b")
PLACE = re.compile(r"(<!-- sizes: [^\n]*-->\n).*?(<!-- end of sizes -->)", re.DOTALL)


def table() -> str:
    """Markdown: weights, one pass, a patching sweep and SAE training for models of all sizes."""
    lines = [
        "| model | parameters | tool | dtype | loaded | patching on a GPU, 16 × 32 tokens | training an SAE |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        shape = known_shape(name)
        dtype = "float32" if shape.n_parameters < 1e9 else "bfloat16"
        needs = [estimate(shape, task, batch=16, seq=32, dtype=dtype, device="cuda") for task in ("patching", "sae")]
        cells = [name, f"{shape.n_parameters / 1e9:.2g} B", choose_tool(shape).tool, dtype]
        cells += [format_bytes(needs[0].weights), *(format_bytes(need.total) for need in needs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table in its place."""
    return PLACE.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
