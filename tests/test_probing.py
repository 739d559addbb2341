"""Probes on models in which it is known what is encoded: a feature planted by hand, and random weights."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models, probing
from mi_utils.models import load_model
from mi_utils.probing import (
    Leak,
    Span,
    activations,
    agreement_documents,
    agreement_pairs,
    check_split,
    control_labels,
    corpus_tokens,
    difference_in_means,
    erase,
    label_tokens,
    probe,
    random_direction,
    split_by_groups,
    steer,
)
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged
from mi_utils.stats import summarise

D_MODEL = 48
FRAMES, THINGS = handset.WORDS[:10], handset.WORDS[10:58]
YES, NO = handset.WORDS[58:]
SIGN = {thing: 1 if i % 2 else -1 for i, thing in enumerate(THINGS)}


def planted_direction() -> torch.Tensor:
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    return (v - v.mean()) / (v - v.mean()).norm()


def save_planted(directory):
    """A GPT-2 whose blocks write nothing. A thing's embedding is noise and plus or minus ``planted_direction``; the
    unembedding reads that direction for YES and against it for NO, and nothing else."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(handset.VOCABULARY), n_positions=16, n_embd=D_MODEL, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in GPT2LMHeadModel(config).state_dict().items()}
    for name in state:
        if ".ln_" in name and name.endswith("weight"):
            state[name].fill_(1.0)
    v = planted_direction()
    noise = torch.randn(len(handset.VOCABULARY), D_MODEL, generator=torch.Generator().manual_seed(4))
    noise -= (noise @ v)[:, None] * v  # it says nothing about the feature
    state["transformer.wte.weight"] = 0.3 * noise
    for thing, sign in SIGN.items():
        state["transformer.wte.weight"][handset.VOCABULARY.index("Ġ" + thing)] += 2 * sign * v
    state["lm_head.weight"][handset.VOCABULARY.index("Ġ" + YES)] = v
    state["lm_head.weight"][handset.VOCABULARY.index("Ġ" + NO)] = -v
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state)
    model.save_pretrained(directory)
    handset.build_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return load_model(save_planted(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return load_model(str(handset.save_random(tmp_path_factory.mktemp("untrained"))))


def things(model, *, after: int = 0, at: str = "word"):
    """Every thing in every frame, labelled with its sign; ``after`` so many more words, two lengths of text."""
    texts, spans, groups = [], [], {"template": [], "entity": []}
    for i, thing in enumerate(THINGS):
        for j, frame in enumerate(FRAMES[:8]):
            before = f" {frame}" * (1 + j % 2)
            texts.append(f"{before} {thing}" + f" {FRAMES[8]}" * after)
            spans.append(Span(len(texts) - 1, len(before) + 1, len(before) + 1 + len(thing), str(SIGN[thing])))
            groups["template"].append(frame)
            groups["entity"].append(thing)
            assert texts[-1][spans[-1].start : spans[-1].end] == thing, i
    return label_tokens(model, texts, spans, groups, at=at)


@pytest.fixture(scope="module")
def data(planted):
    return activations(planted, things(planted))


@pytest.fixture(scope="module")
def pairs(planted):
    positive = [thing for thing in THINGS if SIGN[thing] > 0]
    negative = [thing for thing in THINGS if SIGN[thing] < 0]
    return PromptPairs(
        planted,
        clean=[f" {FRAMES[0]} {thing}" for thing in positive],
        corrupted=[f" {FRAMES[0]} {thing}" for thing in negative],
        correct=[" " + YES] * len(positive),
        incorrect=[" " + NO] * len(positive),
    )


# ---------------------------------------------------------------- labelled tokens


def test_labels_land_on_the_right_tokens(planted):
    labelled = things(planted, after=2)
    for i in range(len(labelled)):
        row = labelled.tokens[labelled.text[i]]
        assert planted.tokenizer.decode([row[labelled.pos[i]]]).strip() == labelled.word[i]
        assert str(SIGN[str(labelled.word[i])]) == labelled.label[i]
    at_end = things(planted, after=2, at="end")
    assert all(pos == len(at_end.tokens[text]) - 1 for text, pos in zip(at_end.text, at_end.pos, strict=True))
    assert (at_end.word == labelled.word).all()


def test_a_word_of_several_tokens_is_read_at_its_last(tiny):
    texts = ["The unpronounceable cat", "The other cat"]
    labelled = label_tokens(
        tiny, texts, [Span(0, 4, 19, "long"), Span(1, 4, 9, "short")], {"template": ["a", "b"], "entity": ["x", "y"]}
    )
    pieces = tiny.tokenizer.encode(" unpronounceable", add_special_tokens=False)
    first = tiny.tokenizer.encode("The", add_special_tokens=False)
    assert len(pieces) > 1 and labelled.pos[0] == len(first) + len(pieces)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": []}, "at least one labelled span"),
        ({"groups": {}}, "kind of group"),
        ({"groups": {"entity": ["x"]}}, "has 1 values"),
        ({"spans": [Span(0, 0, 3, "a"), Span(0, 3, 6, "a")]}, "nothing to tell apart"),
        ({"spans": [Span(0, 0, 3, "a"), Span(0, 3, 99, "b")]}, "outside its text"),
        ({"spans": [Span(0, 0, 3, "a"), Span(5, 0, 3, "b")]}, "outside its text"),
        ({"spans": [Span(0, 0, 3, "a"), Span(0, 5, 6, "b")]}, "its tokens cover"),
        ({"texts": [" ba" * 70]}, "longer than"),
        ({"at": "start"}, "'word'"),
    ],
)
def test_unusable_labels_are_refused(planted, change, message):
    good = {
        "texts": [" ba be"], "spans": [Span(0, 0, 3, "a"), Span(0, 3, 6, "b")],
        "groups": {"entity": ["ba", "be"]}, "at": "word",
    }  # fmt: skip
    label_tokens(planted, **good)
    with pytest.raises(ValueError, match=message):
        label_tokens(planted, **good | change)


