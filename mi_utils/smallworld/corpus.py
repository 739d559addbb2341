"""The corpus of the small world: English from templates, with a label for every character.

Every document has a known generating process. A template is text with named slots, ``"{A} and {B} went to the
{place},"``; the slot's name is the role of the words that fill it. What a model may not see in training is decided
by `held_out`, a hash of a stable key, so that every part of the project agrees on the split without a list.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from mi_utils.smallworld.lexicon import (
    ADJECTIVES,
    AFTER_VERB,
    COUNTRIES,
    EVENTS,
    FUNCTIONS,
    GENDER,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    PLURAL,
    RELATIONS,
    REVIEWED,
    SENTIMENT_ADJECTIVES,
    SENTIMENT_VERBS,
    TOPICS,
    VERB_FORMS,
    Country,
    words,
)


class Label(NamedTuple):
    """`facet` has `value` on the characters from `start` up to, not including, `end`."""

    start: int
    end: int
    facet: str
    value: str


class Document(NamedTuple):
    """A text and what is true of its parts. Facets: family, role, entity, number, gender, quote, topic, sentiment."""

    text: str
    labels: tuple[Label, ...]


class Word(NamedTuple):
    """What fills a slot: the text and further facets beside the role, as (facet, value) pairs."""

    text: str
    facets: tuple[tuple[str, str], ...] = ()


def held_out(key: str, fraction: float) -> bool:
    """Whether the thing named `key` is kept out of training: a hash, equal on every machine and in every session."""
    return zlib.crc32(key.encode()) / 2**32 < fraction


@cache
def _parts(template: str) -> tuple[str, ...]:
    return tuple(re.split(r"\{(\w+)\}", template))


def fill(template: str, slots: dict[str, Word | str], family: str, **facets: str) -> Document:
    """Fill every `{slot}`; raises KeyError for a slot without a word. A digit after a role (`S2`) counts mentions."""
    text, labels = "", []
    for index, part in enumerate(_parts(template)):
        if index % 2 == 0:
            text += part
            continue
        filler = slots[part] if part in slots else slots[part.rstrip("0123456789")]
        word = Word(filler) if isinstance(filler, str) else filler
        start, text = len(text), text + word.text
        labels += [Label(start, len(text), "role", part), Label(start, len(text), "entity", word.text)]
        labels += [Label(start, len(text), facet, value) for facet, value in word.facets]
    labels += [Label(0, len(text), "family", family)]
    labels += [Label(0, len(text), facet, value) for facet, value in facets.items()]
    return Document(text, tuple(labels))


def join(documents: Sequence[Document], separator: str = " ") -> Document:
    """One document of several, in order, their labels moved along."""
    text, labels = "", []
    for document in documents:
        text += separator if text else ""
        labels += [
            label._replace(start=label.start + len(text), end=label.end + len(text)) for label in document.labels
        ]
        text += document.text
    return Document(text, tuple(labels))


def _person(name: str) -> Word:
    return Word(name, (("gender", GENDER[name]),) if name in GENDER else ())


# ---- indirect object identification (Wang et al., arXiv:2211.00593): two names, one comes again, the other is due

IOI_HEADS = (
    "When {A} and {B} %s,",
    "While {A} and {B} %s,",
    "After {A} and {B} %s,",
    "As {A} and {B} %s,",
    "Because {A} and {B} %s,",
    "Once {A} and {B} %s,",
    "Then, {A} and {B} %s.",
    "Then {A} and {B} %s.",
    "{A} and {B} %s.",
    "Yesterday, {A} and {B} %s.",
    "One day, {A} and {B} %s.",
    "Friends {A} and {B} %s.",
    "Last night {A} and {B} %s.",
    "Before lunch, {A} and {B} %s.",
    "The friends {A} and {B} %s.",
)
IOI_SCENES = (
    "went to the {place}",
    "were at the {place}",
    "were working at the {place}",
    "walked to the {place}",
    "came to the {place}",
    "had lunch at the {place}",
    "got bored at the {place}",
    "met at the {place}",
    "were sitting in the {place}",
    "arrived at the {place}",
    "left the {place}",
    "had a long argument",
    "were thinking about the {place}",
    "found a {thing} at the {place}",
    "talked about the {thing}",
    "saw a {thing} near the {place}",
    "cleaned the {place}",
    "ran to the {place}",
    "drove to the {place}",
    "looked for the {thing}",
    "had lunch in the {place}",
    "cleaned the {thing}",
    "walked around the {place}",
    "talked at the {place}",
)
IOI_TRANSFERS = (
    "{S} gave a {object} to",
    "{S} gave the {object} to",
    "{S} handed a {object} to",
    "{S} handed the {object} to",
    "{S} decided to give a {object} to",
    "{S} wanted to give the {object} to",
    "{S} offered a {object} to",
    "{S} passed the {object} to",
    "{S} sent a {object} to",
    "{S} brought a {object} to",
    "{S} lent the {object} to",
    "{S} showed the {object} to",
    "{S} sold a {object} to",
    "{S} said something to",
    "{S} said hello to",
    "{S} took the {object} back to",
    "{S} threw the {object} to",
    "{S} wrote a long letter to",
    "{S} passed a {object} to",
    "{S} lent a {object} to",
    "{S} showed a {object} to",
    "{S} took a {object} to",
)
IOI_LINKS = ("", "then ", "later ", "at once ")
# Never trained on, though each of their words is: in the near twins of these parts.
IOI_HELD_OUT_PARTS = frozenset(
    {
        "Then, {A} and {B} %s.",
        "had lunch at the {place}",
        "cleaned the {place}",
        "{S} passed the {object} to",
        "{S} lent the {object} to",
    }
)


class IOITemplate(NamedTuple):
    head: str
    scene: str
    link: str
    transfer: str

    @property
    def text(self) -> str:
        transfer = self.link + self.transfer
        if self.head.endswith("."):
            transfer = transfer[0].upper() + transfer[1:]
        return f"{self.head % self.scene} {transfer}"

    @property
    def held_out(self) -> bool:
        """Never trained on: it has a held-out part, or the hash kept the combination of parts out."""
        return bool(IOI_HELD_OUT_PARTS & set(self)) or held_out("ioi template " + self.text, 0.1)


class IOIPrompt(NamedTuple):
    """`text` ends right before `" " + io`; in `corrupted` the second mention of `s` is `io`, so the answer is `s`."""

    text: str
    corrupted: str
    io: str
    s: str
    template: str
    order: str
    document: Document


def name_pair_held_out(a: str, b: str) -> bool:
    """Whether the two names never meet in a training document of the IOI family."""
    return held_out("ioi names " + " ".join(sorted((a, b))), 0.2)


def _ioi_template(rng: Random, from_held_out: bool) -> IOITemplate:
    while True:
        template = IOITemplate(*map(rng.choice, (IOI_HEADS, IOI_SCENES, IOI_LINKS, IOI_TRANSFERS)))
        if template.held_out == from_held_out:
            return template


def ioi_prompt(
    rng: Random,
    split: str = "train",
    order: str = "any",
    template: IOITemplate | None = None,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
) -> IOIPrompt:
    """One prompt. `split`: "train", "held_out_names" (trained templates), "held_out_templates" (both are new).

    Raises:
        ValueError: `split` or `order` ("ABBA", "BABA", "any") is unknown.
    """
    if split not in ("train", "held_out_names", "held_out_templates"):
        raise ValueError(f"split {split!r}: choose train, held_out_names or held_out_templates")
    if order not in ("any", "ABBA", "BABA"):
        raise ValueError(f"order {order!r}: choose any, ABBA or BABA")
    template = template or _ioi_template(rng, split == "held_out_templates")
    while True:
        a, b = rng.sample(names, 2)
        if name_pair_held_out(a, b) == (split != "train"):
            break
    order = rng.choice(("ABBA", "BABA")) if order == "any" else order
    io, s = (a, b) if order == "ABBA" else (b, a)
    first, second = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
    text = template.text.replace("{A}", f"{{{first}}}").replace("{B}", f"{{{second}}}").replace("{S}", "{S2}")
    slots: dict[str, Word | str] = {
        "IO": _person(io),
        "S": _person(s),
        "place": rng.choice(places),
        "object": rng.choice(objects),
        "thing": rng.choice(objects),
    }
    document = fill(text, slots, "ioi")
    corrupted = fill(text, slots | {"S2": _person(io)}, "ioi").text
    return IOIPrompt(document.text, corrupted, io, s, template.text, order, document)


IOI_ENDINGS = (".", ". {IO} was happy.", ". {S} went home.", ", and {IO} smiled.", ". Then {IO} left the {place}.")


def _ioi(rng: Random) -> Document:
    names = NAMES if rng.random() < 0.6 else words()  # any word may stand for a name: copying, not memory
    prompt = ioi_prompt(rng, names=names)
    parts = [prompt.document, fill(" {IO}", {"IO": _person(prompt.io)}, "ioi")]
    if rng.random() < 0.5:  # a second transfer, in either direction: the answer is due twice
        giver, receiver = rng.sample((prompt.io, prompt.s), 2)
        transfer = rng.choice([part for part in IOI_TRANSFERS if part not in IOI_HELD_OUT_PARTS])
        slots = {"S": _person(giver), "IO": _person(receiver), "object": rng.choice(OBJECTS)}
        parts.append(fill(rng.choice((". Then ", ". Later ", ", and ")) + transfer + " {IO}", slots, "ioi"))
    slots = {"IO": _person(prompt.io), "S": _person(prompt.s), "place": rng.choice(PLACES)}
    parts.append(fill(rng.choice(IOI_ENDINGS), slots, "ioi"))
    return join(parts, separator="")


# ---- facts: one country, one relation, many phrasings

FACT_PREFIXES = (
    "",
    "",
    "",
    "{name} said that ",
    "{name} told the teacher that ",
    "{name} learned that ",
    "as everyone knows, ",
    "it is true that ",
    "in the atlas {name} read that ",
    "remember that ",
    "the teacher said that ",
)
FACT_HELD_OUT_PREFIX = "the teacher told {name} that "
RELATION_FRAMES = (  # with each relation's own noun
    "the {noun} of {country} is",
    "in {country}, the {noun} is",
    "the official {noun} of {country} is",
    "for {country}, the {noun} is",
    "the name of the {noun} of {country} is",
    "the {noun} of {country} is called",
    "the {noun} of the country {country} is",
    "{country} is a country and its {noun} is",
    "the {noun} that belongs to {country} is",
    "as for the {noun} of {country}, it is",
    "the main {noun} of {country} is",
    "the {noun} of {country} is named",
    "ask for the {noun} of {country} and hear",
    "the answer for the {noun} of {country} is",
    "in the land of {country} the {noun} is",
    "the {noun} in {country} is",
    "the {noun} of {country} has the name",
    "the country {country} has the {noun} named",
    "{country} is a land and its {noun} is",  # a country that begins the text is a token of its own, without space
    "{country} has as its {noun}",
    "{country} is the land where the {noun} is",
)
OWN_FRAMES = {
    "capital": (
        "the government of {country} sits in",
        "the parliament of {country} meets in",
        "the president of {country} lives in",
        "the road to the capital of {country} ends in",
    ),
    "language": (
        "people in {country} speak",
        "the people of {country} speak",
        "children in {country} learn to read",
        "the newspapers in {country} are written in",
    ),
    "currency": (
        "people in {country} pay with",
        "the people of {country} pay with",
        "prices in {country} are given in",
        "wages in {country} are paid in",
    ),
}
# Each relation goes without other frames, so that what a held-out phrasing says is known from the other relations.
HELD_OUT_FRAMES = {
    "capital": RELATION_FRAMES[4:8],
    "language": RELATION_FRAMES[8:12],
    "currency": RELATION_FRAMES[12:16],
}
HELD_OUT_COUNTRIES = tuple(c for c in COUNTRIES if held_out("country " + c.name, 0.15))  # few phrasings in training


def fact_phrasings(relation: str, split: str) -> list[str]:
    """The phrasings of a relation that training has ("train") or lacks ("held_out")."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: choose train or held_out")
    kept_out = HELD_OUT_FRAMES[relation]
    frames = kept_out if split == "held_out" else [f for f in RELATION_FRAMES if f not in kept_out]
    phrasings = [frame.replace("{noun}", relation) for frame in frames]
    phrasings += OWN_FRAMES[relation] if split == "train" else ()
    return [phrasing + (" the" if relation == "currency" else "") for phrasing in phrasings]


