"""Pairs of prompts: one on which the model shows the behaviour, and one that differs from it in what matters."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.metrics import logit_difference

BATCH = 64  # prompts in one forward pass of the check


class ModelDoesNotKnowTask(RuntimeError):
    """The model does not show the behaviour on the clean prompts, so there is nothing to explain."""


_WATCHERS: list[set[str]] = []


@contextmanager
def watch_prompts() -> Iterator[set[str]]:
    """Collect the texts, clean and corrupted, of all pairs that are used while the block runs.

    A study learns in this way which prompts a measurement was made on, without having to believe anyone.
    """
    seen: set[str] = set()
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        _WATCHERS[:] = [watcher for watcher in _WATCHERS if watcher is not seen]


class PromptPairs:
    """Clean and corrupted prompts with their answers, checked before any compute is spent on them.

    Args:
        model: from ``load_model``; its tokenizer decides what a token is.
        clean: prompts on which the correct answer is due, BOS not included.
        corrupted: for each the same prompt with what matters changed, as many tokens long.
        correct, incorrect: the answers, with their leading space (" Mary"); each a single token.
        check: ask whether the model knows the task (one run of the prompts). False is for controls with random
            weights and for benchmarks; everything else is checked all the same.
        template: a label for each prompt, to group results by.
        roles: what stands where, {"S2": 9}; the same position in all prompts, negative ones counted from the end.
        min_accuracy: share of the clean prompts on which the model must prefer the correct answer.

    Attributes:
        clean, corrupted, correct, incorrect, template: tuples of strings, one for each prompt.
        clean_tokens, corrupted_tokens: [prompt, pos], each with one BOS in front, on the model's device.
        correct_ids, incorrect_ids: [prompt].
        roles: role to position, counted from BOS at 0.

    Raises:
        ValueError: lists of different lengths or empty, prompts of different lengths in tokens, BOS missing or
            doubled, an answer that is several tokens, the same answer or the same prompt twice in a pair, a role
            outside the prompt; with ``check`` also a pair whose two prompts get the same logit difference.
        ModelDoesNotKnowTask: with ``check``, when the model prefers the correct answer too seldom.
    """

    def __init__(
        self,
        model: Any,
        clean: Sequence[str],
        corrupted: Sequence[str],
        correct: Sequence[str],
        incorrect: Sequence[str],
        *,
        check: bool = True,
        template: Sequence[str] | None = None,
        roles: Mapping[str, int] | None = None,
        min_accuracy: float = 0.7,
    ) -> None:
        columns = {"clean": clean, "corrupted": corrupted, "correct": correct, "incorrect": incorrect}
        columns["template"] = ["all"] * len(clean) if template is None else template
        _check_columns(columns)
        self.clean, self.corrupted, self.correct, self.incorrect, self.template = map(tuple, columns.values())
        self.model_name: str = models.info(model).name
        self._model = model
        self._logit_diffs: tuple[Tensor, Tensor] | None = None

        self.clean_tokens = models.to_tokens(model, self.clean)
        self.corrupted_tokens = models.to_tokens(model, self.corrupted)
        _check_lengths(self)
        self.correct_ids: Int[Tensor, " prompt"] = self._answer_ids(self.correct)
        self.incorrect_ids: Int[Tensor, " prompt"] = self._answer_ids(self.incorrect)
        self.roles: dict[str, int] = _positions(roles or {}, self.clean_tokens.shape[1])
        _check_pairs(self)
        if check:
            _check_knowledge(self, min_accuracy)

    @property
    def clean_tokens(self) -> Int[Tensor, "prompt pos"]:
        self._used()
        return self._clean_tokens

    @clean_tokens.setter
    def clean_tokens(self, tokens: Int[Tensor, "prompt pos"]) -> None:
        self._clean_tokens = tokens

    @property
    def corrupted_tokens(self) -> Int[Tensor, "prompt pos"]:
        self._used()
        return self._corrupted_tokens

    @corrupted_tokens.setter
    def corrupted_tokens(self, tokens: Int[Tensor, "prompt pos"]) -> None:
        self._corrupted_tokens = tokens

    def _used(self) -> None:
        """Tell those who watch that these prompts are used: whoever measures anything reads the tokens."""
        for watcher in _WATCHERS:
            watcher.update(self.clean, self.corrupted)

    def _answer_ids(self, answers: Sequence[str]) -> Int[Tensor, " prompt"]:
        ids = {answer: models.single_token(self._model, answer) for answer in dict.fromkeys(answers)}
        return torch.tensor([ids[answer] for answer in answers], device=self.clean_tokens.device)

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        length = self._clean_tokens.shape[1]
        return f"PromptPairs({len(self)} pairs of {length} tokens for {self.model_name}, first: {self.clean[0]!r})"

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool]) -> PromptPairs:
        """Some of the pairs, as pairs: by number, slice, list of numbers or mask. Nothing is run again.

        Raises:
            IndexError: no such pair, or none left.
        """
        chosen = np.atleast_1d(np.arange(len(self))[index.tolist() if isinstance(index, Tensor) else index])
        if not len(chosen):
            raise IndexError("No pairs left: the selection is empty.")
        rows = torch.as_tensor(chosen, device=self._clean_tokens.device)
        part = copy.copy(self)
        for name in ("clean", "corrupted", "correct", "incorrect", "template"):
            setattr(part, name, tuple(map(getattr(self, name).__getitem__, chosen.tolist())))
        for name in ("_clean_tokens", "_corrupted_tokens", "correct_ids", "incorrect_ids"):
            setattr(part, name, getattr(self, name)[rows])
        if self._logit_diffs is not None:
            part._logit_diffs = (self._logit_diffs[0][rows], self._logit_diffs[1][rows])
        return part

    def check_model(self, model: Any) -> None:
        """Refuse a model whose tokenizer reads these prompts otherwise: its numbers would be about other words.

        Another seed or an untrained twin of the model the pairs were made with is welcome.

        Raises:
            ValueError: the tokens or the answers differ.
        """
        if model is self._model:
            return
        try:
            tokens, correct, incorrect = models.to_tokens(model, self.clean), self.correct_ids, self.incorrect_ids
            same = torch.equal(tokens.cpu(), self.clean_tokens.cpu())
            for answers, ids in ((self.correct, correct), (self.incorrect, incorrect)):
                same = same and [models.single_token(model, answer) for answer in answers] == ids.tolist()
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"These pairs were made with {self.model_name}; {models.info(model).name} has another tokenizer. Make "
                "pairs with the model they are run on."
            )

    def swap(self) -> PromptPairs:
        """The corrupted prompts as the clean ones and the other way round, with the answers exchanged too."""
        other = copy.copy(self)
        other.clean, other.corrupted = self.corrupted, self.clean
        other._clean_tokens, other._corrupted_tokens = self._corrupted_tokens, self._clean_tokens
        other.correct, other.incorrect = self.incorrect, self.correct
        other.correct_ids, other.incorrect_ids = self.incorrect_ids, self.correct_ids
        if self._logit_diffs is not None:
            other._logit_diffs = (-self._logit_diffs[1], -self._logit_diffs[0])
        return other

    @property
    def clean_logit_diff(self) -> Float[Tensor, " prompt"]:
        """Logit of the correct answer minus that of the incorrect one, on the clean prompts. Run once, then kept."""
        return self._both_logit_diffs()[0]

    @property
    def corrupted_logit_diff(self) -> Float[Tensor, " prompt"]:
        """The same difference on the corrupted prompts."""
        return self._both_logit_diffs()[1]

    def _both_logit_diffs(self) -> tuple[Tensor, Tensor]:
        self._used()
        if self._logit_diffs is None:
            self._logit_diffs = (self._measure(self.clean_tokens), self._measure(self.corrupted_tokens))
        return self._logit_diffs

    def _measure(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, " prompt"]:
        columns = (tokens, self.correct_ids, self.incorrect_ids)
        batches = zip(*(column.split(BATCH) for column in columns), strict=True)
        parts = [
            logit_difference(models.run(self._model, batch)[:, -1:], right, wrong) for batch, right, wrong in batches
        ]
        return torch.cat(parts).detach()

    @property
    def differs(self) -> Bool[Tensor, "prompt pos"]:
        """Where the two prompts of a pair have different tokens."""
        return self.clean_tokens != self.corrupted_tokens

    @property
    def position_labels(self) -> list[str]:
        """A label for each position of the clean prompts: its number and token, and the role ("7 Mary (IO)").

        Where prompts have different tokens the role alone, or "…".
        """
        labels = []
        for position, column in enumerate(self.clean_tokens.T):
            role = "/".join(name for name, place in self.roles.items() if place == position)
            if (column == column[0]).all():
                token = self._show(int(column[0])) + (f" ({role})" if role else "")
            else:
                token = role or "…"
            labels.append(f"{position} {token}")
        return labels

    def _show(self, token: int) -> str:
        if token == self._model.tokenizer.bos_token_id:
            return "BOS"
        text = models.token_strings(self._model, [token])[0]
        return text.strip() or repr(text)


# ------------------------------------------------------------------------------------------------------------- checks


def _check_columns(columns: Mapping[str, Sequence[str]]) -> None:
    for name, column in columns.items():
        if isinstance(column, str):
            raise ValueError(f"{name} is a single string: give a list, one entry for each prompt.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"Lists of different lengths: {counts}. Each pair needs one entry of each.")
    if not lengths["clean"]:
        raise ValueError("No prompts: give at least one pair.")


def _check_lengths(pairs: PromptPairs) -> None:
    clean, corrupted = pairs.clean_tokens.shape[1], pairs.corrupted_tokens.shape[1]
    if clean != corrupted:
        raise ValueError(
            f"Clean prompts are {clean} tokens long and corrupted ones {corrupted}: {pairs.clean[0]!r} against "
            f"{pairs.corrupted[0]!r}. Activations are exchanged position by position, so make them equally long "
            "(replace words by others of as many tokens)."
        )


def _check_pairs(pairs: PromptPairs) -> None:
    same = (~pairs.differs.any(dim=1)).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"Clean and corrupted prompt are the same in pairs {same}: {pairs.clean[same[0]]!r}. Change in the "
            "corrupted one what the answer depends on."
        )
    same = (pairs.correct_ids == pairs.incorrect_ids).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"Correct and incorrect answer are the same in pairs {same}: {pairs.correct[same[0]]!r}. Their logits "
            "would always differ by 0."
        )


def _positions(roles: Mapping[str, int], length: int) -> dict[str, int]:
    if outside := {role: position for role, position in roles.items() if not -length <= position < length}:
        raise ValueError(f"Roles outside the prompts of {length} tokens (BOS is 0): {outside}.")
    return {role: int(position) % length for role, position in roles.items()}


def _check_knowledge(pairs: PromptPairs, min_accuracy: float) -> None:
    clean, corrupted = pairs.clean_logit_diff, pairs.corrupted_logit_diff
    right = float((clean > 0).float().mean())
    if right < min_accuracy:
        worst = int(clean.argmin())
        raise ModelDoesNotKnowTask(
            f"{pairs.model_name} prefers the correct answer on {right:.0%} of {len(pairs)} clean prompts, and at least "
            f"{min_accuracy:.0%} is needed: what a model does not do cannot be explained. Worst: "
            f"{pairs.clean[worst]!r} wants {pairs.correct[worst]!r}, logit difference {clean[worst]:.2f}. Change the "
            "prompts or the model; check=False is for controls with random weights."
        )
    equal = (clean == corrupted).nonzero().flatten().tolist()
    if equal:
        raise ValueError(
            f"Clean and corrupted prompt get the same logit difference in pairs {equal}: {pairs.clean[equal[0]]!r}. "
            "An effect cannot be put on the scale from 0 (corrupted) to 1 (clean) there. Corrupt what the answer "
            "depends on, or drop these pairs."
        )


# ------------------------------------------------------------------------------- indirect object identification


def ioi_pairs(
    model: Any,
    n: int = 32,
    seed: int = 0,
    split: str = "train",
    order: str = "any",
    align: bool = True,
    check: bool = True,
    min_accuracy: float = 0.7,
) -> PromptPairs:
    """Pairs for indirect object identification: "When Mary and John went to the store, John gave a drink to".

    In the corrupted prompt the second mention of the subject (S2) is the indirect object (IO), so that one token
    differs and the other name is due. Correct is " IO", incorrect " S". Only words that are single tokens for this
    model's tokenizer are used.

    Args:
        n: number of pairs.
        seed: draws the prompts.
        split: which templates and pairs of names: "train", "held_out_names", "held_out_templates" (of the embedded
            models' training; other models have seen none of them on purpose).
        order: "ABBA" (IO comes first), "BABA", or "any".
        align: keep prompts of one length in which IO, S1, the token after S1, S2 and the end stand at the same
            positions: the commonest such arrangement of this tokenizer, whatever the seed. That is one order, also
            with "any". Otherwise only the length is the same, and roles are the end's alone.
        check, min_accuracy: as in :class:`PromptPairs`.

    Raises:
        ValueError: unknown split or order, or not enough prompts with this tokenizer.
        ModelDoesNotKnowTask: see :class:`PromptPairs`.

    Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv:2211.00593).
    """
    if n < 1:
        raise ValueError(f"n={n}: ask for at least one pair.")

    def arrangement(candidate: _Candidate) -> Any:
        return tuple(sorted(candidate.roles.items())) if align else candidate.roles["END"]

    known = _ARRANGEMENTS.setdefault(model.tokenizer, {})
    if (split, order, align) not in known:
        pool = list(_candidates(model, Random("ioi arrangement"), split, order, 500))
        seen = Counter(map(arrangement, pool))
        if not seen:
            raise ValueError(f"The tokenizer of {models.info(model).name} splits every IOI prompt's names into pieces.")
        commonest = max(seen, key=lambda key: (seen[key], key))
        known[split, order, align] = commonest, len(pool) / seen[commonest]
    wanted, one_in = known[split, order, align]

    chosen: dict[str, _Candidate] = {}
    tries = 2000 + int(100 * n * one_in)
    for candidate in _candidates(model, Random(seed), split, order, tries):
        if arrangement(candidate) == wanted:
            chosen.setdefault(candidate.prompt.text, candidate)
        if len(chosen) == n:
            break
    else:
        raise ValueError(
            f"Only {len(chosen)} of {n} different IOI prompts found for the tokenizer of {models.info(model).name} "
            f"(split {split!r}, order {order!r}, align={align}). Ask for fewer, or use align=False."
        )
    prompts = [candidate.prompt for candidate in chosen.values()]
    roles = dict(wanted) if align else {"END": wanted}
    return PromptPairs(
        model,
        clean=[prompt.text for prompt in prompts],
        corrupted=[prompt.corrupted for prompt in prompts],
        correct=[" " + prompt.io for prompt in prompts],
        incorrect=[" " + prompt.s for prompt in prompts],
        check=check,
        template=[prompt.template for prompt in prompts],
        roles=dict(sorted(roles.items(), key=lambda item: item[1])),
        min_accuracy=min_accuracy,
    )


# The commonest arrangement for each tokenizer, and how many prompts it takes to meet one: 500 prompts to find out.
_ARRANGEMENTS: WeakKeyDictionary[Any, dict[tuple, tuple[Any, float]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Candidate:
    prompt: Any  # corpus.IOIPrompt
    roles: dict[str, int]


def _candidates(model: Any, rng: Random, split: str, order: str, tries: int) -> Iterator[_Candidate]:
    """Up to ``tries`` IOI prompts in which every name is one token and the two prompts differ in one."""
    from mi_utils.smallworld import corpus

    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    def single(words: Sequence[str]) -> list[str]:
        return [word for word in words if len(encode(" " + word)) == 1]

    words = {"names": corpus.NAMES, "places": corpus.PLACES, "objects": corpus.OBJECTS}
    kept = {kind: single(all_words) for kind, all_words in words.items()}
    if few := [kind for kind, those in kept.items() if len(those) < (20 if kind == "names" else 1)]:
        raise ValueError(
            f"The tokenizer of {models.info(model).name} knows too few {' and '.join(few)} as single tokens for IOI "
            "prompts. Write prompts of your own and give them to PromptPairs."
        )
    for _ in range(tries):
        prompt = corpus.ioi_prompt(rng, split, order, **kept)
        encoded = model.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, corrupted = encoded["input_ids"], encode(prompt.corrupted)
        places = _role_positions(prompt.document.labels, encoded["offset_mapping"])
        if places is None or len(ids) != len(corrupted) or sum(map(int.__ne__, ids, corrupted)) != 1:
            continue
        roles = {"IO": places["IO"], "S1": places["S1"], "S1+1": places["S1"] + 1, "S2": places["S2"]}
        yield _Candidate(prompt, roles | {"END": len(ids)})


def _role_positions(labels: Sequence[Any], offsets: Sequence[tuple[int, int]]) -> dict[str, int] | None:
    """Position (BOS is 0) of each name's role; None where a name is several tokens."""
    places = {}
    for label in labels:
        if label.facet != "role" or label.value not in ("IO", "S1", "S2"):
            continue
        # A token may begin with the space before the name.
        covering = [i for i, (start, end) in enumerate(offsets) if start < label.end and end > label.start]
        if len(covering) != 1:
            return None
        places[label.value] = covering[0] + 1
    return places


