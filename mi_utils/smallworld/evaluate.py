"""What the embedded models can do, on prompts that training never showed: `python -m mi_utils.smallworld.evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mi_utils.smallworld import corpus

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"


class Measurement(NamedTuple):
    """One figure, the bar it must reach, and how many prompts it was measured on."""

    behaviour: str
    measure: str
    value: float
    bar: float
    n: int

    @property
    def reached(self) -> bool:
        return self.value >= self.bar


class Evaluation:
    """The behaviours of one model. Prompts depend on `seed` alone, so models can be compared prompt by prompt."""

    def __init__(
        self, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, n: int = 400, seed: int = 1_000_003
    ) -> None:
        self.model, self.tokenizer, self.n, self.seed = model.eval(), tokenizer, n, seed

    @classmethod
    def load(cls, folder: Path, n: int = 400) -> Evaluation:
        """Load a model directory written by the trainer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return cls(model, AutoTokenizer.from_pretrained(folder), n)

    @torch.no_grad()
    def last_logits(self, texts: Sequence[str]) -> Tensor:
        """Logits [prompt, d_vocab] after BOS and each text. Padding stands on the right, where nothing looks at it."""
        bos, rows = self.tokenizer.bos_token_id, []
        for start in range(0, len(texts), 100):
            ids = [[bos, *self.tokenizer.encode(text)] for text in texts[start : start + 100]]
            longest = max(map(len, ids))
            tokens = torch.tensor([row + [bos] * (longest - len(row)) for row in ids])
            logits = self.model(tokens).logits
            rows.append(logits[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])])
        return torch.cat(rows)

    def token(self, text: str) -> int:
        """The single token of `text`; raises ValueError when it is several."""
        ids = self.tokenizer.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens of this tokenizer, an answer must be one")
        return ids[0]

    def _column(self, logits: Tensor, texts: Sequence[str]) -> Tensor:
        return logits[torch.arange(len(texts)), torch.tensor([self.token(text) for text in texts])]

    def ioi(self, split: str) -> list[Measurement]:
        rng = Random(self.seed)
        prompts = [corpus.ioi_prompt(rng, split) for _ in range(self.n)]
        logits = self.last_logits([prompt.text for prompt in prompts])
        difference = self._column(logits, [" " + p.io for p in prompts]) - self._column(
            logits, [" " + p.s for p in prompts]
        )
        name = f"IOI, {split.replace('_', ' ').replace('held out', 'held-out')}"
        return [
            Measurement(name, "IO over S", (difference > 0).float().mean().item(), 0.95, self.n),
            Measurement(name, "mean logit difference", difference.mean().item(), 3.0, self.n),
        ]

    @torch.no_grad()
    def induction(self, period: int = 25, rows: int = 40) -> list[Measurement]:
        """Random tokens, repeated once. Prefix matching (Olsson et al., 2022): attention from a repeated token to the
        token after its first occurrence, the best head's mean."""
        rng, bos = np.random.default_rng(self.seed), self.tokenizer.bos_token_id
        once = torch.from_numpy(rng.choice(np.delete(np.arange(len(self.tokenizer)), bos), (rows, period)))
        tokens = torch.cat([torch.full((rows, 1), bos), once, once], dim=1)
        output = self.model(tokens, output_attentions=True)
        guesses = output.logits[:, period + 1 : -1].argmax(-1)
        right = (guesses == tokens[:, period + 2 :]).float().mean().item()
        query = torch.arange(period + 1, 2 * period + 1)
        scores = torch.stack([layer[:, :, query, query - period + 1].mean((0, 2)) for layer in output.attentions])
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        return [
            Measurement("induction", "accuracy on the repeat", right, 0.9, rows * (period - 1)),
            Measurement("induction", f"prefix matching, L{layer}H{head}", scores.max().item(), 0.6, rows * period),
        ]

    def facts(self) -> list[Measurement]:
        rng, rows = Random(self.seed), []
        for relation in corpus.RELATIONS:
            prompts = [corpus.fact_prompt(rng, relation, "held_out") for _ in range(self.n)]
            top = self.last_logits([prompt.text for prompt in prompts]).argmax(-1)
            right = np.mean([int(t) == self.token(" " + p.answer) for t, p in zip(top, prompts, strict=True)])
            rows.append(Measurement(f"{relation} of a country, held-out phrasing", "top-1", float(right), 0.9, self.n))
        return rows

    def choices(self) -> list[Measurement]:
        """Agreement as a choice of two forms; docstrings, pronouns and closing marks by the most likely token."""
        rng, rows = Random(self.seed), []
        prompts = [corpus.agreement_prompt(rng, "held_out") for _ in range(self.n)]
        logits = self.last_logits([prompt.text for prompt in prompts])
        difference = self._column(logits, [p.correct for p in prompts]) - self._column(
            logits, [p.incorrect for p in prompts]
        )
        rows.append(
            Measurement(
                "agreement over an attractor", "correct form", (difference > 0).float().mean().item(), 0.95, self.n
            )
        )
        families = {
            "docstring argument": [corpus.docstring_prompt(rng) for _ in range(self.n)],
            "gendered pronoun": [corpus.pronoun_prompt(rng, "held_out") for _ in range(self.n)],
            "closing bracket or quote": [corpus.enclosed_prompt(rng) for _ in range(self.n)],
        }
        for name, prompts in families.items():
            top = self.last_logits([prompt.text for prompt in prompts]).argmax(-1)
            right = np.mean([int(t) == self.token(p.correct) for t, p in zip(top, prompts, strict=True)])
            rows.append(Measurement(name, "top-1", float(right), 0.9, self.n))
        return rows

    def greater_than(self) -> list[Measurement]:
        """Probability of the years after the start minus that of the others (Hanna et al., arXiv:2305.00586)."""
        rng = Random(self.seed)
        prompts = [corpus.year_prompt(rng, "held_out") for _ in range(self.n)]
        columns = [self.token(f"{year:02d}") for year in range(100)]
        probabilities = self.last_logits([document.text for document, _ in prompts]).softmax(-1)[:, columns]
        later = torch.arange(100) > torch.tensor([start for _, start in prompts])[:, None]
        difference = (probabilities * (2 * later.float() - 1)).sum(-1).mean().item()
        return [Measurement("greater-than years", "probability difference", difference, 0.7, self.n)]

    def all(self) -> list[Measurement]:
        """Every behaviour, in the order of the table."""
        return [
            *self.ioi("held_out_names"),
            *self.ioi("held_out_templates"),
            *self.induction(),
            *self.facts(),
            *self.choices(),
            *self.greater_than(),
        ]


def main(names: Sequence[str] = (), n: int = 400) -> bool:
    """Print the behaviour table of the named models (all final ones unless told); whether every bar is reached."""
    from rich.console import Console
    from rich.table import Table

    known = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no embedded model {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = list(names) or [name for name in known if "-step" not in name]
    columns = [Evaluation.load(ASSETS / name, n).all() for name in chosen]
    table = Table(title=f"Held-out behaviour, {n} prompts a row")
    for heading in ("behaviour", "measure", "bar", *chosen):
        table.add_column(heading, justify="left" if heading in ("behaviour", "measure") else "right")
    for row in zip(*columns, strict=True):
        cells = [f"[{'green' if m.reached else 'red'}]{m.value:.3f}[/]" for m in row]
        table.add_row(row[0].behaviour, row[0].measure.split(",")[0], f"{row[0].bar:g}", *cells)
    Console(width=max(100, 70 + 18 * len(chosen))).print(table)
    return all(m.reached for column in columns for m in column)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