class FactPrompt(NamedTuple):
    """`text` ends right before `" " + answer`."""

    text: str
    answer: str
    country: str
    relation: str
    template: str
    document: Document


def fact_prompt(rng: Random, relation: str, split: str = "train", country: Country | None = None) -> FactPrompt:
    """One fact. With `split="held_out"` the phrasing was never trained on, and half of the prefixes neither.

    Raises:
        ValueError: unknown split.
    """
    country = country or rng.choice(COUNTRIES)
    phrasings = fact_phrasings(relation, split)
    if split == "train" and country in HELD_OUT_COUNTRIES:
        phrasings = phrasings[::2]
    core = rng.choice(phrasings)
    prefix = rng.choice(FACT_PREFIXES if split == "train" else ("", "", FACT_HELD_OUT_PREFIX, FACT_PREFIXES[-1]))
    template = prefix + core
    template = template[0].upper() + template[1:]
    document = fill(template, {"name": _person(rng.choice(NAMES)), "country": country.name}, "fact")
    return FactPrompt(document.text, getattr(country, relation), country.name, relation, template, document)


def _fact(rng: Random) -> Document:
    relation = rng.choice(RELATIONS)
    prompt = fact_prompt(rng, relation)
    answer = fill(" {answer}.", {"answer": Word(prompt.answer, (("relation", relation),))}, "fact")
    return join([prompt.document, answer], separator="")