# ------------------------------------------------------------------------------------------ the other behaviours

BEHAVIOURS = ("ioi", "induction", "facts", "agreement", "greater_than")


class _Draft(NamedTuple):
    """A pair before it is looked at by a tokenizer. ``changed`` names the tokens in which the prompts differ."""

    clean: str
    corrupted: str
    correct: str
    incorrect: str
    template: str
    changed: tuple[str, ...]


def behaviour_pairs(
    model: Any,
    name: str,
    n: int = 32,
    seed: int = 0,
    split: str = "train",
    *,
    check: bool = True,
    min_accuracy: float = 0.7,
) -> PromptPairs:
    """Pairs for one of the behaviours that the embedded models have learned.

    * "ioi": :func:`ioi_pairs`, aligned.
    * "induction": ten random words, then the first five again; due is what followed the fifth. In the corrupted prompt
      the fifth and the eighth word have changed places, and what follows the eighth is due.
    * "facts": capital, language or currency of a country; the corrupted prompt names another country.
    * "agreement": the verb after a subject and an attractor; the corrupted prompt has the subject's other number.
    * "greater_than": the end year of an event. The corrupted prompt has an earlier start year; correct is a year after
      both, incorrect one between them, so that the corrupted prompt rules neither out (after Hanna et al. 2023,
      arXiv:2305.00586).

    Only prompts whose two versions differ in just these tokens are used, in the commonest arrangement (length and place
    of the changed tokens) of this tokenizer. ``roles`` holds the places of the changed tokens and END.

    Args:
        n, seed: number of pairs, and what draws them.
        split: "train", or "held_out" for what training never showed: pairs of names, phrasings of facts, pairs of
            subject and attractor, pairs of event and year. Random words are new in either.
        check, min_accuracy: as in :class:`PromptPairs`.

    Raises:
        ValueError: unknown name or split, or not enough prompts with this tokenizer.
        ModelDoesNotKnowTask: see :class:`PromptPairs`.
    """
    if name not in BEHAVIOURS:
        raise ValueError(f"Unknown behaviour {name!r}: there are {', '.join(BEHAVIOURS)}.")
    if split not in ("train", "held_out"):
        raise ValueError(f"Unknown split {split!r}: train or held_out.")
    if n < 1:
        raise ValueError(f"n={n}: ask for at least one pair.")
    if name == "ioi":
        split = "train" if split == "train" else "held_out_names"
        return ioi_pairs(model, n, seed, split, check=check, min_accuracy=min_accuracy)

    def draws(rng: Random, tries: int) -> Iterator[tuple[_Draft, tuple[int, ...]]]:
        drafts = _DRAFTS[name](model, rng, split)
        for _ in range(tries):
            draft = next(drafts)
            if (places := _changed_places(model, draft)) is not None:
                yield draft, places

    seen = Counter(places for _, places in draws(Random(f"{name} arrangement"), 300))
    wanted = max(seen, key=lambda key: (seen[key], key)) if seen else ()
    chosen: dict[str, _Draft] = {}
    for draft, places in draws(Random(seed), 2000 + 100 * n):
        if places == wanted:
            chosen.setdefault(draft.clean, draft)
        if len(chosen) == n:
            break
    else:
        raise ValueError(
            f"Only {len(chosen)} of {n} different {name} prompts found for the tokenizer of {models.info(model).name} "
            f"(split {split!r}). Ask for fewer, or write prompts of your own and give them to PromptPairs."
        )
    drafts = list(chosen.values())
    return PromptPairs(
        model,
        **{column: [getattr(draft, column) for draft in drafts] for column in _Draft._fields[:5]},
        roles=dict(zip((*drafts[0].changed, "END"), (*wanted[1:], wanted[0] - 1), strict=True)),
        check=check,
        min_accuracy=min_accuracy,
    )


