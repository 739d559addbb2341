"""Search by concept on dictionaries of which it is known what their features stand for."""

import itertools
from random import Random

import numpy as np
import pytest
import test_probing
import torch
from scipy import sparse
from test_features import Rectified, drawn

from mi_utils import concepts
from mi_utils.concepts import (
    ConceptTokens,
    best_f1,
    concept_search,
    concept_table,
    corpus_concepts,
    corpus_sample,
    feature_auroc,
    halves,
    labels_of,
    prompt_concept,
    shuffle_labels,
)
from mi_utils.features import ablate_feature, against_controls, steer_feature
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs
from mi_utils.smallworld import corpus, lexicon

SIGN, THINGS, FRAMES = test_probing.SIGN, test_probing.THINGS, test_probing.FRAMES


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def scored():
    """Activations [200, 12], a third of them zero, few different values; three concepts."""
    rng = np.random.default_rng(0)
    values = np.maximum(rng.integers(-2, 5, (200, 12)), 0).astype(np.float32)
    values[:, 4], values[:, 5] = 0, 2
    holds = rng.random((3, 200)) < [[0.5], [0.2], [0.05]]
    values[holds[1], 6] = 6
    return values, holds


def test_auroc_is_that_of_scikit_learn(scored):
    from sklearn.metrics import roc_auc_score

    values, holds = scored
    expected = [[roc_auc_score(row, column) for column in values.T] for row in holds]
    assert np.allclose(feature_auroc(sparse.csr_array(values), holds), expected, atol=1e-12)


def test_best_f1_is_the_best_of_all_thresholds(scored):
    from sklearn.metrics import f1_score

    values, holds = scored
    f1, threshold = best_f1(sparse.csr_array(values), holds)
    for c, f in itertools.product(range(len(holds)), range(values.shape[1])):
        cuts = sorted(set(values[:, f][values[:, f] > 0].tolist()), reverse=True)
        scores = [f1_score(holds[c], values[:, f] >= cut) for cut in cuts]
        assert f1[c, f] == pytest.approx(max(scores, default=0))
        cut = int(np.argmax(scores or [0]))
        assert threshold[c, f] == ((cuts[cut] + [*cuts, 0][cut + 1]) / 2 if cuts else np.inf)
    assert f1[1, 6] == pytest.approx(1) and threshold[1, 6] == 5 and (f1[:, 4] == 0).all()


def corrected(says, holds, text, shuffles, seed):
    """P-values as ``concept_search`` makes them of how far each concept stands out."""
    measured, null = concepts._stand_out(says, holds, text, shuffles, seed)
    return ((null.max(1)[:, None] >= measured - 1e-12).sum(0) + 1) / (shuffles + 1)


def test_correction_keeps_its_word_without_any_effect():
    """Labels in runs of three, features that know nothing of them, 12 concepts: p below 0.2 for any in a fifth."""
    hits, rng = 0, np.random.default_rng(1)
    text = np.repeat(np.arange(60), 3)
    for seed in range(120):
        holds = np.repeat(rng.random((12, 60)) < 0.3, 3, axis=1)
        says = np.repeat(rng.random((12, 60)) < 0.3, 3, axis=1)
        hits += corrected(says, holds, text, 99, seed).min() <= 0.2
    assert 12 <= hits <= 38  # 24 expected, standard deviation 4.4


def test_correction_finds_what_is_there():
    rng = np.random.default_rng(2)
    holds = rng.random((5, 100)) < 0.3
    says = rng.random((5, 100)) < 0.3
    says[2] = holds[2]
    says[3], says[4] = True, False
    p = corrected(says, holds, np.arange(100), 199, 0)
    assert p[2] == 1 / 200 and p[[0, 1]].min() > 0.05
    assert (p[[3, 4]] == 1).all()  # always or never yes is no evidence, whatever F1 says