def test_corpus_labels_become_tokens(model):
    documents = agreement_documents(model, 40)
    labelled = corpus_tokens(model, documents, "number", role="subject", at="end")
    assert len(labelled) == 40 and set(labelled.label) == {"plural", "singular"}
    assert all("{subject}" in template and "{attractor}" in template for template in labelled.groups["template"])
    assert all(word in (entity, entity + "s", entity + "es")
               for word, entity in zip(labelled.word, labelled.groups["entity"], strict=True))  # fmt: skip
    both = corpus_tokens(model, documents, "number")
    assert len(both) == 80
    with pytest.raises(ValueError, match="has the facet 'colour'"):
        corpus_tokens(model, documents, "colour")


# ---------------------------------------------------------------- activations


def test_activations_are_those_of_each_text_alone(untrained):
    labelled = things(untrained, after=1)[::5]
    assert len({len(labelled.tokens[text]) for text in labelled.text}) == 2
    for site in ("resid_post", "z"):
        data = activations(untrained, labelled, site, layers=[1, 2])
        for i in range(len(labelled)):
            alone = models.cache(untrained, torch.tensor([labelled.tokens[labelled.text[i]]]), [site])
            for layer in (1, 2):
                expected = alone[site, layer][0, labelled.pos[i]].flatten()
                np.testing.assert_allclose(data.sel(layer=layer)[i], expected, atol=1e-5)
    assert (data["entity"].values == labelled.groups["entity"]).all()


def test_patterns_and_another_tokenizer_are_refused(planted, tiny):
    with pytest.raises(ValueError, match="pattern"):
        activations(planted, things(planted), "pattern")
    with pytest.raises(ValueError, match="as other tokens"):
        activations(tiny, things(planted))


# ---------------------------------------------------------------- splits and leaks


def test_splits_share_no_group(data):
    for by in (None, ["template"], ["entity"]):
        splits = split_by_groups(data, by, folds=4)
        for train, test in splits:
            for name in by or ("template", "entity"):
                assert not set(data[name].values[train]) & set(data[name].values[test])
            assert not set(train) & set(test)
        tested = [set(data["entity"].values[test]) for _, test in splits]
        assert set.union(*tested) == set(THINGS)


def test_planted_leaks_are_flagged(data):
    train, test = split_by_groups(data)[0]
    check_split(data, (train, test))
    with pytest.raises(Leak, match="entity"):
        check_split(data, split_by_groups(data, ["template"])[0])
    with pytest.raises(Leak, match="template"):
        check_split(data, split_by_groups(data, ["entity"])[0])
    with pytest.raises(Leak, match="text"):
        check_split(data, (np.append(train, test[0]), test))
    with pytest.raises(Leak, match="template|entity"):
        probe(data, splits=[*split_by_groups(data)[:-1], split_by_groups(data, ["template"])[0]], progress=False)


def test_a_word_under_two_names_is_flagged(data):
    train, test = split_by_groups(data)[0]
    names = data["entity"].values.astype(object)
    word = data["word"].values.copy()
    word[train[0]] = word[test[0]]  # the entity has been given another name, the word is the same
    renamed = data.assign_coords(entity=("example", names), word=("example", word))
    with pytest.raises(Leak, match="word"):
        check_split(renamed, (train, test))


