"""Which feature stands for a concept: searched on one half of labelled tokens, confirmed on the other.

A feature that was found among thousands always looks good on the tokens it was found on. So features are ranked, and
a threshold is set, on a discovery half; what is reported was measured on a held-out half that shares neither template
nor word with it. What a direction without any training does on the same halves, the difference in means, stands beside.

Sources: Gurnee et al. 2023 (arXiv:2305.01610) for single neurons as classifiers scored by F1; Westfall and Young 1993
for the correction by the largest statistic; Kantamneni et al. 2025 (arXiv:2502.16681) for how hard simple baselines are
to beat.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mi_utils import models, probing
from mi_utils.features import Dictionary, check_dictionary
from mi_utils.probing import LabelledTokens
from mi_utils.tokens import BATCH_TOKENS

if TYPE_CHECKING:
    import xarray as xr

    from mi_utils.smallworld.corpus import Document, Label

LEAST = {"examples": 20, "word": 3, "template": 1}  # that a concept must hold on, in each half, to be searched for
MOST_ALWAYS = 0.75  # F1 of saying yes to every token, above which a good F1 would say little
SHUFFLES = 499
CANDIDATES = 10
EVERYWHERE = ("family", "next")  # facets of which every token is an example; of others those that have some value
CARRIERS = {"topic": ("noun", "verb"), "sentiment": ("adjective", "verb")}  # the words that have a text's facet
# What a word decides for the words after it: its facet, its slot, the slot until which that matters, and a name.
DECIDED = (
    ("relation", None, "answer", "relation asked"),
    ("gender", "name", "pronoun", "subject gender"),
    ("number", "subject", "verb", "subject number"),
)
BAR = 25  # concepts that the dictionaries of the embedded model are to have
LAST_TOKEN = re.compile(r"(?:\w+|[^\w\s])\s*$")  # a word or a mark at the end of a text
SEED = 30_000  # of documents: neither those of the models nor those of the dictionaries


# ---------------------------------------------------------------------------------------------------- labelled tokens


@dataclass(frozen=True)
class ConceptTokens:
    """Tokens, and which concepts hold on them.

    Attributes:
        tokens: for each text its token ids, BOS first.
        text, pos: [example], number of the text and position of the token (BOS is 0); by text, then position.
        holds: [concept, example].
        among: [concept, example], the tokens that are asked: where a concept does not hold, it is told from these.
        concepts: names, "gender: male".
        groups: name to [example]: what the two halves must not share.
        least: how much of what a concept must hold on, in each half: "examples", and different values of a group.
    """

    tokens: tuple[tuple[int, ...], ...]
    text: Int[np.ndarray, " example"]
    pos: Int[np.ndarray, " example"]
    holds: Bool[np.ndarray, "concept example"]
    among: Bool[np.ndarray, "concept example"]
    concepts: tuple[str, ...]
    groups: dict[str, np.ndarray]
    least: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.text)

    def check_model(self, model: Any) -> None:
        """Refuse a model with another vocabulary or a shorter context.

        Raises:
            ValueError: says which.
        """
        info, bos = models.info(model), model.tokenizer.bos_token_id
        if any(row[0] != bos for row in self.tokens) or max(map(max, self.tokens)) >= models.W_U(model).shape[1]:
            raise ValueError(f"These texts were tokenised for another model than {info.name}: label them again.")
        if max(map(len, self.tokens)) > info.shape.n_ctx:
            raise ValueError(f"A text is longer than the {info.shape.n_ctx} tokens {info.name} has room for.")


def _one_label_each(labelled: LabelledTokens) -> ConceptTokens:
    order = np.lexsort((labelled.pos, labelled.text))
    labelled = labelled[order]
    names = sorted(set(labelled.label.tolist()))
    holds = np.stack([labelled.label == name for name in names])
    return ConceptTokens(
        tokens=labelled.tokens, text=labelled.text, pos=labelled.pos,
        holds=holds, among=np.ones_like(holds), concepts=tuple(map(str, names)),
        groups=labelled.groups, least={"examples": 4} | dict.fromkeys(labelled.groups, 2),
    )  # fmt: skip


def prompt_concept(model: Any, positive: Sequence[str], negative: Sequence[str], *, at: str = "end") -> ConceptTokens:
    """Prompts that have a concept and prompts that have not, for :func:`concept_search`.

    Every prompt stands for itself in the split: give prompts that differ in more than a word.

    Args:
        at: the token that is asked about: the "end" of each prompt, or "all" of its tokens but BOS.

    Raises:
        ValueError: fewer than 8 prompts of either kind, a prompt twice, one that is longer than the context.
    """
    if at not in ("end", "all"):
        raise ValueError(f"at={at!r}: ask at the 'end' of each prompt, or about 'all' of its tokens.")
    if min(len(positive), len(negative)) < 8:
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative prompts: give at least 8 of each, half of which "
            "confirm what the others found."
        )
    texts = [*positive, *negative]
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} comes twice: it would stand in both halves, or have both labels.")
    rows = [tuple(models.to_tokens(model, [text])[0].tolist()) for text in texts]
    places = [(i, pos) for i, row in enumerate(rows) for pos in ([len(row) - 1] if at == "end" else range(1, len(row)))]
    text, pos = (np.array(column) for column in zip(*places, strict=True))
    return ConceptTokens(
        tokens=tuple(rows), text=text, pos=pos, holds=(text < len(positive))[None],
        among=np.ones((1, len(text)), bool), concepts=("positive",),
        groups={"prompt": text}, least={"examples": 4, "prompt": 4},
    )  # fmt: skip


def corpus_concepts(model: Any, documents: Iterable[Document]) -> ConceptTokens:
    """Every token of these documents of the small world, with every concept that the corpus knows of it.

    A token has a concept when one of its document's labels (:func:`labels_of`) covers its word. It is told from the
    tokens that have another value of the same facet: male names from female ones, one role from all others; families,
    and what comes next, from all other tokens. A concept that holds on the same tokens as another is left out.

    The groups are the document's "template" and the "word" itself, in the singular and in lower case: a feature that
    only knows its words by heart fails on the held-out half.

    Raises:
        ValueError: no documents, or a tokenizer without BOS or character offsets.
    """
    from mi_utils.smallworld.lexicon import PLURAL

    longest = models.info(model).shape.n_ctx
    singular = {plural: noun for noun, plural in PLURAL.items()}
    rows, text, pos, words, templates = [], [], [], [], []
    found: dict[str, list[int]] = defaultdict(list)
    for document in documents:
        ids, offsets = models.to_tokens_and_characters(model, document.text)
        ids, offsets = ids[:longest], offsets[: longest - 1]
        roles = {(label.start, label.end): label.value for label in document.labels if label.facet == "role"}
        template, first = probing.template_of(document.text, roles), len(text)
        for start, end in offsets:
            word = document.text[start:end].strip().lower()
            words.append(singular.get(word, word) or repr(document.text[start:end]))
            text.append(len(rows))
            templates.append(template)
        pos += range(1, len(ids))
        # A token begins with the space before its word, which is not the word's.
        starts = np.array([start + (document.text[start] == " " and end > start + 1) for start, end in offsets])
        ends = np.array([end for _, end in offsets])
        for label in labels_of(document):
            inside = np.flatnonzero((label.start <= starts) & (ends <= label.end))
            found[f"{label.facet}: {label.value}"] += (first + inside).tolist()
        rows.append(tuple(ids))
    if not rows:
        raise ValueError("No documents: corpus.documents(seed) makes some.")
    names = sorted({tuple(examples): name for name, examples in sorted(found.items(), reverse=True)}.values())
    facets: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(text), bool))
    holds = np.zeros((len(names), len(text)), bool)
    for name, examples in found.items():
        facets[name.split(": ")[0]][slice(None) if name.startswith(EVERYWHERE) else examples] = True
    for i, name in enumerate(names):
        holds[i, found[name]] = True
    among = np.stack([facets[name.split(": ")[0]] for name in names])
    return ConceptTokens(
        tokens=tuple(rows), text=np.array(text), pos=np.array(pos), holds=holds, among=among, concepts=tuple(names),
        groups={"template": np.array(templates), "word": np.array(words)}, least=LEAST,
    )  # fmt: skip


def labels_of(document: Document) -> list[Label]:
    """What the corpus knows of a document's characters, as (start, end, facet, value).

    Of words: ``role`` ("ioi S2", "fact country": family and slot, without the number that counts fillers, but S1 and
    S2 as they are), ``gender``, ``number``, ``relation`` (of a fact's
    answer), ``topic`` and ``sentiment`` (of the words that carry them), ``mention`` ("again", where the word filled a
    slot before in the document), ``continent`` (of a country: no text ever speaks of it).

    Of what the text before has decided, on the words that follow: ``topic so far``, ``sentiment so far``,
    ``relation asked``, ``subject gender`` (until the pronoun), ``subject number`` (until the verb), ``quote``.

    Of all words: ``family``, and ``next`` (the role of the slot that begins right after).
    """
    from mi_utils.smallworld.corpus import Label
    from mi_utils.smallworld.lexicon import COUNTRIES

    continents = {country.name: country.continent for country in COUNTRIES}
    text = document.text
    family = next((label.value for label in document.labels if label.facet == "family"), "")
    found, seen, fillers = [], set(), []
    for label in sorted(document.labels):
        start, end, facet, value = label
        if facet == "role":
            word, slot = text[start:end], value if value in ("S1", "S2") else value.rstrip("0123456789")
            role = f"{family} {slot}"
            fillers.append((start, end, slot, word))
            found.append(Label(start, end, "role", role))
            found.append(Label(start, end, "mention", "again" if word in seen else "first"))
            seen.add(word)
            if before := LAST_TOKEN.search(text[:start]):
                found.append(Label(before.start(), before.start() + len(before[0].rstrip()), "next", role))
            if slot == "country":
                found.append(Label(start, end, "continent", continents[word]))
        elif facet in ("gender", "number", "relation", "family", "quote"):
            found.append(label)
    for facet, slots in CARRIERS.items():
        for value in {label.value for label in document.labels if label.facet == facet}:
            words = [(start, end) for start, end, slot, _ in fillers if slot in slots]
            found += [Label(start, end, facet, value) for start, end in words]
            if words:
                found.append(Label(words[0][1], len(text), f"{facet} so far", value))
    for facet, slot, until, name in DECIDED:
        there = next((label for label in sorted(document.labels) if label.facet == facet), None)
        due = next((start for start, _, role, _ in fillers if role == until), None)
        if there is None or due is None:
            continue
        if slot is None:  # asked for by the relation's own word
            begins = re.search(rf"\b{there.value}\b", text[:due])
            if begins:
                found.append(Label(begins.end(), due, name, there.value))
        elif any(start == there.start and role == slot for start, _, role, _ in fillers):
            found.append(Label(there.end, due, name, there.value))
    return found


def shuffle_labels(data: ConceptTokens, seed: int = 0) -> ConceptTokens:
    """The control: the labels of each text are moved to other texts, so that they are about nothing.

    The texts' labels are laid end to end in another order. How often a concept holds, and on how many tokens in a row,
    stays as it was.
    """
    order = _other_order(data.text, np.random.default_rng(seed))
    return replace(data, holds=data.holds[:, order], among=data.among[:, order])


def _other_order(text: Int[np.ndarray, " example"], rng: np.random.Generator) -> Int[np.ndarray, " example"]:
    """Examples in a random order of their texts, those of one text together as they were."""
    _, number = np.unique(text, return_inverse=True)
    return np.argsort(rng.permutation(number.max() + 1)[number], kind="stable")


# ------------------------------------------------------------------------------------------------------------- halves


def halves(data: ConceptTokens, seed: int = 0) -> tuple[Int[np.ndarray, " discovery"], Int[np.ndarray, " held_out"]]:
    """Examples of the two halves, which share no value of any group. Examples that fall between them are left out.

    Each kind of group is dealt in two. Values on which the same concepts hold are dealt by turns, so that a concept
    has about as many words and templates in one half as in the other.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for values in data.groups.values():
        unique, number = np.unique(values, return_inverse=True)
        sums = np.stack([np.bincount(number, weights=row, minlength=len(unique)) for row in data.holds])
        usual = sums > 0.5 * np.bincount(
            number, minlength=len(unique)
        )  # the concepts that hold where this value stands
        _, kind = np.unique(usual, axis=1, return_inverse=True)
        order = np.lexsort((rng.permutation(len(unique)), kind.ravel()))
        part = np.empty(len(unique), int)
        part[order] = (np.arange(len(unique)) + int(rng.integers(2))) % 2
        parts.append(part[number])
    inside = np.stack(parts)
    return np.flatnonzero((inside == 0).all(0)), np.flatnonzero((inside == 1).all(0))