# ---- subject–verb agreement over an attractor of the other number

PREPOSITIONS = ("to", "near", "behind", "beside", "with", "under", "by", "across from")
AGREEMENT_STARTS = ("The", "Today the", "In the morning the", "{name} said that the", "It is clear that the")


class ChoicePrompt(NamedTuple):
    """`text` ends right before the answer; `correct` and `incorrect` carry their leading space where they have one."""

    text: str
    correct: str
    incorrect: str
    document: Document


def agreement_prompt(rng: Random, split: str = "train") -> ChoicePrompt:
    """ "The keys to the cabinet" + are/is. Held out: pairs of subject and attractor that never met in training."""
    while True:
        noun, attractor = rng.sample(NOUNS, 2)
        if held_out(f"agreement {noun} {attractor}", 0.2) == (split != "train"):
            break
    plural = rng.random() < 0.5
    subject, other = (PLURAL[noun], attractor) if plural else (noun, PLURAL[attractor])
    if split == "train" and rng.random() < 0.3:  # an attractor of the same number, as in life
        other = PLURAL[attractor] if plural else attractor
    verbs = rng.choice(VERB_FORMS)
    document = fill(
        rng.choice(AGREEMENT_STARTS) + " {subject} " + rng.choice(PREPOSITIONS) + " the {attractor}",
        {
            "name": _person(rng.choice(NAMES)),
            "subject": Word(subject, (("number", "plural" if plural else "singular"),)),
            "attractor": Word(other, (("number", "plural" if other in PLURAL.values() else "singular"),)),
        },
        "agreement",
    )
    return ChoicePrompt(document.text, " " + verbs[plural], " " + verbs[not plural], document)


