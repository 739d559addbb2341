"""Run notebooks, store what they print and draw, and measure the time and memory that takes: `make outputs`.

The one home of these numbers is docs/measured.json. The README's table is written from it, and a test holds the
sentence **Time.** of each notebook to it. Peak memory is that of the largest process, which is the kernel.

    python docs/measure.py          all notebooks, in order
    python docs/measure.py 06 07    only these
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "measured.json"
README = ROOT / "README.md"

_TIME = re.compile(r"\*\*Time\.\*\*(.*?)(?:\n\n|$)", re.DOTALL)
_SECONDS = re.compile(r"\b(\d+)\s+seconds\b")
_GIGABYTES = re.compile(r"\b(\d+(?:\.\d+)?)\s+GB\b")
_ROW = re.compile(r"^(\| \[[^|]*\]\(notebooks/(\w+)\.ipynb\) \| [^|]* \|)(?: [^|[]* \|)?( \[!\[.*\|)$", re.MULTILINE)


def run(notebook: Path) -> dict[str, float]:
    """Execute a notebook in place in a fresh kernel, and strip it.

    Returns:
        ``seconds``: by the clock, or of the processors where that is less, because a busy machine made us wait;
        ``clock`` and ``processors``: the two; ``gigabytes``: peak memory, in units of 10⁹ bytes.
    """
    nbconvert = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    start = time.perf_counter()
    process = subprocess.Popen([*nbconvert, "--ExecutePreprocessor.timeout=600", str(notebook)])
    # The usage of the process and of all that it waited for: the kernel is among them, and the largest.
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{notebook.name} failed.")
    gigabytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{notebook.stem}: {clock:.0f} s, {cpu:.0f} s of the processors, peak {gigabytes:.2f} GB", flush=True)
    subprocess.run([sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", str(notebook)], check=True)
    return {
        "seconds": round(min(clock, cpu)),
        "clock": round(clock),
        "processors": round(cpu),
        "gigabytes": round(gigabytes, 2),
    }


def stated(text: str) -> tuple[int, float]:
    """Seconds and gigabytes that a notebook's text states after **Time.**

    Raises:
        ValueError: it does not state them as "40 seconds" and "0.9 GB".
    """
    sentence = _TIME.search(text)
    found = [pattern.search(sentence[1]) if sentence else None for pattern in (_SECONDS, _GIGABYTES)]
    if None in found:
        raise ValueError('state it as "**Time.** 40 seconds and 0.9 GB of memory at peak, on two CPU cores."')
    return int(found[0][1]), float(found[1][1])


def measured() -> dict[str, dict[str, float]]:
    """What docs/measured.json says, by notebook."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))["notebooks"] if MEASURED.is_file() else {}


def with_costs(readme: str, costs: dict[str, dict[str, float]]) -> str:
    """The README with time and memory in the table rows of the notebooks that were measured."""

    def row(found: re.Match[str]) -> str:
        cost = costs.get(found[2])
        cell = f"{cost['seconds']} s, {cost['gigabytes']:.1f} GB" if cost else ""
        return f"{found[1]} {cell} |{found[3]}"

    return _ROW.sub(row, readme)


def main(numbers: list[str]) -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = [path for path in notebooks if not numbers or path.name[:2] in numbers]
    outputs = run_path(str(ROOT / "docs" / "outputs.py"))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    machine = f"{os.cpu_count()} CPU cores, {threads} threads, {system}"
    for notebook in chosen:
        outputs["same_colab_cell"](notebook)
        cost = run(notebook)
        costs = measured() | {notebook.stem: cost}
        there = {path.stem: costs[path.stem] for path in notebooks if path.stem in costs}
        MEASURED.write_text(json.dumps({"machine": machine, "notebooks": there}, indent=1) + "\n", encoding="utf-8")
        outputs["tidy_prints"](notebook)
    outputs["PICTURE"].write_text(outputs["stored_picture"]() + "\n", encoding="utf-8")
    README.write_text(with_costs(README.read_text(encoding="utf-8"), measured()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
