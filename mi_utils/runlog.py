"""A log of runs: one JSON line each, with the environment it ran in; copied to Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "runs.jsonl"
PROJECT = "mi_utils"


def log_run(
    name: str,
    parameters: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    directory: str | Path = "build/runs",
    tracking: str = "json",
    project: str = PROJECT,
) -> Path:
    """Add one run to the log.

    Args:
        name: what was run.
        parameters: what it was run with.
        results: numbers and short texts (an estimate as a dict); arrays belong into files of their own.
        directory: the log is ``runs.jsonl`` in there.
        tracking: "json", or "wandb" for the same record on Weights & Biases as well (mode and login are taken from
            its own environment variables).
        project: under which project Weights & Biases files it.

    Returns:
        The log file.

    Raises:
        ValueError: an unknown ``tracking``, or a value that cannot be written as JSON.
        RuntimeError: wandb was asked for and is not installed.
    """
    if tracking not in ("json", "wandb"):
        raise ValueError(f"Unknown tracking {tracking!r}: use 'json' or 'wandb'.")
    wandb = _wandb() if tracking == "wandb" else None
    from mi_utils import compute

    record = {
        "name": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": _plain(parameters, "parameters"),
        "results": _plain(results, "results"),
        "environment": _plain(compute.environment(), "environment"),
    }
    path = Path(directory) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            # A run that was killed while it wrote may have left half a line: begin a new one.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
    if wandb is not None:
        run = wandb.init(project=project, name=name, config=record["parameters"], dir=str(path.parent))
        run.log(record["results"])
        run.finish()
    return path


def read_runs(directory: str | Path = "build/runs") -> list[dict[str, Any]]:
    """All logged runs, oldest first; none where nothing was logged. Lines cut off by a kill are left out."""
    path = Path(directory) / FILE
    if not path.is_file():
        return []
    runs = []
    for line in path.read_bytes().split(b"\n"):  # text may hold other ends of a line
        try:
            runs.append(json.loads(line))
        except ValueError:  # half a line, or half a character
            continue
    return runs


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(
            "tracking='wandb' needs the package wandb (pip install wandb); 'json' needs none."
        ) from error
    return wandb


def _plain(value: Any, where: str) -> Any:
    """The value as JSON holds it; numbers that JSON has not (nan, inf) become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict(), where)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and math.prod(value.shape) == 1:  # a number of NumPy, PyTorch or xarray
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{where} is a {type(value).__name__}: the log holds numbers and short texts. "
        "Log its summary, and save the thing itself to a file."
    )