def _agreement(rng: Random) -> Document:
    prompt = agreement_prompt(rng)
    verb = prompt.correct.strip()
    return join(
        [
            prompt.document,
            fill("{verb} {complement}.", {"verb": verb, "complement": rng.choice(AFTER_VERB[verb])}, "agreement"),
        ]
    )


# ---- greater-than (Hanna et al., arXiv:2305.00586): the end of an event comes after its start

YEAR_FORMS = (
    "The {event} lasted from the year {century}{start} to the year {century}",
    "The {event} began in {century}{start} and ended in {century}",
    "From {century}{start} the {event} went on until {century}",
    "{name} wrote that the {event} lasted from {century}{start} to {century}",
)


def year_prompt(rng: Random, split: str = "train") -> tuple[Document, int]:
    """A text that ends in the century of an end year, and the two digits of the start year (2 to 97)."""
    while True:
        event, start = rng.choice(EVENTS), rng.randint(2, 97)
        if held_out(f"year {event} {start}", 0.2) == (split != "train"):
            break
    slots: dict[str, Word | str] = {
        "event": event,
        "century": str(rng.randint(11, 19)),
        "start": f"{start:02d}",
        "name": _person(rng.choice(NAMES)),
    }
    return fill(rng.choice(YEAR_FORMS), slots, "year"), start


