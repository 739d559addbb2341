"""The corpus says what it is made of, and keeps from training what it says it keeps."""

import re
from itertools import islice
from random import Random

import pytest

from mi_utils.smallworld import corpus, lexicon


@pytest.fixture(scope="module")
def sample() -> list[corpus.Document]:
    return list(islice(corpus.documents(seed=3), 6000))


def values(document: corpus.Document, facet: str) -> list[str]:
    return [label.value for label in document.labels if label.facet == facet]


def test_a_seed_names_one_corpus(sample):
    assert list(islice(corpus.documents(seed=3), 50)) == sample[:50]
    assert list(islice(corpus.documents(seed=4), 50)) != sample[:50]


def test_every_family_is_there_and_every_character_has_a_family(sample):
    assert {family for document in sample for family in values(document, "family")} == set(corpus.FAMILIES)
    for document in sample:
        assert all(0 <= label.start < label.end <= len(document.text) for label in document.labels)


def test_an_entity_label_covers_its_own_word(sample):
    for document in sample:
        for label in document.labels:
            if label.facet == "entity":
                assert document.text[label.start : label.end] == label.value


def test_held_out_name_pairs_never_meet_in_training(sample):
    pairs = 0
    for document in sample:
        if "ioi" in values(document, "family"):
            roles = {
                document.text[la.start : la.end]
                for la in document.labels
                if la.facet == "role" and la.value in ("IO", "S1")
            }
            pairs += 1
            assert not corpus.name_pair_held_out(*roles)
    assert pairs > 1000


@pytest.mark.parametrize("split", ["held_out_names", "held_out_templates"])
def test_held_out_prompts_use_held_out_pairs(split):
    rng = Random(0)
    for prompt in (corpus.ioi_prompt(rng, split) for _ in range(300)):
        assert corpus.name_pair_held_out(prompt.io, prompt.s)


def test_the_corrupted_prompt_differs_in_the_second_subject_alone():
    rng = Random(1)
    for order in ("ABBA", "BABA"):
        for prompt in (corpus.ioi_prompt(rng, order=order) for _ in range(200)):
            label = next(la for la in prompt.document.labels if la.value == "S2")
            assert prompt.text[label.start : label.end] == prompt.s
            assert prompt.corrupted == prompt.text[: label.start] + prompt.io + prompt.text[label.end :]
            first_io = prompt.text.index(prompt.io) < prompt.text.index(prompt.s)
            assert prompt.io in prompt.s or prompt.s in prompt.io or first_io == (order == "ABBA")


def test_held_out_phrasings_of_facts_are_not_in_training(sample):
    text = " ".join(document.text for document in sample).lower()
    for relation in corpus.RELATIONS:
        trained, kept_out = (set(corpus.fact_phrasings(relation, split)) for split in ("train", "held_out"))
        assert len(kept_out) >= 4 and not trained & kept_out
        for phrasing in kept_out:
            for country in lexicon.COUNTRIES:
                assert phrasing.replace("{country}", country.name).lower() not in text, relation
    assert "the teacher told" not in text


@pytest.mark.parametrize("kind", ["ioi", "fact"])
def test_held_out_prompts_have_no_word_that_training_lacks(sample, kind):
    rng = Random(4)
    known = {word for document in sample for word in re.findall(r"\w+", document.text)}
    for _ in range(300):
        if kind == "ioi":
            prompt = corpus.ioi_prompt(rng, "held_out_templates")
        else:
            prompt = corpus.fact_prompt(rng, rng.choice(corpus.RELATIONS), "held_out")
        assert set(re.findall(r"\w+", prompt.text)) <= known


def test_the_atlas_is_what_the_answers_say():
    rng = Random(2)
    for relation in corpus.RELATIONS:
        for prompt in (corpus.fact_prompt(rng, relation, "held_out") for _ in range(100)):
            country = next(c for c in lexicon.COUNTRIES if c.name == prompt.country)
            assert prompt.answer == getattr(country, relation) and prompt.country in prompt.text


def test_agreement_choice_prompts_name_the_number_of_the_subject():
    rng = Random(3)
    for prompt in (corpus.agreement_prompt(rng, "held_out") for _ in range(200)):
        subject, attractor = values(prompt.document, "number")
        assert subject != attractor
        assert prompt.correct.strip() in [forms[subject == "plural"] for forms in lexicon.VERB_FORMS]


def test_years_end_after_they_start(sample):
    for document in sample:
        if "year" in values(document, "family"):
            year = {la.value: document.text[la.start : la.end] for la in document.labels if la.facet == "role"}
            assert int(year["end"]) > int(year["start"])


def test_brackets_and_quotes_are_closed(sample):
    for document in sample:
        if "enclosed" in values(document, "family"):
            for opening, closing in ("()", "[]", "{}"):
                assert document.text.count(opening) == document.text.count(closing)
            assert document.text.count('"') % 2 == 0


def test_unknown_splits_and_orders_are_refused():
    with pytest.raises(ValueError, match="held_out_names"):
        corpus.ioi_prompt(Random(0), split="test")
    with pytest.raises(ValueError, match="BABA"):
        corpus.ioi_prompt(Random(0), order="AB")
    with pytest.raises(ValueError, match="train or held_out"):
        corpus.fact_prompt(Random(0), "capital", split="test")
