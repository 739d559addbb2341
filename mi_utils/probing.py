"""Probing: can a property be read from activations, and does the model use what can be read?

The first question is answered by a linear probe on tokens it has not seen, in sentences it has not seen; the second
only by an intervention on the direction that the probe found.

Sources: Alain and Bengio 2016 (arXiv:1610.01644) for linear probes; Hewitt and Liang 2019 (arXiv:1909.03368) for
control tasks and selectivity; Belinkov 2022 (arXiv:2102.12452) for what probes do not show.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.metrics import METRICS
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged

if TYPE_CHECKING:
    import xarray as xr

    from mi_utils.smallworld.corpus import Document

BATCH = 64  # texts in one forward pass
STREAM_SITES = (
    "resid_pre",
    "resid_post",
    "attn_out",
    "mlp_out",
)  # of width d_model, and an edit reaches all that reads
STRENGTHS = (1e-3, 1e-2, 1e-1)  # C of the logistic regression: the inverse of its L2 penalty


class Leak(ValueError):
    """Training and test examples share what the probe is to be tested without."""


# ---------------------------------------------------------------------------------------------------- labelled tokens


class Span(NamedTuple):
    """The characters from ``start`` up to, not including, ``end`` of a text, and what is true of them."""

    text: int
    start: int
    end: int
    label: str


@dataclass(frozen=True)
class LabelledTokens:
    """Examples for a probe: a label each, and the token at which it is to be read.

    Attributes:
        texts: the texts that the examples come from.
        tokens: for each text its token ids, BOS first.
        text, pos: [example]; number of the text, and position of the token (BOS is 0).
        label: [example].
        word: [example]; the labelled word itself. Control tasks give each word a random label.
        groups: name to [example]; what a test must not share with training, such as template and entity.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    text: Int[np.ndarray, " example"]
    pos: Int[np.ndarray, " example"]
    label: np.ndarray
    word: np.ndarray
    groups: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, chosen: Any) -> LabelledTokens:
        """Some of the examples, by mask, slice or numbers. The texts stay."""
        rows = np.atleast_1d(np.arange(len(self))[chosen])
        groups = {name: values[rows] for name, values in self.groups.items()}
        return replace(
            self, text=self.text[rows], pos=self.pos[rows], label=self.label[rows], word=self.word[rows], groups=groups
        )

    def check_model(self, model: Any) -> None:
        """Refuse a model whose tokenizer reads these texts otherwise.

        Raises:
            ValueError: the tokens differ.
        """
        tokenizer = model.tokenizer
        for text, row in zip(self.texts, self.tokens, strict=True):
            if (tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)) != row:
                raise ValueError(
                    f"{models.info(model).name} reads {text!r} as other tokens than the model these examples were "
                    "labelled for. Label them again with this model."
                )


def label_tokens(
    model: Any,
    texts: Sequence[str],
    spans: Sequence[Span],
    groups: Mapping[str, Sequence[str]],
    *,
    at: str = "word",
) -> LabelledTokens:
    """Find the token of each labelled span, for any model with a fast tokenizer.

    Args:
        spans: the labelled characters; several may lie in one text.
        groups: for each name one value a span, for the split: {"template": […], "entity": […]}.
        at: "word" reads at the span's last token, which has seen all of it; "end" at the text's last token.

    Raises:
        ValueError: no spans, a span outside its text or beginning inside a token, lists of different lengths, one
            label only, a text longer than the context, a tokenizer without BOS or offsets.
    """
    if at not in ("word", "end"):
        raise ValueError(f"at={at!r}: read at the 'word' that is labelled, or at the 'end' of the text.")
    if not len(spans) or not groups:
        raise ValueError("Give at least one labelled span, and at least one kind of group to split by.")
    if wrong := [name for name, values in groups.items() if len(values) != len(spans)]:
        raise ValueError(
            f"{len(spans)} spans, but groups[{wrong[0]!r}] has {len(groups[wrong[0]])} values: one a span."
        )
    if len({span.label for span in spans}) < 2:
        raise ValueError(f"Every span has the label {spans[0].label!r}: there is nothing to tell apart.")
    info = models.info(model)
    encoded = [models.to_tokens_and_characters(model, text) for text in texts]
    rows = [tuple(ids) for ids, _ in encoded]
    if long := [text for text, row in zip(texts, rows, strict=True) if len(row) > info.shape.n_ctx]:
        raise ValueError(f"{long[0][:60]!r}… is longer than the {info.shape.n_ctx} tokens {info.name} has room for.")
    positions = []
    for span in spans:
        if not (0 <= span.text < len(texts) and 0 <= span.start < span.end <= len(texts[span.text])):
            raise ValueError(f"{span} lies outside its text.")
        offsets = encoded[span.text][1]
        positions.append(len(offsets) if at == "end" else _last_token(texts[span.text], offsets, span))
    return LabelledTokens(
        texts=tuple(texts),
        tokens=tuple(rows),
        text=np.array([span.text for span in spans]),
        pos=np.array(positions),
        label=np.array([span.label for span in spans]),
        word=np.array([texts[span.text][span.start : span.end] for span in spans]),
        groups={name: np.array(values) for name, values in groups.items()},
    )


