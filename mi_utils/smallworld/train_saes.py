"""Train the SAEs that ship with the embedded model: `python -m mi_utils.smallworld.train_saes`. Resumes.

What was chosen, and why, stands with :data:`RECIPES`. The figures printed are measured on documents that no SAE was
trained on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mi_utils.sae import SHIPPED, evaluate_sae, train_sae

RECIPES: dict[str, dict[str, Any]] = {}


def main() -> None:
    """Command line: which ones, where to."""
    import argparse

    from mi_utils.lens import token_rows
    from mi_utils.models import load_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    model = load_model("smallworld")
    rows = token_rows(model, 40_000, seed=41)
    for name in arguments.name:
        start = time.perf_counter()
        sae = train_sae(model, folder=Path("build/saes") / name, **RECIPES[name])
        sae.save(arguments.folder / name, dtype="float16")
        found = evaluate_sae(model, sae, rows)
        print(
            f"{name}: L0 {found.attrs['l0']:.1f}, variance explained {float(found.variance_explained):.3f}, "
            f"cross-entropy recovered {float(found.cross_entropy_recovered):.3f}, dead features "
            f"{float(found.dead_fraction):.1%}, {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