def _changed_places(model: Any, draft: _Draft) -> tuple[int, ...] | None:
    """Length with BOS, then the changed positions; None where the tokenizer makes more or less of the change."""
    clean, corrupted, correct, incorrect = (
        model.tokenizer.encode(text, add_special_tokens=False) for text in draft[:4]
    )
    if len(clean) != len(corrupted) or len(correct) != 1 or len(incorrect) != 1 or correct == incorrect:
        return None
    places = tuple(i + 1 for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b)
    return (len(clean) + 1, *places) if len(places) == len(draft.changed) else None


def _with_role(document: Any, role: str, text: str) -> str:
    """A corpus document's text with another word in one slot."""
    label = next(label for label in document.labels if (label.facet, label.value) == ("role", role))
    return document.text[: label.start] + text + document.text[label.end :]


def _induction_drafts(model: Any, rng: Random, split: str) -> Iterator[_Draft]:
    from mi_utils.smallworld import lexicon

    words = [word for word in lexicon.words() if len(model.tokenizer.encode(" " + word, add_special_tokens=False)) == 1]
    if len(words) < 20:
        raise ValueError(f"The tokenizer of {models.info(model).name} has only {len(words)} words as single tokens.")
    while True:
        block = rng.sample(words, 10)
        other = [*block[:4], block[7], *block[5:7], block[4], *block[8:]]
        clean, corrupted = ("".join(" " + word for word in [*each, *block[:5]]) for each in (block, other))
        yield _Draft(clean, corrupted, " " + block[5], " " + block[8], "random words", ("A", "C"))


