"""One head, looked at from all sides: its pattern, its OV and QK circuits, and what is lost without it.

Source of the kinds of head: Elhage et al. 2021; Olsson et al. 2022 (arXiv:2209.11895).
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mi_utils import models, ov_qk
from mi_utils.heads import head_scores, repeated_random_tokens
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    from rich.table import Table

PATTERN_BAR = 0.4  # mean attention from which a pattern gives a head its name
COPYING_BAR = 0.5  # size of the eigenvalue score from which a head is called copying or anti-copying
NO_NAME = "no known pattern"
PATTERNS = {"previous_token": "previous token", "duplicate_token": "duplicate token", "prefix_matching": "induction"}
OTHERS = 3  # heads that are ablated for comparison
SEQUENCES = 8  # of random tokens said twice


class Evidence(NamedTuple):
    """One finding about the head, and the same about other heads."""

    kind: str  # pattern, OV, QK or mean ablation
    what: str
    value: float
    others: float  # median over the model's other heads; for ablation the mean over a few of the layer's


@dataclass(frozen=True)
class HeadReport:
    """What is known about a head. Shows as a table in a notebook; ``print`` and rich show it in a terminal.

    Attributes:
        names: those that the evidence gives, the strongest pattern first, or only "no known pattern".
        evidence: every finding beside that of other heads. Attention and copying scores are shares, ablations in
            nats (repeated random tokens) or shares of the effect (prompt pairs).
        notes: what has to be known to read the numbers.
    """

    model: str
    layer: int
    head: int
    names: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    def __getitem__(self, what: str) -> float:
        """The value of one finding, by what was measured."""
        found = {each.what: each.value for each in self.evidence}
        if what not in found:
            raise KeyError(f"The report has no {what!r}; it has {', '.join(found)}.")
        return found[what]

    @property
    def title(self) -> str:
        """Head, names and model in a line."""
        return f"L{self.layer}H{self.head} of {self.model}: {', '.join(self.names)}"

    def __str__(self) -> str:
        kind, width = (max(len(getattr(each, field)) for each in self.evidence) for field in ("kind", "what"))
        lines = [self.title, f"{'':{kind}} {'':{width}} {'this head':>9} {'others':>7}"]
        lines += [f"{e.kind:{kind}} {e.what:{width}} {e.value:9.2f} {e.others:7.2f}" for e in self.evidence]
        return "\n".join([*lines, *self.notes])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self.title, caption=" ".join(self.notes), title_justify="left", caption_justify="left")
        for column in ("", "measured", "this head", "others"):
            table.add_column(column, justify="right" if column in ("this head", "others") else "left")
        for each in self.evidence:
            table.add_row(each.kind, each.what, f"{each.value:.2f}", f"{each.others:.2f}")
        return table

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{e.kind}</td><td style='text-align:left'>{escape(e.what)}</td>"
            f"<td>{e.value:.2f}</td><td>{e.others:.2f}</td></tr>"
            for e in self.evidence
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        head = "<tr><th></th><th>measured</th><th>this head</th><th>others</th></tr>"
        return f"<h4>{escape(self.title)}</h4><table>{head}{rows}</table>{notes}"


def head_report(model: Any, layer: int, head: int, *, pairs: PromptPairs | None = None, seed: int = 0) -> HeadReport:
    """Collect pattern scores, OV and QK evidence and the effect of ablation for one head, and name it.

    A head is called *previous token*, *duplicate token* or *induction* where its mean attention on repeated random
    tokens is at least 0.4 there; *copying* or *anti-copying* where its eigenvalue score, on plain embeddings or on
    those the first MLP has rewritten, is at least 0.5 in size. A head that is none of these has "no known pattern".

    Args:
        pairs: prompts of a task, to ablate the head on as well (its z replaced by its mean over the prompts).
        seed: draws the random tokens and the heads of the layer that are ablated for comparison.

    What it does not show: what the head does on other text. Random tokens call for some kinds of head and leave
    others idle, so "no known pattern" says that nothing was seen here. The bars are conventions. A head with backups
    loses little when it is ablated alone. Mean ablation sees no loss where a head writes the same on all clean prompts.

    Raises:
        ValueError: a layer or head that the model has not.
    """
    info = models.info(model)
    ov_qk.check_index("layer", layer, info.shape.n_layers)
    ov_qk.check_index("head", head, info.shape.n_heads)
    if pairs is not None:
        pairs.check_model(model)
    scores = head_scores(model, seed=seed, n=SEQUENCES)
    evidence, notes = [], []

    def add(kind: str, what: str, values: Any) -> float:
        values = np.asarray(values, dtype=float)
        others = np.delete(values.ravel(), layer * info.shape.n_heads + head)
        evidence.append(Evidence(kind, what, float(values[layer, head]), float(np.nanmedian(others))))
        return evidence[-1].value

    seen = {name: add("pattern", f"attention: {words}", scores[key]) for key, name, words in _pattern_words()}
    written = float(models.W_O(model, layer)[head].abs().max())
    copying = [
        add("OV", f"copying, {embedding} embeddings", ov_qk.copying_scores(model, embedding=embedding))
        for embedding in ov_qk.EMBEDDINGS
    ]
    if models.scores_are_bilinear(model):
        weights = ov_qk.weight_scores(model, embedding="direct" if layer == 0 else "effective")
        add("QK", "positions alone: attention to the token before", weights["previous_token"])
        add("QK", "tokens alone: seeks its own token", weights["duplicate_token"])
        through = weights.attrs["previous_token_head"]
        if float(weights["previous_token"].max()) >= PATTERN_BAR:
            add("QK", f"through {through}: seeks what follows its own token", weights["induction"])
        else:
            notes.append("No head looks at the token before by its positions alone, so there is none to seek through.")
    else:
        notes.append("No QK evidence: with this model's positions the weights alone do not say what a query seeks.")
    evidence += _ablations(model, layer, head, pairs, seed, scores.attrs["length"])
    if written == 0:
        notes.append("This head writes nothing: its output matrix is zero.")
    if (right := scores.attrs["induction_accuracy"]) < 0.2:
        notes.append(f"The model predicts {right:.0%} of the repeated tokens right, so ablation has little to take.")
    names = [name for name in sorted(seen, key=seen.get, reverse=True) if seen[name] >= PATTERN_BAR]
    strongest = max(copying, key=abs)
    if abs(strongest) >= COPYING_BAR:
        names.append("copying" if strongest > 0 else "anti-copying")
    return HeadReport(info.name, layer, head, tuple(names or [NO_NAME]), tuple(evidence), tuple(notes))


def _pattern_words() -> list[tuple[str, str, str]]:
    words = ("the token before", "the same token earlier", "what followed it earlier (induction)")
    return [(key, name, text) for (key, name), text in zip(PATTERNS.items(), words, strict=True)]


def _ablations(model: Any, layer: int, head: int, pairs: PromptPairs | None, seed: int, length: int) -> list[Evidence]:
    """What is lost without the head, and without each of a few others of its layer."""
    n_heads = models.info(model).shape.n_heads
    drawn = np.random.default_rng(seed).permutation(n_heads)
    heads = [head, *[int(other) for other in drawn if other != head][:OTHERS]]
    tokens = repeated_random_tokens(model, seed=seed, n=SEQUENCES, length=length)
    z = models.cache(model, tokens, ["z"], layers=[layer])["z", layer].mean(0)
    intact = _repeat_log_prob(model, tokens)
    losses = []
    for each in heads:

        def mean_ablate(activation: torch.Tensor, hook: Any, each: int = each) -> torch.Tensor:
            activation = activation.clone()
            activation[:, :, each] = z[:, each]
            return activation

        losses.append(intact - _repeat_log_prob(model, tokens, [(models.hook_name("z", layer), mean_ablate)]))
    found = [("repeated tokens: nats lost", losses)]
    if pairs is not None:
        from mi_utils.patching import ablate
        from mi_utils.results import NothingChanged

        def lost(each: int) -> float:
            try:
                return 1 - float(ablate(model, pairs, [(layer, each)], kind="mean").mean())
            except NothingChanged:
                return 0.0

        found.append(("prompt pairs: share of the effect lost", [lost(each) for each in heads]))
    return [
        Evidence("mean ablation", what, values[0], float(np.mean(values[1:])) if len(values) > 1 else float("nan"))
        for what, values in found
    ]


def _repeat_log_prob(model: Any, tokens: torch.Tensor, hooks: Any = ()) -> float:
    """Mean log-probability of the repeat's tokens, from its second on."""
    log_probs = models.run_with_hooks(model, tokens, hooks).float().log_softmax(-1)
    start = (tokens.shape[1] + 1) // 2
    predicted, right = log_probs[:, start:-1], tokens[:, start + 1 :]
    return float(predicted.gather(-1, right[..., None]).mean())