def test_too_few_groups_for_the_folds(data):
    with pytest.raises(ValueError, match="8 different values of 'template'"):
        split_by_groups(data, folds=9)
    with pytest.raises(ValueError, match="Unknown kind"):
        split_by_groups(data, ["author"])


# ---------------------------------------------------------------- probes


@pytest.fixture(scope="module")
def result(data):
    return probe(data, strengths=[1e-2, 1e-1], progress=False)


def test_a_planted_feature_is_read_on_unseen_words_and_frames(result):
    assert result.sizes == {"layer": 2, "group": len(THINGS)}
    assert float(result.accuracy.min()) == 1.0
    interval = summarise(result.accuracy, dim="group")
    assert interval.attrs["n"] == len(THINGS)
    np.testing.assert_array_equal(result.selectivity, result.seen_accuracy - result.control_accuracy)
    assert result.attrs["majority"] == 0.5 and result.attrs["classes"] == ["-1", "1"]


def test_what_is_not_encoded_is_not_read_on_unseen_words(data):
    arbitrary = data.assign_coords(label=("example", control_labels(data, seed=7).astype(str)))
    # 48 arbitrary labels: the share that an unseen word is given right lies within four deviations of one half
    accuracy = float(probe(arbitrary, strengths=[1e-2], progress=False).accuracy.mean())
    assert abs(accuracy - 0.5) < 4 * 0.5 / np.sqrt(len(THINGS))


def test_control_labels_go_by_word_and_are_balanced(data):
    labels = control_labels(data, seed=0)
    by_word = {word: set(labels[data["word"].values == word]) for word in THINGS}
    assert all(len(own) == 1 for own in by_word.values())
    assert sum(own == {"1"} for own in by_word.values()) == len(THINGS) // 2
    assert (labels != control_labels(data, seed=1)).any()


@pytest.mark.parametrize("after", [0, 1])
def test_selectivity_on_random_weights_is_about_zero(untrained, after):
    found = probe(activations(untrained, things(untrained, after=after, at="end")), strengths=[1e-1], progress=False)
    assert abs(float(found.selectivity.mean())) < 0.1
    assert abs(float(found.accuracy.mean()) - 0.5) < 0.2


def test_unusable_data_are_refused(data):
    one = data.isel(example=np.flatnonzero(data["label"].values == "1"))
    with pytest.raises(ValueError, match="nothing to tell apart"):
        probe(one)
    with pytest.raises(ValueError, match="entity='author'"):
        probe(data, entity="author")


# ---------------------------------------------------------------- directions and interventions


def test_the_difference_in_means_is_the_planted_direction(data):
    found = difference_in_means(data, 1, "1", "-1")
    assert float(found.vector @ planted_direction()) / float(found.vector.norm()) > 0.95
    assert abs(float(found.vector.norm()) / 4 - 1) < 0.1  # the classes lie at 2 and -2
    for control in (random_direction(found, 1), difference_in_means(data, 1, "1", "-1", shuffle_seed=1)):
        torch.testing.assert_close(control.vector.norm(), found.vector.norm())
        assert abs(float(control.vector @ found.vector)) < 0.5 * float(found.vector.norm()) ** 2
    with pytest.raises(ValueError, match="No example has the label"):
        difference_in_means(data, 1, "1", "2")
    with pytest.raises(ValueError, match="layers"):
        difference_in_means(data, 7, "1", "-1")


def test_erasing_the_planted_direction_takes_the_answer_away(planted, data, pairs):
    found = difference_in_means(data, 1, "1", "-1")
    exact = probing.replace(found, vector=planted_direction(), centre=torch.zeros(D_MODEL))
    directions = {"found": found, "exact": exact, "random": random_direction(found)}
    erased = erase(planted, pairs, directions)
    before = erased["clean"].values
    assert (before > 2).all()
    np.testing.assert_allclose(erased.sel(direction="exact"), 0, atol=1e-4)
    assert float(np.abs(erased.sel(direction="found")).mean()) < 0.25 * before.mean()
    assert float(erased.sel(direction="random").mean()) > 0.8 * before.mean()
    assert erased.attrs["elements_changed"] > 0 and list(erased["kind"].values)[2] == "random"


def test_after_erasure_a_new_probe_finds_nothing(data):
    v = planted_direction().numpy()
    without = data.copy(data=data.values - (data.values @ v)[..., None] * v)
    accuracy = float(probe(without, strengths=[1e-2], progress=False).accuracy.mean())
    assert accuracy < 0.5 + 4 * 0.5 / np.sqrt(len(THINGS))


