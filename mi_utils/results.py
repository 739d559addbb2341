"""What the effects of interventions have in common: a scale from 0 (corrupted) to 1 (clean), baselines, labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mi_utils import models
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr


class NothingChanged(RuntimeError):
    """An intervention that left every activation as it was: its effect would be a number about nothing."""


def numpy(values: Tensor) -> np.ndarray:
    """As an array in double precision."""
    return values.detach().float().cpu().double().numpy()


def check_mode(mode: str) -> None:
    """Raises ValueError for what is neither denoising nor noising."""
    if mode not in ("denoising", "noising"):
        raise ValueError(
            f"Unknown mode {mode!r}: use 'denoising' (clean into corrupted) or 'noising' (corrupted into clean)."
        )


def check_gap(clean: np.ndarray, corrupted: np.ndarray, metric: str) -> np.ndarray:
    """Clean minus corrupted.

    Raises:
        ValueError: it is zero on a prompt, where no effect can be put on the scale, or no number.
    """
    gap = clean - corrupted
    if len(bad := np.flatnonzero(~np.isfinite(gap))):
        raise ValueError(
            f"{metric} is not a number for prompts {bad.tolist()}: an activation or a logit of the model overflows "
            "there. Try dtype='bfloat16' or 'float32'."
        )
    if len(flat := np.flatnonzero(gap == 0)):
        raise ValueError(
            f"{metric} is the same on the clean and the corrupted prompt for prompts {flat.tolist()}: "
            "an effect cannot be put on the scale from 0 to 1. Choose another metric, or drop these prompts."
        )
    return gap


def labelled(
    values: np.ndarray, dims: tuple[str, ...], model: Any, pairs: PromptPairs, coords: dict[str, Any],
    clean: np.ndarray, corrupted: np.ndarray, *, name: str, **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    """A result with prompts, baselines and model written on it."""
    import xarray as xr

    info = models.info(model)
    coords = coords | {
        "prompt": np.arange(len(pairs)),
        "template": ("prompt", list(pairs.template)),
        "clean": ("prompt", clean),
        "corrupted": ("prompt", corrupted),
    }
    attrs |= {
        "model": info.name, "processing": info.processing, "seed": info.seed,
        "mean_clean": float(clean.mean()), "mean_corrupted": float(corrupted.mean()),
    }  # fmt: skip
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs, name=name)
