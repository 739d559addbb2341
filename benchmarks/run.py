"""Run every benchmark here and write the table: ``make bench``, or ``python benchmarks/run.py [NAME …]``.

A benchmark is a module beside this one with ``TITLE`` and ``main() -> list[Row]``. With names, only those modules run
and only their sections of ``RESULTS.md`` are replaced.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

HEAD = """# Benchmarks

Ours beside the peer's: the same work and weights, in one process, in turns. The ratio is the peer's time by ours
(median over the rounds); times are medians too, and say more about the machine than about the code. "FLOP ratio" is
the peer's work by ours in FLOPs. The ratio of times can be larger, where the peer is further from the machine's rate.
"Share of the limit" is how near our time comes to our FLOPs at the rate of a plain matrix product measured in the same
rounds. `make bench` writes this file.
"""


def modules(names: list[str]) -> list[str]:
    """The benchmarks to run, sorted.

    Raises:
        SystemExit: a name that is none.
    """
    there = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("run", "common"))
    if unknown := sorted(set(names) - set(there)):
        raise SystemExit(f"No benchmarks {', '.join(unknown)}: there are {', '.join(there)}.")
    return names or there


def machine() -> str:
    """One line on where the numbers come from."""
    from mi_utils.compute import environment

    about = environment()
    packages = ", ".join(
        f"{name} {about['packages'][name]}" for name in ("torch", "transformers", "transformer-lens", "numpy")
    )
    commit = (about["commit"] or "no commit")[:12]
    where = f"{_processor() or about['device']}, {about['cpu_count']} cores"
    return f"{where}; Python {about['python']}, {packages}; {commit}."


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else []
    return names[0].strip() if names else ""


def main(names: list[str]) -> None:
    """Run, print, and write ``RESULTS.md``; sections of benchmarks that were not run stay as they are."""
    from common import RESULTS, table

    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = dict(re.findall(r"^<!-- (\w+) -->\n(.*?)(?=^<!-- \w+ -->\n|\Z)", text, flags=re.S | re.M))
    for name in modules(names):
        module = import_module(name)
        sections[name] = f"## {module.TITLE}\n\n{table(module.main())}\n\n{machine()}\n"
        print(sections[name], flush=True)
        body = "".join(f"\n<!-- {name} -->\n{sections[name].strip()}\n" for name in sorted(sections))
        RESULTS.write_text(HEAD + body, encoding="utf-8")  # each as it is done: a run that is cut short loses one


if __name__ == "__main__":
    main(sys.argv[1:])
