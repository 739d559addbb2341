"""What is measured on logits. Each function takes logits [prompt, pos, d_vocab] and looks at the last position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from mi_utils.prompts import PromptPairs

Logits = Float[Tensor, "prompt pos d_vocab"]
PerPrompt = Float[Tensor, " prompt"]
Metric = Callable[[Logits], PerPrompt]


def _column(values: Float[Tensor, "prompt d_vocab"], ids: Int[Tensor, " prompt"]) -> PerPrompt:
    return values.gather(-1, ids.to(values.device)[:, None])[:, 0]


def logit_difference(logits: Logits, correct: Int[Tensor, " prompt"], incorrect: Int[Tensor, " prompt"]) -> PerPrompt:
    """Logit of the correct answer minus that of the incorrect one (Wang et al., arXiv:2211.00593)."""
    last = logits[:, -1].float()
    return _column(last, correct) - _column(last, incorrect)


def answer_log_prob(logits: Logits, correct: Int[Tensor, " prompt"]) -> PerPrompt:
    """Log-probability of the correct answer, in nats."""
    return _column(logits[:, -1].float().log_softmax(-1), correct)


def answer_rank(logits: Logits, correct: Int[Tensor, " prompt"]) -> Int[Tensor, " prompt"]:
    """How many tokens have a larger logit than the correct answer: 0 is the top."""
    last = logits[:, -1].float()
    return (last > _column(last, correct)[:, None]).sum(-1)


def kl_divergence(reference: Logits, other: Logits) -> PerPrompt:
    """KL(reference ‖ other) of the next-token distributions, in nats."""
    p, q = (logits[:, -1].float().log_softmax(-1) for logits in (reference, other))
    return (p.exp() * (p - q)).sum(-1)


def accuracy(logits: Logits, correct: Int[Tensor, " prompt"], incorrect: Int[Tensor, " prompt"]) -> float:
    """Share of prompts on which the correct answer has the larger logit of the two."""
    return (logit_difference(logits, correct, incorrect) > 0).float().mean().item()


@dataclass(frozen=True)
class LogitDiff:
    """Logit difference as a declared metric: an engine can read off that it needs two columns of one position.

    Any metric may declare itself so: ``columns`` names the tokens, ``of_columns`` takes their logits at the last
    position, and calling it with all logits gives the same.
    """

    correct: Int[Tensor, " prompt"]
    incorrect: Int[Tensor, " prompt"]

    @property
    def columns(self) -> Int[Tensor, "prompt column"]:
        """The tokens whose logits are needed."""
        return torch.stack([self.correct, self.incorrect], dim=1)

    @staticmethod
    def of_columns(logits: Float[Tensor, "prompt column"]) -> PerPrompt:
        """The metric, from the logits of ``columns``."""
        correct, incorrect = logits.float().unbind(1)
        return correct - incorrect

    def __call__(self, logits: Logits) -> PerPrompt:
        return logit_difference(logits, self.correct, self.incorrect)


@dataclass(frozen=True)
class LogProb:
    """Log-probability of the correct answer as a declared metric."""

    correct: Int[Tensor, " prompt"]

    def __call__(self, logits: Logits) -> PerPrompt:
        return answer_log_prob(logits, self.correct)


METRICS: dict[str, Callable[[PromptPairs], Metric]] = {
    "logit_diff": lambda pairs: LogitDiff(pairs.correct_ids, pairs.incorrect_ids),
    "log_prob": lambda pairs: LogProb(pairs.correct_ids),
}


def resolve(metric: str | Callable[[PromptPairs], Metric]) -> tuple[Callable[[PromptPairs], Metric], str]:
    """A metric given by name or as a function of pairs, as that function and a name for the record.

    Raises:
        ValueError: no metric of that name; or, when it is measured, a function that does not give a value a prompt.
    """
    if callable(metric):
        function = getattr(metric, "func", metric)  # of a functools.partial
        about = function if hasattr(function, "__qualname__") else type(function)
        name = f"{about.__module__}.{about.__qualname__}"
        return lambda pairs: _checked(metric(pairs), name), name
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: there are {', '.join(METRICS)}; or pass a function of pairs.")
    return METRICS[metric], metric


def _checked(metric: Metric, name: str) -> Metric:
    if hasattr(metric, "columns"):
        return metric

    def measure(logits: Logits) -> PerPrompt:
        values = metric(logits)
        if values.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} gave values of shape {tuple(values.shape)} for {len(logits)} prompts. A metric gives one "
                "number a prompt, no mean over prompts, from logits [prompt, 1, d_vocab] of the last position."
            )
        return values

    return measure