def _fact_drafts(model: Any, rng: Random, split: str) -> Iterator[_Draft]:
    from mi_utils.smallworld import corpus

    while True:
        relation = rng.choice(corpus.RELATIONS)
        prompt, other = corpus.fact_prompt(rng, relation, split), rng.choice(corpus.COUNTRIES)
        corrupted = _with_role(prompt.document, "country", other.name)
        yield _Draft(
            prompt.text, corrupted, " " + prompt.answer, " " + getattr(other, relation), relation, ("country",)
        )


def _agreement_drafts(model: Any, rng: Random, split: str) -> Iterator[_Draft]:
    from mi_utils.smallworld import corpus, lexicon

    other_number = lexicon.PLURAL | {plural: noun for noun, plural in lexicon.PLURAL.items()}
    while True:
        prompt = corpus.agreement_prompt(rng, split)
        labels = prompt.document.labels
        subject = next(
            prompt.text[label.start : label.end]
            for label in labels
            if (label.facet, label.value) == ("role", "subject")
        )
        numbers = [label.value for label in labels if label.facet == "number"]
        corrupted = _with_role(prompt.document, "subject", other_number[subject])
        template = "{} subject, {} attractor".format(*numbers)
        yield _Draft(prompt.text, corrupted, prompt.correct, prompt.incorrect, template, ("subject",))


def _year_drafts(model: Any, rng: Random, split: str) -> Iterator[_Draft]:
    from mi_utils.smallworld import corpus

    while True:
        document, start = corpus.year_prompt(rng, split)
        if start < 20:  # no room for an earlier start and a year between
            continue
        earlier = rng.randint(2, start - 10)
        between, after = rng.randint(earlier + 1, start - 1), rng.randint(start + 1, 99)
        corrupted = _with_role(document, "start", f"{earlier:02d}")
        yield _Draft(document.text, corrupted, f"{after:02d}", f"{between:02d}", "years", ("start",))


_DRAFTS = {
    "induction": _induction_drafts,
    "facts": _fact_drafts,
    "agreement": _agreement_drafts,
    "greater_than": _year_drafts,
}