def _untestable(data: ConceptTokens, sides: Sequence[np.ndarray]) -> list[str]:
    """For each concept why it cannot be searched for; empty where it can."""
    reasons = []
    for row, among in zip(data.holds, data.among, strict=True):
        reason = ""
        for side, name in zip(sides, ("discovery", "held-out"), strict=True):
            here, asked = side[row[side]], side[among[side]]
            counts = {"examples": len(here)} | {
                group: len(set(values[here].tolist())) for group, values in data.groups.items()
            }
            short = [f"{counts[what]} {what}" for what, least in data.least.items() if counts[what] < least]
            if short and not reason:
                reason = f"{name} half: {', '.join(short)}"
            if not reason and (always := 2 * len(here) / (len(here) + len(asked))) > MOST_ALWAYS:
                reason = f"{name} half: saying yes to every token has an F1 of {always:.2f}"
        reasons.append(reason)
    return reasons


# ------------------------------------------------------------------------------------------------------------- search


def concept_search(
    model: Any,
    sae: Dictionary,
    data: ConceptTokens | LabelledTokens,
    *,
    bar: float = 0.8,
    level: float = 0.05,
    candidates: int = CANDIDATES,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Rank features by how well they alone tell where a concept holds, and confirm the best on held-out tokens.

    On the discovery half each feature gets its AUROC and its best F1, with the threshold that gives it; features are
    ranked by F1, then AUROC, then number. On the held-out half the ``candidates`` best are measured with those
    thresholds. A concept is found where the very first of them reaches ``bar`` there and ``p`` is at most ``level``.

    The choice among features needs no correction: it was made on other tokens. The choice among concepts does: the
    labels of the held-out texts are put in another order ``shuffles`` times, and ``p`` is the share of orders in which
    any concept's F1 stands out as far (in standard deviations of its own F1 under shuffling) as this one's.

    Args:
        data: from :func:`corpus_concepts`, :func:`prompt_concept`, ``corpus_tokens`` or ``label_tokens``; labels are
            searched one against all others.
        seed: deals the halves and shuffles.

    Returns:
        A dataset over ``concept`` with

        * ``feature``, ``f1``, ``precision``, ``recall``, ``auroc`` on the held-out half, ``threshold`` in activation
          units, ``discovery_f1``, ``discovery_auroc``, ``p`` (corrected), ``found``;
        * ``baseline_f1``, ``baseline_auroc``: the same for the difference in means of the activations, direction and
          threshold from the discovery half; ``always_f1``, of saying yes to every token;
        * ``n_discovery``, ``n_held_out``: tokens on which it holds;
        * ``candidate_feature``, ``candidate_discovery_f1``, ``candidate_f1``, ``candidate_auroc`` (concept, rank);

        and in the attributes ``untested``: concepts left out, with the reason.

    What it does not show: that the model uses the feature. Steer and ablate it (``steer_feature``).

    Raises:
        ValueError: a dictionary or tokens of another model, or no concept that can be searched for.
    """
    import xarray as xr

    check_dictionary(model, sae)
    data = _one_label_each(data) if isinstance(data, LabelledTokens) else data
    data.check_model(model)
    sides = halves(data, seed)
    reasons = _untestable(data, sides)
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], int)
    if not len(kept):
        raise ValueError(f"No concept can be searched for. {data.concepts[0]}, {reasons[0]}. Give more examples.")
    active, raw = _read(model, sae, data, np.concatenate(sides), progress)
    active = active[: len(sides[0])], active[len(sides[0]) :]
    raw = raw[: len(sides[0])], raw[len(sides[0]) :]
    top = max(1, min(candidates, sae.n_features))
    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    null: list[np.ndarray] = []
    _, domain = np.unique(data.among[kept], axis=0, return_inverse=True)
    for number in range(domain.max() + 1):
        chosen = kept[domain.ravel() == number]
        asked = [np.flatnonzero(data.among[chosen[0], side]) for side in sides]
        holds = [data.holds[chosen][:, side[own]] for side, own in zip(sides, asked, strict=True)]
        discovery, held_out = (half[own].tocsc() for half, own in zip(active, asked, strict=True))
        scores, says = _search(discovery, held_out, *holds, top)
        scores |= _difference_in_means(raw[0][asked[0]], raw[1][asked[1]], *holds)
        # Domains are shuffled each for itself, as if they were independent: that makes the largest no smaller.
        scores["stands_out"], shuffled = _stand_out(says, holds[1], data.text[sides[1][asked[1]]], shuffles, seed)
        parts.append((chosen, scores))
        null.append(shuffled)
    order = np.argsort(np.concatenate([chosen for chosen, _ in parts]))
    columns = {
        name: np.concatenate([scores[name] for _, scores in parts])[order] for name in parts[0][1]
    }  # fmt: skip
    largest = np.concatenate(null, axis=1).max(1)
    columns["p"] = ((largest[:, None] >= columns.pop("stands_out") - 1e-12).sum(0) + 1) / (shuffles + 1)
    columns["found"] = (columns["f1"] >= bar) & (columns["p"] <= level)
    info = models.info(model)
    return xr.Dataset(
        {
            name: (("concept", "rank")[: values.ndim], values)
            for name, values in columns.items()
        },
        coords={"concept": [data.concepts[i] for i in kept], "rank": np.arange(top)},
        attrs={
            "model": info.name, "processing": info.processing, "seed": seed, "site": sae.site, "layer": sae.layer,
            "n_features": sae.n_features, "shuffles": shuffles,
            "bar": bar, "level": level, "groups": list(data.groups),
            "untested": {name: reason for name, reason in zip(data.concepts, reasons, strict=True) if reason},
        },
    )  # fmt: skip


def _read(
    model: Any, sae: Dictionary, data: ConceptTokens, chosen: Int[np.ndarray, " n"], progress: bool
) -> tuple[Any, Float[np.ndarray, "n d_model"]]:
    """Features as a sparse matrix [n, feature], and the activations they were read from, at the chosen examples."""
    from scipy import sparse
    from tqdm.auto import tqdm

    by_text: dict[int, list[int]] = defaultdict(list)
    for row, example in enumerate(chosen.tolist()):
        by_text[int(data.text[example])].append(row)
    by_length: dict[int, list[int]] = defaultdict(list)
    for text in by_text:
        by_length[len(data.tokens[text])].append(text)
    batches = [
        texts[start : start + size]
        for length, texts in sorted(by_length.items())
        for size in [max(1, BATCH_TOKENS // length)]
        for start in range(0, len(texts), size)
    ]
    raw = np.empty((len(chosen), sae.d_model), np.float32)
    parts, rows = [], []
    for texts in tqdm(batches, desc="reading features", unit="batch", disable=not progress, leave=False, delay=5):
        tokens = torch.tensor([data.tokens[text] for text in texts])
        stream = models.cache(model, tokens, [sae.site], layers=[sae.layer])[sae.site, sae.layer].flatten(2)
        here = [(i, row) for i, text in enumerate(texts) for row in by_text[text]]
        batch, mine = (np.array(column) for column in zip(*here, strict=True))
        values = stream[torch.from_numpy(batch), torch.from_numpy(data.pos[chosen[mine]])]
        with torch.no_grad():
            encoded = sae.encode(values).float().cpu().numpy()
        raw[mine] = values.float().cpu().numpy()
        parts.append(sparse.csr_array(np.maximum(encoded, 0)))
        rows.append(mine)
    stacked = sparse.vstack(parts, format="csr")
    return stacked[np.argsort(np.concatenate(rows))], raw


def feature_auroc(active: Any, holds: Bool[np.ndarray, "concept example"]) -> Float[np.ndarray, "concept feature"]:
    """Area under the ROC curve of every feature for every concept: the chance that a token on which the concept holds
    has a larger activation than one on which it does not, ties counted half.

    Args:
        active: sparse [example, feature], nothing below zero.
    """
    from scipy import sparse
    from scipy.stats import rankdata

    active = sparse.csc_array(active)
    active.eliminate_zeros()
    n = active.shape[0]
    ranks = active.astype(np.float64)
    for feature in range(active.shape[1]):
        own = slice(active.indptr[feature], active.indptr[feature + 1])
        zeros = n - (own.stop - own.start)
        # Ranks less that of the inactive tokens, which share one: what is zero stays so.
        ranks.data[own] = zeros + rankdata(active.data[own]) - (zeros + 1) / 2
    positives = holds.sum(1)[:, None].astype(float)
    inactive = (n - np.diff(active.indptr) + 1)[None] / 2
    total = sparse.csr_array(holds.astype(np.float64)) @ ranks
    ranked = np.asarray(total.todense()) + positives * inactive
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ranked - positives * (positives + 1) / 2) / (positives * (n - positives))


def best_f1(
    active: Any, holds: Bool[np.ndarray, "concept example"]
) -> tuple[Float[np.ndarray, "concept feature"], Float[np.ndarray, "concept feature"]]:
    """The best F1 of every feature for every concept over all thresholds above zero, and the threshold: a token is
    said to have the concept when the activation is at least that. It lies halfway between two activations that occur;
    of equal F1 it is the highest."""
    from scipy import sparse

    active = sparse.csc_array(active)
    active.eliminate_zeros()
    positives = holds.sum(1)
    scores, thresholds = (np.zeros((len(holds), active.shape[1])) for _ in range(2))
    thresholds[:] = np.inf
    for feature in np.flatnonzero(np.diff(active.indptr)):
        own = slice(active.indptr[feature], active.indptr[feature + 1])
        scores[:, feature], thresholds[:, feature] = _best_cut(
            active.data[own], holds[:, active.indices[own]], positives
        )
    return scores, thresholds


def _best_cut(
    values: Float[np.ndarray, " n"], holds: Bool[np.ndarray, "concept n"], positives: Int[np.ndarray, " concept"]
) -> tuple[Float[np.ndarray, " concept"], Float[np.ndarray, " concept"]]:
    """Best F1 over cuts between different values, and the cut: halfway to the next lower value, from the last to 0."""
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    right = np.cumsum(holds[:, order], axis=1, dtype=np.int32)[:, ends]
    f1 = 2 * right / (ends + 1 + positives[:, None])
    best = f1.argmax(1)
    lower = np.append(ranked[1:], min(0, ranked[-1]))
    return f1[np.arange(len(holds)), best], (ranked[ends[best]] + lower[ends[best]]) / 2


def _says(active: Any, features: Int[np.ndarray, " rank"], threshold: Float[np.ndarray, " rank"]) -> np.ndarray:
    """[rank, example]: whether the activation reaches the threshold."""
    values = np.asarray(active[:, features].todense())
    return (values >= threshold).T & (values > 0).T


def _scores(says: Bool[np.ndarray, "concept n"], holds: Bool[np.ndarray, "concept n"]) -> dict[str, np.ndarray]:
    right, said, there = (says & holds).sum(1), says.sum(1), holds.sum(1)
    return {
        "f1": 2 * right / (said + there), "precision": right / np.maximum(said, 1), "recall": right / there,
    }  # fmt: skip


def _search(
    discovery: Any, held_out: Any, found: Bool[np.ndarray, "concept n"], held: Bool[np.ndarray, "concept m"], top: int
) -> tuple[dict[str, np.ndarray], Bool[np.ndarray, "concept m"]]:
    """Scores of the best features of the discovery half, and what the very best says on the held-out half."""
    auroc = feature_auroc(discovery, found)
    f1, threshold = best_f1(discovery, found)
    # Of equal F1 the larger AUROC, and then the smaller number. Rounded, so that rounding does not decide.
    order = np.lexsort((-auroc.round(9), -f1.round(9)))[:, :top]
    every = np.arange(len(found))[:, None]
    threshold, f1, auroc = threshold[every, order], f1[every, order], auroc[every, order]
    says = np.stack([_says(held_out, features, cuts) for features, cuts in zip(order, threshold, strict=True)])
    scores = [_scores(says[:, rank], held) for rank in range(top)]
    held_auroc = feature_auroc(held_out, held)[every, order]
    columns = {
        "feature": order[:, 0], **scores[0], "auroc": held_auroc[:, 0], "threshold": threshold[:, 0],
        "discovery_f1": f1[:, 0], "discovery_auroc": auroc[:, 0],
        "always_f1": 2 * held.sum(1) / (held.sum(1) + held.shape[1]),
        "n_discovery": found.sum(1), "n_held_out": held.sum(1),
        "candidate_feature": order, "candidate_discovery_f1": f1,
        "candidate_f1": np.stack([score["f1"] for score in scores], 1), "candidate_auroc": held_auroc,
    }  # fmt: skip
    return columns, says[:, 0]


def _stand_out(
    says: Bool[np.ndarray, "concept n"], holds: Bool[np.ndarray, "concept n"], text: Int[np.ndarray, " n"],
    shuffles: int, seed: int,
) -> tuple[Float[np.ndarray, " concept"], Float[np.ndarray, "shuffle concept"]]:  # fmt: skip
    """How far F1 stands out, in standard deviations of itself under shuffled labels; and the same of each shuffle."""
    rng = np.random.default_rng(seed)
    size = says.sum(1) + holds.sum(1)
    measured = 2 * (says & holds).sum(1) / size
    null = np.stack([2 * (says & holds[:, _other_order(text, rng)]).sum(1) / size for _ in range(shuffles)])
    centre, spread = null.mean(0), null.std(0)
    # A feature that never speaks, or always, cannot stand out.
    spread = np.where(spread > 1e-12, spread, np.inf)
    return (measured - centre) / spread, (null - centre) / spread


def _difference_in_means(
    discovery: np.ndarray, held_out: np.ndarray, found: np.ndarray, held: np.ndarray
) -> dict[str, np.ndarray]:
    """F1 and AUROC on the held-out half of a threshold on the difference in means, both from the discovery half."""
    from scipy.stats import rankdata

    f1, auroc = [], []
    for own, there in zip(found, held, strict=True):
        direction = discovery[own].mean(0, dtype=np.float64) - discovery[~own].mean(0, dtype=np.float64)
        _, cut = _best_cut(discovery @ direction, own[None], np.array([own.sum()]))
        values = held_out @ direction
        f1.append(_scores((values >= cut)[None], there[None])["f1"][0])
        n, k = len(there), there.sum()
        auroc.append((rankdata(values)[there].sum() - k * (k + 1) / 2) / (k * (n - k)))
    return {"baseline_f1": np.array(f1), "baseline_auroc": np.array(auroc)}


# -------------------------------------------------------------------------------------------------------------- table


def corpus_sample(model: Any, n_documents: int = 4000, seed: int = 0) -> ConceptTokens:
    """:func:`corpus_concepts` of so many documents that neither the models nor the dictionaries were trained on.

    Half are drawn as the corpus draws them, half evenly from its families, so that rare ones give enough examples.
    """
    from random import Random

    from mi_utils.smallworld import corpus

    rng, stream = Random(SEED + seed), corpus.documents(SEED + seed)
    families = [write for _, write in corpus.FAMILIES.values()]
    return corpus_concepts(
        model, [next(stream) if i % 2 else families[i // 2 % len(families)](rng) for i in range(n_documents)]
    )


def concept_table(
    model: Any,
    saes: Mapping[str, Dictionary],
    data: ConceptTokens | None = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> xr.Dataset:
    """:func:`concept_search` in several dictionaries, for each concept that of the best discovery F1.

    Args:
        saes: by name.
        data: from :func:`corpus_sample`, which is the default; or from :func:`shuffle_labels` of it, for the control.
        settings: of :func:`concept_search`.

    Returns:
        As :func:`concept_search`, with ``sae`` along concept; ``p`` is multiplied by the number of dictionaries.

    Raises:
        ValueError: no dictionaries, or as :func:`concept_search`.
    """
    import xarray as xr

    if not saes:
        raise ValueError("No dictionaries to search in: give {name: sae}.")
    data = corpus_sample(model, seed=seed) if data is None else data
    tables = [concept_search(model, sae, data, seed=seed, **settings) for sae in saes.values()]
    best = np.stack([table["discovery_f1"].values for table in tables]).argmax(0)
    names = list(saes)
    p = np.minimum(1, np.stack([table["p"].values for table in tables]) * len(tables))
    own = np.arange(len(best))
    columns = {
        name: np.stack([table[name].values for table in tables])[best, own]
        for name, values in tables[0].data_vars.items()
        if values.dims == ("concept",)
    }
    first = tables[0].attrs
    columns |= {
        "p": p[best, own], "found": (columns["f1"] >= first["bar"]) & (p[best, own] <= first["level"]),
        "sae": np.array(names)[best],
    }  # fmt: skip
    attrs = {name: value for name, value in first.items() if name not in ("site", "layer", "n_features")}
    return xr.Dataset(
        {name: ("concept", values) for name, values in columns.items()},
        coords={"concept": tables[0]["concept"].values}, attrs=attrs | {"saes": names},
    )  # fmt: skip


def main(
    model_name: str, sae_names: Sequence[str] = (), n_documents: int = 4000, control_tokens: int = 400_000
) -> bool:
    """Print the table of concepts and its two controls; whether it reaches its bar and the controls find none.

    The controls search in the same way: with the same dictionaries on shuffled labels; and on the same shape with
    random weights, with dictionaries trained on it at the same sites, of the same width.

    Raises:
        ValueError: an unknown dictionary, or one of another model.
    """
    from rich.console import Console
    from rich.table import Table

    from mi_utils import sae
    from mi_utils.models import load_model

    model = load_model(model_name)
    own = re.compile(re.escape(model_name) + r"-[a-z_]+-\d+")
    chosen = list(sae_names) or [name for name in sae.shipped_saes() if own.fullmatch(name)]
    if not chosen:
        raise ValueError(f"No dictionary ships for {model_name}: train one, and give its folder with --sae.")
    saes = {name: sae.load_sae(name, model) for name in chosen}
    data = corpus_sample(model, n_documents)
    table = concept_table(model, saes, data)
    shuffled = concept_table(model, saes, shuffle_labels(data))
    untrained = load_model(f"random:{model_name}")
    fresh = {
        name: sae.train_sae(
            untrained,
            site=each.site,
            layer=each.layer,
            n_features=each.n_features,
            n_tokens=control_tokens,
            architecture=each.passport.architecture,
            k=each.passport.training.get("k") or 16,
        )
        for name, each in saes.items()
    }
    control = concept_table(untrained, fresh, data)
    shown = Table(title=f"Concepts in single features of {model_name}, held-out half")
    for heading in ("concept", "dictionary", "feature", "F1", "precision", "recall", "AUROC", "means F1", "p", ""):
        shown.add_column(heading, justify="left" if heading in ("concept", "dictionary", "") else "right")
    for row in table.sortby("f1", ascending=False).to_dataframe().itertuples():
        numbers = (row.f1, row.precision, row.recall, row.auroc, row.baseline_f1, row.p)
        shown.add_row(
            row.Index, row.sae, str(row.feature), *(f"{number:.3f}" for number in numbers),
            "[green]found[/]" if row.found else "",
        )  # fmt: skip
    console = Console(width=132)
    console.print(shown)
    counts = [int(each["found"].sum()) for each in (table, shuffled, control)]
    console.print(
        f"Found {counts[0]} of {table.sizes['concept']} concepts (bar {BAR}); with shuffled labels {counts[1]}, with "
        f"random weights {counts[2]}. Not searched for, too few words or templates: {len(table.attrs['untested'])}."
    )
    return counts[0] >= BAR and not any(counts[1:])