# ---------------------------------------------------------------- a planted concept


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return load_model(test_probing.save_planted(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def labelled(planted):
    """Things in frames with their sign, "1" or "-1"."""
    return test_probing.things(planted)


@pytest.fixture(scope="module")
def found():
    directions = drawn(64, test_probing.D_MODEL, seed=8)
    directions[3] = test_probing.planted_direction()
    return Rectified(directions, 1.0, site="resid_post", layer=1)


def test_the_planted_feature_is_found(planted, labelled, found):
    table = concept_search(planted, found, labelled)
    one = table.sel(concept="1")
    assert one["found"] and one["feature"] == 3 and one["p"] < 0.01
    assert min(float(one[name]) for name in ("f1", "precision", "recall", "auroc", "baseline_f1")) > 0.99
    assert one["candidate_feature"].values[0] == 3 and one["candidate_f1"].values[0] == one["f1"]
    assert (np.diff(one["candidate_discovery_f1"]) <= 0).all()
    assert not table.sel(concept="-1")["found"]  # it has no feature, though the means tell it well
    assert table.sel(concept="-1")["baseline_f1"] > 0.9
    assert table.attrs["n_features"] == 64 and table.attrs["site"] == "resid_post"


def test_shuffled_labels_find_none(planted, labelled, found):
    data = concepts._one_label_each(labelled)
    for seed in range(5):
        shuffled = shuffle_labels(data, seed)
        assert (shuffled.holds.sum(1) == data.holds.sum(1)).all()
        table = concept_search(planted, found, shuffled, seed=seed)
        assert not table["found"].any() and (table["p"] > 0.02).all()


class Remembering(Rectified):
    """Its feature 0 knows half of the words by heart; feature 1 knows some of every kind."""

    def __init__(self, model, words):
        embedding = model.embed.W_E.detach()
        ids = [model.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
        super().__init__(torch.zeros(4, embedding.shape[1]), site="resid_pre", layer=0)
        self.known = embedding[ids]

    def encode(self, x):
        active = torch.zeros(*x.shape[:-1], 4)
        apart = (x[..., None, :] - self.known).norm(dim=-1).amin(-1)
        active[..., 0] = (apart < 1e-3).float() * 5
        return active


def test_a_feature_that_knows_its_words_by_heart_is_not_confirmed(planted, labelled):
    data = concepts._one_label_each(labelled)
    discovery, _ = halves(data)
    words = {str(w) for w in data.groups["entity"][discovery] if SIGN[str(w)] == 1}
    table = concept_search(planted, Remembering(planted, sorted(words)), data)
    one = table.sel(concept="1")
    assert one["feature"] == 0 and one["discovery_f1"] == 1
    assert one["f1"] == 0 and not one["found"]


def test_halves_share_nothing_and_have_something_of_each(planted, labelled):
    data = concepts._one_label_each(labelled)
    for seed in range(4):
        sides = halves(data, seed)
        for values in data.groups.values():
            assert not set(values[sides[0]].tolist()) & set(values[sides[1]].tolist())
        assert not set(data.text[sides[0]].tolist()) & set(data.text[sides[1]].tolist())
        counts = [[row[side].sum() for side in sides] for row in data.holds]
        assert min(map(min, counts)) > 0.7 * max(map(max, counts))
    assert halves(data, 0)[0].tolist() != halves(data, 1)[0].tolist()


def test_positive_and_negative_prompts(planted, found):
    prompts = {s: [f" {FRAMES[i % 8]} {thing}" for i, thing in enumerate(THINGS) if SIGN[thing] == s] for s in (1, -1)}
    data = prompt_concept(planted, prompts[1], prompts[-1])
    table = concept_search(planted, found, data)
    assert table.sel(concept="positive")["feature"] == 3 and table["found"].all()
    whole = prompt_concept(planted, prompts[1], prompts[-1], at="all")
    assert len(whole) == 2 * len(data) and whole.holds.sum() == 2 * data.holds.sum()
    for arguments, words in (
        ((prompts[1][:3], prompts[-1]), "at least 8"),
        ((prompts[1], [*prompts[-1], prompts[1][0]]), "comes twice"),
    ):
        with pytest.raises(ValueError, match=words):
            prompt_concept(planted, *arguments)
    with pytest.raises(ValueError, match="at="):
        prompt_concept(planted, prompts[1], prompts[-1], at="start")


def test_too_few_examples_are_refused_with_the_reason(planted, labelled, found):
    few = labelled[np.isin(labelled.word, THINGS[:2])]
    with pytest.raises(ValueError, match="1 entity"):
        concept_search(planted, found, few)


def test_tokens_of_another_model_are_refused(tiny, planted, labelled):
    sae = Rectified(drawn(8, 32), 0.2)
    with pytest.raises(ValueError, match="another model"):
        concept_search(tiny, sae, labelled)


def test_the_table_takes_the_better_dictionary(planted, labelled, found):
    data = concepts._one_label_each(labelled)
    poor = Rectified(drawn(16, test_probing.D_MODEL, seed=9), 1.0, site="resid_post", layer=1)
    table = concept_table(planted, {"poor": poor, "good": found}, data)
    one = table.sel(concept="1")
    assert one["sae"] == "good" and one["feature"] == 3 and one["found"]
    assert one["p"] == pytest.approx(2 * concept_search(planted, found, data).sel(concept="1")["p"])
    with pytest.raises(ValueError, match="No dictionaries"):
        concept_table(planted, {}, data)


# ---------------------------------------------------------------- labels of the corpus


def spans(document):
    return {(document.text[label.start : label.end], label.facet, label.value) for label in labels_of(document)}


def test_labels_say_what_the_corpus_knows():
    slots = {"IO": corpus.Word("Mary", (("gender", "female"),)), "S": "John", "country": "France"}
    found = spans(corpus.fill("{IO} and {S1} saw {country}. {S2} gave it to {IO}", slots, "ioi"))
    assert ("John", "role", "ioi S2") in found and ("John", "mention", "again") in found
    assert ("Mary", "gender", "female") in found and ("Mary", "mention", "again") in found
    assert ("France", "continent", "Europe") in found
    assert {(".", "next", "ioi S2"), ("to", "next", "ioi IO"), ("saw", "next", "ioi country")} <= found
    assert not any(facet == "entity" for _, facet, _ in found)
    answer = {"country": "France", "answer": corpus.Word("Paris", (("relation", "capital"),))}
    found = spans(corpus.fill("The capital of {country} is {answer}.", answer, "fact"))
    assert (" of France is ", "relation asked", "capital") in found
    slots = {"name": corpus.Word("Mary", (("gender", "female"),)), "pronoun": "she"}
    assert (" ran and ", "subject gender", "female") in spans(corpus.fill("{name} ran and {pronoun} fell", slots, "x"))
    slots = {"noun1": "ship", "verb": "crossed", "noun2": "harbor"}
    found = spans(corpus.fill("The {noun1} {verb} the {noun2}.", slots, "topic", topic="sea"))
    assert {("ship", "topic", "sea"), (" crossed the harbor.", "topic so far", "sea")} <= found
    assert ("The", "topic", "sea") not in found


def test_every_token_gets_the_labels_that_cover_its_word(model):
    documents = list(itertools.islice(corpus.documents(5), 60))
    data = corpus_concepts(model, documents)
    assert len(data.tokens) == 60 and not (data.pos == 0).any()
    for concept in ("family: fact", "gender: female", "mention: again", "role: fact country"):
        row = data.holds[data.concepts.index(concept)]
        facet, value = concept.split(": ")
        for number, document in enumerate(documents):
            covered = {
                document.text[label.start : label.end] for label in labels_of(document)
                if (label.facet, label.value) == (facet, value)
            }  # fmt: skip
            chosen = row & (data.text == number)
            said = model.tokenizer.decode([data.tokens[number][pos] for pos in data.pos[chosen]])
            if facet == "family":
                assert said == (document.text if covered else "")
            else:
                assert set(said.split()) == covered, document.text
    rows = {name: data.holds[i] for i, name in enumerate(data.concepts)}
    among = {name: data.among[i] for i, name in enumerate(data.concepts)}
    assert (among["gender: male"] == rows["gender: male"] | rows["gender: female"]).all()
    assert among["family: ioi"].all() and (among["role: ioi S2"] == among["role: fact country"]).all()
    countries = {country.name.lower() for country in lexicon.COUNTRIES}
    assert set(data.groups["word"][rows["role: fact country"]]) <= countries


def test_the_sample_tests_most_of_what_the_corpus_knows(model):
    data = corpus_sample(model)
    reasons = concepts._untestable(data, halves(data))
    testable = {name for name, reason in zip(data.concepts, reasons, strict=True) if not reason}
    assert len(testable) >= 50
    assert {"gender: male", "gender: female", "number: plural", "sentiment: positive", "role: ioi S2"} <= testable
    assert "mention: first" not in testable  # most words come once: saying yes would do
    assert {f"topic: {topic}" for topic in lexicon.TOPICS} <= testable
    assert "family: docstring" not in testable  # one template: nothing to hold back


def test_concept_tokens_keep_their_shape(model):
    data = corpus_sample(model, 40)
    assert isinstance(data, ConceptTokens)
    assert data.holds.shape == (len(data.concepts), len(data)) and len(data.pos) == len(data)
    assert (np.lexsort((data.pos, data.text)) == np.arange(len(data))).all()


# ---------------------------------------------------------------- what ships


@pytest.fixture(scope="module")
def shipped(model):
    """The embedded model's dictionary of the latest layer."""
    from mi_utils.sae import load_sae, shipped_saes

    names = [name for name in shipped_saes() if name.startswith("smallworld-resid_post-")]
    if not names:
        pytest.skip("no SAE ships yet: make saes")
    layers = {name: int(name.rpartition("-")[2]) for name in names}
    return load_sae(max(layers, key=layers.get), model)


def topic_documents(n, seed):
    rng = Random(seed)
    return [corpus.FAMILIES["topic"][1](rng) for _ in range(n)]


def topic_pairs(model, topic, seed, n=30):
    """Prompts of other topics; in the corrupted ones the topic. Correct is a noun of the topic, incorrect one of the
    prompt's own, which it does not name."""
    rng, columns = Random(seed), {name: [] for name in ("clean", "corrupted", "correct", "incorrect")}
    nouns, verbs = lexicon.TOPICS[topic]
    for _ in range(n):
        other_nouns, other_verbs = lexicon.TOPICS[rng.choice([name for name in lexicon.TOPICS if name != topic])]
        ours, theirs = rng.sample(nouns, 2), rng.sample(other_nouns, 2)
        columns["clean"].append(f"The {theirs[0]} {rng.choice(other_verbs)} the")
        columns["corrupted"].append(f"The {ours[0]} {rng.choice(verbs)} the")
        columns["correct"].append(" " + ours[1])
        columns["incorrect"].append(" " + theirs[1])
    return PromptPairs(model, **columns, check=False)


def test_a_topic_feature_is_found_steers_and_is_used(model, shipped):
    """Found by its labels; of the topics the one is taken whose feature steers best on discovery prompts; then
    confirmed on prompts that were drawn anew."""
    data = corpus_concepts(model, topic_documents(700, 1))
    table = concept_search(model, shipped, data, shuffles=99)
    named = [str(name) for name in table["concept"].values if str(name).startswith("topic so far: ")]
    found = {name.removeprefix("topic so far: "): table.sel(concept=name) for name in named}
    found = {topic: int(one["feature"]) for topic, one in found.items() if one["found"]}
    assert found
    assert not concept_search(model, shipped, shuffle_labels(data), shuffles=99)["found"].any()

    def judged(topic, seed):
        pairs = topic_pairs(model, topic, seed)
        swapped = {"clean": pairs.corrupted, "corrupted": pairs.clean}
        own = PromptPairs(model, **swapped, correct=pairs.correct, incorrect=pairs.incorrect, check=False)
        ablated = ablate_feature(model, shipped, own, found[topic], random=16, pos=-1)
        usual = float(ablated["activation"].mean())
        steered = steer_feature(model, shipped, pairs, found[topic], [usual / 2, usual], random=16)
        return against_controls(steered), against_controls(ablated, sign=-1)

    best = max(found, key=lambda topic: float(judged(topic, 2)[0]["ratio"].mean()))
    steered, ablated = judged(best, 3)
    assert (steered["as_predicted"] >= 0.9).all() and (steered["ratio"] >= 5).all(), (best, steered)
    assert steered["change"][1] > 1.5 * steered["change"][0] > 0  # more dose, more response
    assert ablated["as_predicted"] >= 0.9 and ablated["change"] < -0.5


def test_the_table_is_printed_with_its_controls(model, shipped, monkeypatch, capsys):
    monkeypatch.setattr(concepts, "BAR", 1)
    name = f"smallworld-resid_post-{shipped.layer}"
    assert concepts.main("smallworld", [name], n_documents=800, control_tokens=8192)
    output = " ".join(capsys.readouterr().out.split())
    assert "with shuffled labels 0, with random weights 0" in output and "topic so far: music" in output
    assert name in output
    with pytest.raises(ValueError, match="No dictionary ships"):
        concepts.main("smallworld-step000200")