def test_steering_follows_the_dose(planted, data, pairs):
    found = difference_in_means(data, 0, "1", "-1")
    scales = [-2, -1, 0, 1]
    steered = steer(planted, pairs, {"found": found, "random": random_direction(found)}, scales)
    assert steered.dims == ("direction", "scale", "prompt")
    curve = steered.sel(direction="found").mean("prompt").values
    assert (np.diff(curve) > 0).all() and curve[0] < 0 < curve[2]
    np.testing.assert_array_equal(steered.sel(direction="found", scale=0), steered["clean"])
    # from one class to the other and no further: about the corrupted run
    np.testing.assert_allclose(curve[1], steered["corrupted"].mean(), atol=0.15 * np.abs(curve[2]))
    spread = np.ptp(steered.sel(direction="random").mean("prompt").values)
    assert spread < 0.5 * np.ptp(curve)


def test_nothing_changed_raises(planted, data, pairs):
    found = difference_in_means(data, 0, "1", "-1")
    with pytest.raises(NothingChanged, match="Every scale is 0"):
        steer(planted, pairs, {"found": found}, [0, 0.0])
    zero = probing.replace(found, vector=torch.zeros(D_MODEL))
    with pytest.raises(NothingChanged, match="zero"):
        steer(planted, pairs, {"zero": zero}, [1])
    with pytest.raises(NothingChanged, match="zero"):
        erase(planted, pairs, {"zero": zero})
    # attention writes exactly nothing in this model: there is nothing to take away
    silent = probing.replace(found, site="attn_out", centre=torch.zeros(D_MODEL))
    with pytest.raises(NothingChanged, match="changed no activation"):
        erase(planted, pairs, {"silent": silent})


def test_hooks_are_gone_also_after_an_error(planted, data, pairs):
    before = models.run(planted, pairs.clean_tokens)
    found = difference_in_means(data, 0, "1", "-1")
    erase(planted, pairs, {"found": found})
    narrow = probing.replace(found, vector=found.vector[:4])
    with pytest.raises(ValueError, match="4 dimensions"):
        steer(planted, pairs, {"narrow": narrow}, [1])
    torn = probing.replace(found, centre=torch.zeros(3))
    with pytest.raises(RuntimeError):
        erase(planted, pairs, {"torn": torn})
    torch.testing.assert_close(models.run(planted, pairs.clean_tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"site": "z"}, "is at z"), ({"site": "resid_mid"}, "is at resid_mid")],
)
def test_sites_where_a_direction_makes_no_sense_are_refused(planted, data, pairs, change, message):
    direction = probing.replace(difference_in_means(data, 0, "1", "-1"), **change)
    with pytest.raises(ValueError, match=message):
        erase(planted, pairs, {"direction": direction})


def test_wrong_arguments_of_interventions(planted, data, pairs):
    found = {"found": difference_in_means(data, 0, "1", "-1")}
    with pytest.raises(ValueError, match="No directions"):
        erase(planted, pairs, {})
    with pytest.raises(ValueError, match="positions 0 to 2"):
        erase(planted, pairs, found, pos=3)
    with pytest.raises(ValueError, match="Unknown metric"):
        erase(planted, pairs, found, metric="charm")
    with pytest.raises(ValueError, match="at least one scale"):
        steer(planted, pairs, found, [])


# ---------------------------------------------------------------- agreement


def test_agreement_documents_are_balanced_and_pairs_differ_in_the_subject(model):
    documents = agreement_documents(model, 200, seed=3)
    numbers = np.array([[label.value for label in d.labels if label.facet == "number"] for d in documents])
    assert (numbers[:, 0] == np.resize(["plural", "singular"], 200)).all()
    plural_attractor = numbers[:, 1] == "plural"
    for number in ("plural", "singular"):  # the attractor's number says nothing about the subject's
        assert 0.35 < plural_attractor[numbers[:, 0] == number].mean() < 0.65
    paired = agreement_documents(model, 20, paired=True, length=7)
    pairs = agreement_pairs(model, paired)
    assert (pairs.differs.sum(1) == 1).all() and set(pairs.correct) == {" are", " is"}
    assert float((pairs.clean_logit_diff + pairs.corrupted_logit_diff)[::2].sum()) != 0
    np.testing.assert_allclose(pairs.clean_logit_diff[::2], -pairs.corrupted_logit_diff[1::2], atol=1e-4)


def test_a_tokenizer_without_the_nouns_is_refused(planted):
    with pytest.raises(ValueError, match="0 nouns"):
        agreement_documents(planted, 10)
    with pytest.raises(ValueError, match="in twos"):
        agreement_documents(planted, 3)
