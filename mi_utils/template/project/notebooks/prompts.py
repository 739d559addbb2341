"""The prompts of this study. Rewrite this file first: every notebook takes its prompts from here.

The starter prompts are the course's indirect objects ("Mary and John went to the store, John gave a drink to"), so that
everything runs before you have written a line. Your own are four lists, one entry for each pair::

    return PromptPairs(
        net,
        clean=["The capital of France is", ...],  # the answer " Paris" is due
        corrupted=["The capital of Italy is", ...],  # as many tokens, changed in what matters: " Rome" is due
        correct=[" Paris", ...],  # single tokens, with the leading space
        incorrect=[" Rome", ...],
        check=check,
    )
"""

from __future__ import annotations

from typing import Any

from mi_utils import PromptPairs, ioi_pairs


def discovery(net: Any, seed: int, check: bool = True) -> PromptPairs:
    """Pairs to look at, and to choose heads on. What they show is a hypothesis."""
    return ioi_pairs(net, n=16, seed=seed, split="train", check=check)


def confirmation(net: Any, seed: int, check: bool = True) -> PromptPairs:
    """Pairs of the same kind that nobody has looked at: for the evidence in 05, and for nothing else.

    Another draw is enough here, out of many thousand sentences; 05 refuses if one was drawn twice. With few sentences
    split what varies, such as the nouns, and draw from the two parts.
    """
    return ioi_pairs(net, n=16, seed=seed + 1000, split="train", check=check)
