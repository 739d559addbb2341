"""The procedure of the case study in notebooks 02 to 05: what is predicted, and how each measurement is made.

It stands here because three readers need the very same one: the notebooks, the negative control in notebook 05, and
:mod:`mi_utils.calibration`, which runs it where the answer is known.

Prompts come from ``pairs``, a function ``pairs(network, n=, seed=, split=, check=)`` that returns ``PromptPairs``;
:func:`mi_utils.prompts.ioi_pairs` unless told otherwise. ``check=False`` is for networks that do not know the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mi_utils import models
from mi_utils.compute import ModelShape
from mi_utils.patching import ablate, patch_sweep
from mi_utils.prompts import PromptPairs, ioi_pairs, watch_prompts
from mi_utils.stats import Estimate, bootstrap_interval, pooled_effect
from mi_utils.study import Prediction, Study

N_PAIRS = 24
N_RANDOM_SETS = 20
HELD_OUT = "held_out_templates"

Place = tuple[int, int]
Pairs = Callable[..., PromptPairs]

PREDICTIONS = (
    Prediction(
        "mean logit difference", ">=", 1.0,
        "On fresh prompts the model prefers the indirect object by at least one logit.", "effect_size",
    ),
    Prediction(
        "necessity of the found heads", ">=", 0.5,
        "On fresh prompts, ablating the found heads takes away at least half of the difference.", "causal",
    ),
    Prediction(
        "necessity on held-out templates", ">=", 0.5,
        "The same holds for templates and pairs of names that were held out.", "held_out",
    ),
    Prediction(
        "smallest necessity over seeds", ">=", 0.5,
        "Finding and testing the heads anew for each other seed gives the same, in the worst of them.", "seeds",
    ),
    Prediction(
        "necessity of random heads", "<=", 0.3,
        "Sets of as many heads, drawn at random from the others, do little harm on average.", "alternatives",
    ),
)  # fmt: skip


def n_found(shape: ModelShape) -> int:
    """How many heads may be called found: a tenth of all, and at least three.

    Raises:
        ValueError: fewer than twice as many heads, so that no random set without a found one could be drawn.
    """
    heads = shape.n_layers * shape.n_heads
    count = max(3, math.ceil(0.1 * heads))
    if heads < 2 * count:
        raise ValueError(f"{heads} heads: random sets of {count} without a found head need at least {2 * count}.")
    return count


def discover(network: Any, seed: int, check: bool = True, pairs: Pairs = ioi_pairs) -> list[Place]:
    """The :func:`n_found` heads with the largest pooled patching effect, the largest first, as (layer, head)."""
    prompts = pairs(network, n=N_PAIRS, seed=seed, split="train", check=check)
    effect = pooled_effect(patch_sweep(network, prompts, site="z", over=("layer", "head"), progress=False))
    order = np.argsort(-effect.values, axis=None)[: n_found(models.info(network).shape)]
    return [tuple(map(int, np.unravel_index(i, effect.shape))) for i in order]


def preference(network: Any, seed: int, check: bool = True, pairs: Pairs = ioi_pairs) -> Estimate:
    """Mean logit difference on fresh pairs, in logits, with its interval."""
    prompts = pairs(network, n=N_PAIRS, seed=seed, split="train", check=check)
    return bootstrap_interval(prompts.clean_logit_diff.cpu().numpy(), seed=seed)


def necessity(
    network: Any, places: Sequence[Place], seed: int, split: str = "train", check: bool = True, pairs: Pairs = ioi_pairs
) -> Estimate:
    """Share of the clean-corrupted difference that is lost when these heads write what they write on the corrupted
    prompt: 0 where nothing is lost, 1 where all is. Mean over prompts."""
    prompts = pairs(network, n=N_PAIRS, seed=seed, split=split, check=check)
    return bootstrap_interval(1 - ablate(network, prompts, places, kind="corrupted"), seed=seed)


def over_seeds(
    cases: Sequence[tuple[Any, int]], check: bool = True, pairs: Pairs = ioi_pairs, find: Callable = discover
) -> Estimate:
    """Discovery and necessity anew in each case, a network and a prompt seed; the case with the lowest interval."""
    estimates = [
        necessity(network, find(network, seed, check, pairs), seed + 1, check=check, pairs=pairs)
        for network, seed in cases
    ]
    return min(estimates, key=lambda estimate: estimate.low)


def other_heads(network: Any, places: Sequence[Place]) -> list[Place]:
    """All heads but ``places``.

    Raises:
        ValueError: fewer of them than of ``places``, so that no random set of as many can be drawn.
    """
    shape, found = models.info(network).shape, {(int(layer), int(head)) for layer, head in places}
    rest = [(a, b) for a in range(shape.n_layers) for b in range(shape.n_heads) if (a, b) not in found]
    if len(rest) < len(found):
        raise ValueError(f"{len(rest)} heads beside the {len(found)} found: no random set of as many can be drawn.")
    return rest


def random_sets(
    network: Any, places: Sequence[Place], seed: int, check: bool = True, pairs: Pairs = ioi_pairs
) -> list[float]:
    """Mean necessity of each of 20 random sets of as many heads, none of them among ``places``."""
    rest, generator = other_heads(network, places), np.random.default_rng(seed)
    prompts = pairs(network, n=N_PAIRS, seed=seed, split="train", check=check)
    draws = [generator.permutation(len(rest))[: len(places)] for _ in range(N_RANDOM_SETS)]
    sets = [[rest[i] for i in draw] for draw in draws]
    return [float((1 - ablate(network, prompts, each, kind="corrupted")).mean()) for each in sets]


def random_necessity(
    network: Any, places: Sequence[Place], seed: int, check: bool = True, pairs: Pairs = ioi_pairs
) -> Estimate:
    """Mean over the :func:`random_sets`, with its interval over sets."""
    return bootstrap_interval(random_sets(network, places, seed, check, pairs), seed=seed)


def carry_out(
    study: Study, network: Any, cases: Sequence[tuple[Any, int]], check: bool = True, pairs: Pairs = ioi_pairs,
    find: Callable = discover,
) -> list[Place]:  # fmt: skip
    """All of a locked study: find the heads on its seed's prompts, then add the five measurements on others.

    Args:
        study: with the predictions above.
        cases: the other networks, or other prompt seeds, for ``over_seeds``.
        find: called as :func:`discover`. Another one is for controls whose heads are not to be the right ones.

    Returns:
        The found heads.
    """
    with watch_prompts() as explored:
        found = find(network, study.seed, check, pairs)
    study.explore(sorted(explored))
    fresh, how = study.seed + 1, {"check": check, "pairs": pairs}
    study.add("mean logit difference", preference, network, fresh, **how)
    study.add("necessity of the found heads", necessity, network, found, fresh, **how)
    study.add("necessity on held-out templates", necessity, network, found, fresh, split=HELD_OUT, **how)
    study.add("smallest necessity over seeds", over_seeds, cases, find=find, **how)
    study.add("necessity of random heads", random_necessity, network, found, fresh, **how)
    return found