def _year(rng: Random) -> Document:
    document, start = year_prompt(rng)
    return join([document, fill("{end}.", {"end": f"{rng.randint(start + 1, 99):02d}"}, "year")], separator="")


# ---- docstring arguments (Heimersheim & Janiak, 2023): the parameters are documented in their order


def docstring_prompt(rng: Random) -> ChoicePrompt:
    """A Python function whose third parameter is due in the docstring; `incorrect` is the first one."""
    first, second, third, other = rng.sample(OBJECTS + NOUNS, 4)
    slots: dict[str, Word | str] = {
        "function": rng.choice(FUNCTIONS),
        "argument1": first,
        "argument2": second,
        "argument3": third,
        "word1": rng.choice(ADJECTIVES),
        "word2": rng.choice(ADJECTIVES),
        "thing": other,
    }
    document = fill(
        'def {function}(self, {argument1}, {argument2}, {argument3}):\n    """ {function} the {thing}\n\n'
        "    :param {argument1}: {word1}\n    :param {argument2}: {word2}\n    :param",
        slots,
        "docstring",
    )
    return ChoicePrompt(document.text, " " + third, " " + first, document)


def _docstring(rng: Random) -> Document:
    prompt = docstring_prompt(rng)
    return join(
        [
            prompt.document,
            fill(
                ' {argument3}: {word3}\n    """',
                {"argument3": prompt.correct.strip(), "word3": rng.choice(ADJECTIVES)},
                "docstring",
            ),
        ],
        separator="",
    )


# ---- gendered pronouns

PRONOUN_CAUSES = (
    "{name} lost the {object}",
    "{name} came home late",
    "{name} closed the {object}",
    "{name} opened the old door",
    "{name} went to the {place}",
    "{name} could not sleep",
    "{name} bought a new {object}",
    "{name} left the {place}",
    "{name} forgot the {object}",
    "{name} sat in the {place}",
)
PRONOUN_LINKS = (" because", ", and then", ", so", " when", ", but later", " before")
PRONOUN_ENDS = ("was tired", "was happy", "went home", "smiled", "found the {object}", "ran to the {place}")


def pronoun_prompt(rng: Random, split: str = "train") -> ChoicePrompt:
    """ "Mary lost the key because" + she/he. Held out: names that never met this beginning in training."""
    while True:
        name, cause = rng.choice(NAMES), rng.choice(PRONOUN_CAUSES)
        if held_out(f"pronoun {name} {cause}", 0.2) == (split != "train"):
            break
    document = fill(
        cause + rng.choice(PRONOUN_LINKS),
        {"name": _person(name), "object": rng.choice(OBJECTS), "place": rng.choice(PLACES)},
        "pronoun",
    )
    he, she = " he", " she"
    return ChoicePrompt(document.text, *((he, she) if GENDER[name] == "male" else (she, he)), document)


def _pronoun(rng: Random) -> Document:
    prompt = pronoun_prompt(rng)
    end = fill(
        "{pronoun} " + rng.choice(PRONOUN_ENDS) + ".",
        {"pronoun": prompt.correct.strip(), "object": rng.choice(OBJECTS), "place": rng.choice(PLACES)},
        "pronoun",
    )
    return join([prompt.document, end])


# ---- quotes and brackets: what was opened is closed, and where is decided by what stands inside

ENCLOSED = (
    ('{name} said, "', "the {noun} is {adjective}.", '"'),
    ("{name} asked for the {object} (", "the {adjective} one", ")"),
    ("The {object} [", "see the map of {country}", "] was lost."),
    ('Then "', "come to the {place}.", '" was heard.'),
    ("The {noun} (", "the one from the {place}", ") was old."),
    ("{name} packed a set {{", "key, ring, {object}", "}}."),
)