def _last_token(text: str, offsets: Sequence[tuple[int, int]], span: Span) -> int:
    """Position, counted with BOS, of the last token of a span."""
    covering = [i for i, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
    first, last = offsets[covering[0]], offsets[covering[-1]]
    # A token may begin with the space before its word, and with nothing else that is not the span's.
    if text[first[0] : span.start].strip() or text[span.end : last[1]].strip():
        raise ValueError(
            f"{text[span.start : span.end]!r} does not end where tokens end: its tokens cover "
            f"{text[first[0] : last[1]]!r}, so an activation there is about more than the span."
        )
    return covering[-1] + 1


def corpus_tokens(
    model: Any, documents: Iterable[Document], facet: str, *, role: str | None = None, at: str = "word"
) -> LabelledTokens:
    """Labelled tokens from documents of the small world, whose characters carry their labels.

    The groups are "template", the text with every filled slot as its role, and "entity", the word in the singular
    ("key" and "keys" are one entity: a probe that has seen one knows the other).

    Args:
        facet: what to read: "number", "gender", "topic", "sentiment", "role", "quote" …
        role: only spans with this role ("subject"); by default all that have the facet.
        at: as in :func:`label_tokens`.

    Raises:
        ValueError: no such span in these documents, or as :func:`label_tokens`.
    """
    from mi_utils.smallworld.lexicon import PLURAL

    singular = {plural: noun for noun, plural in PLURAL.items()}
    documents = list(documents)
    spans, templates, entities = [], [], []
    for number, document in enumerate(documents):
        roles = {(label.start, label.end): label.value for label in document.labels if label.facet == "role"}
        template = template_of(document.text, roles)
        for label in document.labels:
            place = (label.start, label.end)
            if label.facet == facet and (role is None or roles.get(place) == role):
                word = document.text[label.start : label.end]
                spans.append(Span(number, label.start, label.end, label.value))
                templates.append(template)
                entities.append(singular.get(word, word))
    if not spans:
        raise ValueError(
            f"None of {len(documents)} documents has the facet {facet!r}" + (f" on {role!r}." if role else ".")
        )
    groups = {"template": templates, "entity": entities}
    return label_tokens(model, [document.text for document in documents], spans, groups, at=at)


def template_of(text: str, roles: Mapping[tuple[int, int], str]) -> str:
    """The text with every filled slot, (start, end) to role, as its role: what documents of one template share."""
    for (start, end), role in sorted(roles.items(), reverse=True):
        text = f"{text[:start]}{{{role}}}{text[end:]}"
    return text


def agreement_documents(
    model: Any, n: int = 400, seed: int = 0, *, paired: bool = False, length: int | None = None
) -> list[Document]:
    """Documents for subject–verb agreement, "The keys to the cabinet", by turns with a plural and a singular subject.

    The attractor's number is drawn apart from the subject's, so that it says nothing about it (in the corpus it often
    does). Only words that are single tokens for this model are used, so any tokenizer will do that has enough of them.

    Args:
        n: number of documents.
        paired: each singular document is the plural one before it with the subject's number changed: what
            :func:`agreement_pairs` needs. A probe should not see such pairs: what they differ in is the label alone.
        length: only documents of so many tokens, BOS included.

    Raises:
        ValueError: an odd ``n``, fewer than 8 nouns that are single tokens in both numbers, or too few documents.
    """
    from mi_utils.smallworld import corpus, lexicon

    if n < 2 or n % 2:
        raise ValueError(f"n={n}: documents come in twos, plural and singular.")

    def single(*words: str) -> bool:
        coded = {word: model.tokenizer.encode(" " + word, add_special_tokens=False) for word in words}
        return all(len(ids) == 1 and model.tokenizer.decode(ids).strip() == word for word, ids in coded.items())

    nouns = [noun for noun in dict.fromkeys(lexicon.NOUNS) if single(noun, lexicon.PLURAL[noun])]
    names = [name for name in lexicon.NAMES if single(name)]
    if len(nouns) < 8 or not names:
        raise ValueError(
            f"The tokenizer of {models.info(model).name} has {len(nouns)} nouns as single tokens in both numbers; 8 "
            "are needed. Write documents of your own and label them with label_tokens."
        )
    rng, kept = Random(seed), {}
    slots, template = {}, ""
    for _ in range(1000 + 100 * n):
        number = ("plural", "singular")[len(kept) % 2]
        if not paired or number == "plural":
            subject, other = rng.sample(nouns, 2)
            attractor = rng.choice(("plural", "singular"))
            template = rng.choice(corpus.AGREEMENT_STARTS) + " {subject} " + rng.choice(corpus.PREPOSITIONS)
            slots = {
                "name": corpus.Word(rng.choice(names)),
                "attractor": corpus.Word(_form(other, attractor), (("number", attractor),)),
            }
        slots["subject"] = corpus.Word(_form(subject, number), (("number", number),))
        document = corpus.fill(template + " the {attractor}", slots, "agreement")
        size = 1 + len(model.tokenizer.encode(document.text, add_special_tokens=False))
        if length in (None, size):
            kept.setdefault(document.text, document)
        if len(kept) == n:
            return list(kept.values())
    raise ValueError(f"Only {len(kept)} of {n} different documents of length {length} found. Ask for fewer.")


def _form(noun: str, number: str) -> str:
    from mi_utils.smallworld.lexicon import PLURAL

    return PLURAL[noun] if number == "plural" else noun


def agreement_pairs(model: Any, documents: Sequence[Document], *, check: bool = True) -> PromptPairs:
    """Pairs for agreement from paired documents of one length; each document is the clean prompt of one pair.

    Correct is " are" where the clean prompt's subject is plural, else " is". So over all pairs the mean logit
    difference is what the model makes of the subject's number, and a general liking for one verb cancels.
    ``template`` is the number of subject and attractor.

    Raises:
        ValueError: the documents differ in length (give ``length``), or " are" or " is" is no single token.
        ModelDoesNotKnowTask: see :class:`PromptPairs`.
    """
    texts = [document.text for document in documents]
    numbers = [[label.value for label in document.labels if label.facet == "number"] for document in documents]
    return PromptPairs(
        model,
        clean=texts,
        corrupted=[texts[i ^ 1] for i in range(len(texts))],  # its neighbour: 1 for 0, 0 for 1, 3 for 2 …
        correct=[" are" if subject == "plural" else " is" for subject, _ in numbers],
        incorrect=[" is" if subject == "plural" else " are" for subject, _ in numbers],
        template=[f"{subject} subject, {attractor} attractor" for subject, attractor in numbers],
        check=check,
    )


# ------------------------------------------------------------------------------------------------------- activations


def activations(
    model: Any, labelled: LabelledTokens, site: str = "resid_post", layers: Sequence[int] | None = None
) -> xr.DataArray:
    """Activations at the labelled tokens.

    Texts of one length run together, so that nothing is padded. Only the labelled positions are kept.

    Args:
        site: any but "pattern"; heads are laid side by side.
        layers: all by default. For the embedding-only baseline take ``site="resid_pre", layers=[0]``.

    Returns:
        Dims (layer, example, feature), float32, with label, word, text, pos and the groups along ``example``.

    Raises:
        ValueError: unknown site or layer, "pattern", or a model with another tokenizer.
    """
    import xarray as xr

    if site == "pattern":
        raise ValueError("A pattern's size changes with the text: probe z, attn_out or the residual stream.")
    labelled.check_model(model)
    info = models.info(model)
    layers = list(range(info.shape.n_layers)) if layers is None else [int(layer) for layer in layers]
    by_length: dict[int, list[int]] = defaultdict(list)
    for text in sorted(set(labelled.text.tolist())):
        by_length[len(labelled.tokens[text])].append(text)
    examples: dict[int, list[int]] = defaultdict(list)
    for example, text in enumerate(labelled.text.tolist()):
        examples[text].append(example)
    values: np.ndarray | None = None
    for texts in by_length.values():
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            kept = models.cache(model, torch.tensor([labelled.tokens[text] for text in batch]), [site], layers=layers)
            rows = [row for row, text in enumerate(batch) for _ in examples[text]]
            chosen = [example for text in batch for example in examples[text]]
            for number, layer in enumerate(layers):
                part = kept[site, layer][rows, labelled.pos[chosen]].flatten(1).float().cpu().numpy()
                if values is None:
                    values = np.empty((len(layers), len(labelled), part.shape[1]), dtype=np.float32)
                values[number, chosen] = part
    return xr.DataArray(
        values,
        dims=("layer", "example", "feature"),
        coords={
            "layer": layers,
            "label": ("example", labelled.label),
            "word": ("example", labelled.word),
            "text": ("example", np.array(labelled.texts)[labelled.text]),
            "pos": ("example", labelled.pos),
            **{name: ("example", group) for name, group in labelled.groups.items()},
        },
        attrs={
            "model": info.name, "processing": info.processing, "seed": info.seed, "site": site,
            "groups": list(labelled.groups),
        },
        name="activation",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- splits

Split = tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]


def split_by_groups(
    data: xr.DataArray, by: Sequence[str] | None = None, *, folds: int = 4, seed: int = 0
) -> list[Split]:
    """Splits in which training and test share no group, of any kind named: a new entity *in* a new template.

    Each kind's values are dealt into ``folds`` parts. A fold tests the examples that lie in its part of every kind,
    and trains on those that lie in it for none; what lies in between is left out of that fold.

    Args:
        by: kinds of group, by default all that the data have.

    Raises:
        ValueError: an unknown kind, fewer values of a kind than folds, or a fold without training or test examples.
    """
    by = list(data.attrs["groups"]) if by is None else list(by)
    if unknown := [name for name in by if name not in data.attrs["groups"]]:
        raise ValueError(f"Unknown kind of group {unknown}: there are {', '.join(data.attrs['groups'])}.")
    rng, part = np.random.default_rng(seed), {}
    for name in by:
        values, number = np.unique(data[name].values, return_inverse=True)
        if len(values) < folds:
            raise ValueError(f"{len(values)} different values of {name!r} cannot be dealt into {folds} folds.")
        part[name] = rng.permutation(np.arange(len(values)) % folds)[number]
    splits = []
    for fold in range(folds):
        inside = np.stack([part[name] == fold for name in by])
        train, test = np.flatnonzero(~inside.any(0)), np.flatnonzero(inside.all(0))
        if not len(train) or not len(test):
            raise ValueError(
                f"Fold {fold} of {folds} has {len(train)} training and {len(test)} test examples. Use fewer."
            )
        splits.append((train, test))
    return splits


def check_split(data: xr.DataArray, split: Split, by: Sequence[str] | None = None, *, entity: str = "entity") -> None:
    """Refuse a split through which the answer can leak from training into test.

    No text may stand on both sides, nor a value of any kind of group.

    Args:
        by: kinds of group, by default all that the data have.
        entity: the kind that names the labelled things. Where it is among the kinds no word may stand on both sides
            either, whatever it is called in the groups.

    Raises:
        Leak: naming what is shared.
    """
    by = list(data.attrs["groups"]) if by is None else list(by)
    train, test = (np.asarray(side) for side in split)
    kinds = ["text", *by, *(["word"] if entity in by else [])]
    for name in kinds:
        values = data[name].values
        if shared := sorted(set(values[train].tolist()) & set(values[test].tolist())):
            raise Leak(
                f"{len(shared)} {name} value(s) in training and in test, {shared[0]!r} among them: the probe could "
                "remember instead of read. Split with split_by_groups, or name the groups by what examples share."
            )


# -------------------------------------------------------------------------------------------------------------- probes


def control_labels(data: xr.DataArray, seed: int = 0) -> np.ndarray:
    """A random label for each word type, the same wherever the word occurs: labels that can be remembered, not read.

    Every label is given to as many words as any other, up to one.

    Source: Hewitt and Liang 2019 (arXiv:1909.03368), section 2.
    """
    labels = np.unique(data["label"].values)
    words, number = np.unique(data["word"].values, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.permutation(labels)[rng.permutation(np.arange(len(words)) % len(labels))][number]


def probe(
    data: xr.DataArray,
    *,
    folds: int = 4,
    splits: Sequence[Split] | None = None,
    entity: str = "entity",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Linear probes, layer by layer, tested on groups they have not seen.

    A probe is a logistic regression on standardised activations. Its L2 penalty is chosen inside the training
    examples, on groups held out there in the same way.

    Args:
        data: from :func:`activations`.
        splits: your own, instead of those of :func:`split_by_groups`. Each is checked for leaks.
        entity: the kind of group that names the labelled things. Accuracy is reported for each of them, so that an
            interval goes over what varies (``stats.summarise(result.accuracy, dim="group")``); and they may recur in
            the control task, which could not be learned otherwise.
        seed: deals the folds and draws the control labels.

    Returns:
        Over (layer, group), shares of the test examples: ``accuracy`` on unseen groups of every kind;
        ``seen_accuracy`` and ``control_accuracy`` on examples whose words occur in training too but whose other
        groups do not, with the true labels and with those of the control task; ``selectivity``, the difference of
        the two. Attributes: ``majority``, the share of the commonest label; ``dropped``, groups that no fold tested.

    What it does not show: that the model uses what the probe reads. Nor does a failed probe show that nothing is
    there: it reads linearly, at one token. With fewer word types than features a linear probe can remember any
    labelling, and selectivity is then small whatever the model knows: look at ``accuracy``.

    Raises:
        Leak: a split of your own shares groups, words or texts.
        ValueError: one label only, an unknown ``entity``, too few groups for the folds.

    Source: Hewitt and Liang 2019 (arXiv:1909.03368) for the control task and selectivity.
    """
    import xarray as xr
    from tqdm import tqdm

    kinds = list(data.attrs["groups"])
    if entity not in kinds:
        raise ValueError(f"entity={entity!r}: the groups of these data are {', '.join(kinds)}.")
    labels = data["label"].values
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"Every example has the label {labels[0]!r}: there is nothing to tell apart.")
    strict = split_by_groups(data, folds=folds, seed=seed) if splits is None else list(splits)
    for split in strict:
        check_split(data, split, entity=entity)
    # Words recur here, so a control task can be learned; what else is shared must not be.
    loose_kinds = [name for name in kinds if name != entity]
    loose = (
        split_by_groups(data, loose_kinds, folds=folds, seed=seed) if loose_kinds else _random_splits(data, folds, seed)
    )
    loose = [_recurring(data, split) for split in loose]
    tasks = {
        "accuracy": (strict, labels),
        "seen_accuracy": (loose, labels),
        "control_accuracy": (loose, control_labels(data, seed)),
    }
    names = np.unique(data[entity].values)
    scores = {task: np.full((data.sizes["layer"], len(names)), np.nan) for task in tasks}
    jobs = [(layer, task) for layer in range(data.sizes["layer"]) for task in tasks]
    for layer, task in tqdm(jobs, desc="probing", unit="task", disable=not progress, leave=False, delay=5):
        task_splits, task_labels = tasks[task]
        right = np.full(len(labels), np.nan)
        for train, test in task_splits:
            fitted = _fit(
                data, layer, task_labels, train, kinds if task == "accuracy" else loose_kinds, strengths, seed
            )
            right[test] = fitted.predict(data.values[layer][test]) == task_labels[test]
        for i, name in enumerate(names):
            own = right[data[entity].values == name]
            scores[task][layer, i] = own[~np.isnan(own)].mean() if not np.isnan(own).all() else np.nan
    tested = ~np.any([np.isnan(values).any(0) for values in scores.values()], axis=0)
    if not tested.any():
        raise ValueError(f"No {entity} was tested by every task. Give more examples, or use fewer folds.")
    result = xr.Dataset(
        {task: (("layer", "group"), values[:, tested]) for task, values in scores.items()},
        coords={"layer": data["layer"].values, "group": names[tested]},
        attrs={name: data.attrs[name] for name in ("model", "processing", "seed", "site")},
    )
    result["selectivity"] = result["seen_accuracy"] - result["control_accuracy"]
    counts = Counter(labels.tolist())
    return result.assign_attrs(
        majority=max(counts.values()) / len(labels), classes=sorted(counts), entity=entity, folds=len(strict),
        n_examples=len(labels), n_words=len(set(data["word"].values.tolist())), probe_seed=seed,
        dropped=names[~tested].tolist(),
    )  # fmt: skip


def _random_splits(data: xr.DataArray, folds: int, seed: int) -> list[Split]:
    """Texts dealt into folds, where the entity is the only kind of group."""
    texts, number = np.unique(data["text"].values, return_inverse=True)
    part = np.random.default_rng(seed).permutation(np.arange(len(texts)) % folds)[number]
    return [(np.flatnonzero(part != fold), np.flatnonzero(part == fold)) for fold in range(folds)]


def _recurring(data: xr.DataArray, split: Split) -> Split:
    train, test = split
    words = data["word"].values
    return train, test[np.isin(words[test], words[train])]


def _fit(
    data: xr.DataArray, layer: int, labels: np.ndarray, train: np.ndarray, kinds: Sequence[str],
    strengths: Sequence[float], seed: int,
) -> Any:  # fmt: skip
    """A logistic regression whose penalty was chosen inside ``train``, on groups of these kinds held out there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-3))
    inside = data.isel(example=train)
    inner = split_by_groups(inside, kinds, folds=2, seed=seed) if kinds else _random_splits(inside, 2, seed)
    inner = [(a, b) for a, b in inner if len(set(labels[train][a].tolist())) > 1]
    x, y = data.values[layer][train], labels[train]
    if len(set(y.tolist())) < 2:
        raise ValueError(f"A fold trains on the label {y[0]!r} alone. Give more examples, or use fewer folds.")
    if len(strengths) == 1 or not inner:
        return pipeline.set_params(logisticregression__C=float(sorted(strengths)[0])).fit(x, y)
    grid = {"logisticregression__C": sorted(map(float, strengths))}  # of equals the strongest penalty wins
    return GridSearchCV(pipeline, grid, cv=inner).fit(x, y)


# ---------------------------------------------------------------------------------------------------------- directions


@dataclass(frozen=True)
class Direction:
    """A direction at a site: adding ``vector`` leads from one class's mean to the other's.

    Attributes:
        vector: [d_model], with its length in activation units.
        centre: [d_model], the mean of the two class means. Erasing puts the component along ``vector`` there.
        positive, negative: the classes it leads to and from.
        kind: "difference in means", "random" or "shuffled labels".
    """

    vector: Float[Tensor, " d_model"]
    centre: Float[Tensor, " d_model"]
    site: str
    layer: int
    positive: str
    negative: str
    kind: str


def difference_in_means(
    data: xr.DataArray, layer: int, positive: str, negative: str, *, shuffle_seed: int | None = None
) -> Direction:
    """Mean activation of one class minus that of another.

    Args:
        shuffle_seed: the control: labels are dealt anew among the examples of each true class, and the result is
            given the length of the true difference. Dealt anew among all, each half would hold more of one class by
            chance; where the property makes up much of the variance, that is the true direction again.

    Raises:
        ValueError: a label that no example has, a layer that the data have not, or means that do not differ.

    Source: Marks and Tegmark 2023 (arXiv:2310.06824) for its use as a probe that transfers to interventions.
    """
    labels = data["label"].values
    if missing := {positive, negative} - set(labels.tolist()):
        raise ValueError(f"No example has the label {sorted(missing)}: there are {sorted(set(labels.tolist()))}.")
    if layer not in data["layer"].values:
        raise ValueError(f"These activations have layers {data['layer'].values.tolist()}, not {layer}.")
    x = data.sel(layer=layer).values.astype(float)
    two = (labels == positive) | (labels == negative)
    x, labels = x[two], labels[two]

    def difference(labels: np.ndarray) -> np.ndarray:
        return x[labels == positive].mean(0) - x[labels == negative].mean(0)

    vector = difference(labels)
    length = np.linalg.norm(vector)
    if length == 0:
        raise ValueError(f"The means of {positive!r} and {negative!r} are the same at layer {layer}: no direction.")
    kind = "difference in means"
    if shuffle_seed is not None:
        rng, shuffled = np.random.default_rng(shuffle_seed), labels.copy()
        for own in (labels == positive, labels == negative):
            shuffled[own] = rng.permutation(np.resize([positive, negative], own.sum()))
        vector = difference(shuffled)
        vector, kind = vector * length / np.linalg.norm(vector), "shuffled labels"
    centre = (x[labels == positive].mean(0) + x[labels == negative].mean(0)) / 2
    tensors = (torch.tensor(each, dtype=torch.float32) for each in (vector, centre))
    return Direction(*tensors, data.attrs["site"], int(layer), positive, negative, kind)


def random_direction(direction: Direction, seed: int = 0) -> Direction:
    """A direction of the same length and place, drawn evenly from all directions: the control for an intervention."""
    drawn = torch.randn(len(direction.vector), generator=torch.Generator().manual_seed(seed))
    return replace(direction, vector=drawn * direction.vector.norm() / drawn.norm(), kind="random")


# -------------------------------------------------------------------------------------------------------- interventions


def erase(
    model: Any,
    pairs: PromptPairs,
    directions: Mapping[str, Direction],
    *,
    pos: int | Sequence[int] = -1,
    metric: str = "logit_diff",
) -> xr.DataArray:
    """Project a direction out of the clean run and see what is left of the answer: is what the probe reads used?

    The activation's component along the direction is set to that of the direction's centre, the same for every
    prompt, so that the two classes can no longer be told apart along it.

    Args:
        directions: by name; give random and shuffled ones beside the one of interest.
        pos: at which position(s). Later layers may read the property again elsewhere.
        metric: a name in ``METRICS``.

    Returns:
        Over (direction, prompt) the metric after erasure; coordinates ``clean`` and ``corrupted`` hold the metric of
        the two unchanged runs, ``kind`` the kind of direction. The receipt is in the attributes:
        ``elements_changed`` and ``mean_change`` (mean absolute change of those, in activation units).

    What it does not show: an answer that survives does not prove that the property is unused; there may be other
    directions, other tokens and other layers that carry it (a probe trained after erasure shows the first).

    Raises:
        ValueError: no directions, a site whose edit does not reach all that reads it, a position outside the prompts.
        NothingChanged: a direction whose erasure changed no activation.
    """
    edits = {(name,): _eraser(model, direction) for name, direction in directions.items()}
    return intervene(model, pairs, directions, edits, (), pos, metric, "erasing").rename("erasure")


def steer(
    model: Any,
    pairs: PromptPairs,
    directions: Mapping[str, Direction],
    scales: Sequence[float],
    *,
    pos: int | Sequence[int] = -1,
    metric: str = "logit_diff",
) -> xr.DataArray:
    """Add multiples of a direction in the clean run: does the answer follow, and by how much (dose and response)?

    Args:
        scales: multiples of the direction's vector. For a difference in means 1 is the way from one class to the
            other. A 0 among them is the unchanged run.

    Returns:
        Over (direction, scale, prompt) the metric under steering; otherwise as :func:`erase`.

    What it does not show: large scales leave what the model has ever seen, and any direction breaks it then. Compare
    with directions of the same length at the same scale.

    Raises:
        ValueError: as :func:`erase`; or no scales.
        NothingChanged: every scale is 0, or a steered run is the unchanged one.
    """
    scales = [float(scale) for scale in scales]
    if not scales:
        raise ValueError("Give at least one scale.")
    if not any(scales):
        raise NothingChanged("Every scale is 0: nothing would be added. Give scales such as [-1, 0, 1].")
    edits = {
        (name, scale): _adder(model, direction, scale) for name, direction in directions.items() for scale in scales
    }
    return intervene(model, pairs, directions, edits, scales, pos, metric, "steering").rename("steering")


def _eraser(model: Any, direction: Direction) -> Any:
    device = models.info(model).device
    unit, centre = (direction.vector / direction.vector.norm()).to(device), direction.centre.to(device)
    return lambda x: x - ((x.float() - centre) @ unit)[..., None].mul(unit).to(x.dtype)


def _adder(model: Any, direction: Direction, scale: float) -> Any:
    added = (scale * direction.vector).to(models.info(model).device)
    return (lambda x: x + added.to(x.dtype)) if scale else None


def intervene(
    model: Any,
    pairs: PromptPairs,
    directions: Mapping[str, Direction],
    edits: Mapping[tuple, Any],
    scales: Sequence[float],
    pos: int | Sequence[int],
    metric: str,
    mode: str,
) -> xr.DataArray:
    """The metric of the clean run under edits at directions' sites: what erasing and steering have in common.

    Args:
        edits: for each (name of a direction,), or (name, scale), a function from activations [prompt, pos, d_model]
            at the positions to new ones; None for the unchanged run.
        scales: those of the edits, if they have some. Edits come in the order of directions, then scales.
        mode: what is done, for the attributes and error messages.

    Returns, raises:
        As :func:`erase`.
    """
    import xarray as xr

    _check_intervention(model, pairs, directions, metric)
    length = pairs.clean_tokens.shape[1]
    wanted = [pos] if isinstance(pos, int) else list(pos)
    if not wanted or any(not -length <= place < length for place in wanted):
        raise ValueError(f"pos={pos}: the prompts have positions 0 to {length - 1} (or -1 for the last).")
    positions = sorted({place % length for place in wanted})

    def measure(tokens: Tensor, hooks: Sequence = ()) -> np.ndarray:
        parts = []
        for rows in torch.arange(len(pairs)).split(BATCH):
            logits = models.run_with_hooks(model, tokens[rows], hooks) if hooks else models.run(model, tokens[rows])
            parts.append(METRICS[metric](pairs[rows.tolist()])(logits).float().cpu().numpy())
        return np.concatenate(parts).astype(float)

    clean, corrupted = measure(pairs.clean_tokens), measure(pairs.corrupted_tokens)
    values, changed, total = [], 0, 0.0
    for key, edit in edits.items():
        if edit is None:  # scale 0
            values.append(clean)
            continue
        direction, receipt = directions[key[0]], [0, 0.0]

        def hook(activation: Tensor, hook: Any, edit: Any = edit, receipt: list = receipt) -> Tensor:
            new = activation.clone()
            new[:, positions] = edit(activation[:, positions])
            change = (new - activation).abs().float()
            receipt[0] += int((change > 0).sum())
            receipt[1] += float(change.sum())
            return new

        values.append(measure(pairs.clean_tokens, [(models.hook_name(direction.site, direction.layer), hook)]))
        if not receipt[0]:
            raise NothingChanged(
                f"{mode} along {key[0]!r} at {direction.site} of layer {direction.layer} changed no activation: the "
                "stream already lies at the centre, or the step is too small for its precision."
            )
        changed, total = changed + receipt[0], total + receipt[1]
    info = models.info(model)
    shape = (len(directions), *([len(scales)] if scales else []), len(pairs))
    return xr.DataArray(
        np.stack(values).reshape(shape),
        dims=("direction", *(["scale"] if scales else []), "prompt"),
        coords={
            "direction": list(directions),
            **{
                name: ("direction", [getattr(direction, name) for direction in directions.values()])
                for name in ("kind", "site", "layer")
            },
            **({"scale": list(scales)} if scales else {}),
            "prompt": np.arange(len(pairs)),
            "template": ("prompt", list(pairs.template)),
            "clean": ("prompt", clean),
            "corrupted": ("prompt", corrupted),
        },
        attrs={
            "model": info.name, "processing": info.processing, "seed": info.seed, "metric": metric, "mode": mode,
            "positions": positions,
            "elements_changed": changed, "mean_change": total / max(changed, 1),
        },
    )  # fmt: skip


def _check_intervention(model: Any, pairs: PromptPairs, directions: Mapping[str, Direction], metric: str) -> None:
    pairs.check_model(model)
    if not directions:
        raise ValueError("No directions given: nothing to do.")
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: there are {', '.join(METRICS)}.")
    d_model = models.W_U(model).shape[0]
    for name, direction in directions.items():
        if direction.site not in STREAM_SITES:
            raise ValueError(
                f"Direction {name!r} is at {direction.site}; directions are edited at {', '.join(STREAM_SITES)}, where "
                "they have the width of the stream and an edit reaches everything that reads it."
            )
        if not direction.vector.norm() > 0:
            raise NothingChanged(f"Direction {name!r} is zero (or not a number): nothing would be changed.")
        if len(direction.vector) != d_model:
            raise ValueError(
                f"Direction {name!r} has {len(direction.vector)} dimensions, the model's stream {d_model}."
            )