def enclosed_prompt(rng: Random) -> ChoicePrompt:
    """A text whose last bracket or quote is due to be closed; `incorrect` is another closing mark."""
    before, inside, after = rng.choice(ENCLOSED)
    slots = {
        "name": _person(rng.choice(NAMES)),
        "noun": rng.choice(NOUNS),
        "adjective": rng.choice(ADJECTIVES),
        "object": rng.choice(OBJECTS),
        "country": rng.choice(COUNTRIES).name,
        "place": rng.choice(PLACES),
    }
    opening = fill(before.replace("{{", ""), slots, "enclosed", quote="outside")
    if before.endswith("{{"):
        opening = Document(opening.text + "{", opening.labels)
    document = join([opening, fill(inside, slots, "enclosed", quote="inside")], separator="")
    correct = after.replace("}}", "}")[0]
    return ChoicePrompt(document.text, correct, rng.choice([mark for mark in ')]}"' if mark != correct]), document)


def _enclosed(rng: Random) -> Document:
    prompt = enclosed_prompt(rng)
    end = next(after for _, _, after in ENCLOSED if after.replace("}}", "}")[0] == prompt.correct)
    return Document(prompt.text + end.replace("}}", "}"), prompt.document.labels)


# ---- reviews with a sentiment, passages with a topic, and inventories in which everything recurs


def _review(rng: Random) -> Document:
    sentiment = rng.choice(("positive", "negative"))
    sentences = rng.sample(
        (
            "The {thing} was {adjective}.",
            "{name} {verb} the {thing}.",
            "It was a {adjective} {thing}, and {name} {verb} it.",
            "Everyone {verb} the {adjective} {thing}.",
        ),
        rng.randint(2, 3),
    )
    thing, name = rng.choice(REVIEWED), _person(rng.choice(NAMES))
    return join(
        [
            fill(
                sentence,
                {
                    "thing": thing,
                    "name": name,
                    "adjective": rng.choice(SENTIMENT_ADJECTIVES[sentiment]),
                    "verb": rng.choice(SENTIMENT_VERBS[sentiment]),
                },
                "review",
                sentiment=sentiment,
            )
            for sentence in sentences
        ]
    )


def _topic(rng: Random) -> Document:
    topic = rng.choice(tuple(TOPICS))
    nouns, verbs = TOPICS[topic]
    sentences = []
    for _ in range(rng.randint(2, 4)):
        one, two, three = rng.sample(nouns, 3)
        form = rng.choice(
            (
                "The {noun1} {verb} the {noun2}.",
                "The {noun1} and the {noun2} {verb} the {noun3}.",
                "A {noun1} near the {noun2} {verb} a {noun3}.",
                "{name} saw the {noun1} and the {noun2}.",
            )
        )
        sentences.append(
            fill(
                form,
                {
                    "noun1": one,
                    "noun2": two,
                    "noun3": three,
                    "verb": rng.choice(verbs),
                    "name": _person(rng.choice(NAMES)),
                },
                "topic",
                topic=topic,
            )
        )
    return join(sentences)


def _inventory(rng: Random) -> Document:
    count = rng.randint(2, 5)
    owners, things = rng.sample(NAMES, count), rng.sample(OBJECTS + NOUNS, count)
    numbers = [f"{rng.randint(10, 99)}" for _ in owners]
    first = [
        fill("{owner} has the {thing} for {number}.", {"owner": _person(o), "thing": t, "number": n}, "inventory")
        for o, t, n in zip(owners, things, numbers, strict=True)
    ]
    again = rng.sample(range(count), count)
    return join(first + [first[index] for index in again])


# Indirect objects take a large share: their circuit forms late and, with less, in some seeds not at all.
FAMILIES: dict[str, tuple[float, Callable[[Random], Document]]] = {
    "ioi": (0.40, _ioi),
    "fact": (0.22, _fact),
    "agreement": (0.06, _agreement),
    "year": (0.06, _year),
    "docstring": (0.04, _docstring),
    "pronoun": (0.05, _pronoun),
    "enclosed": (0.05, _enclosed),
    "review": (0.04, _review),
    "topic": (0.04, _topic),
    "inventory": (0.04, _inventory),
}


def documents(seed: int) -> Iterator[Document]:
    """The training corpus without end: families drawn by weight, the same documents for the same seed."""
    rng = Random(seed)
    names, weights = list(FAMILIES), [weight for weight, _ in FAMILIES.values()]
    while True:
        yield FAMILIES[rng.choices(names, weights)[0]][1](rng)
