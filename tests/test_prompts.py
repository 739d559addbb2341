"""Prompt pairs: what is refused, what is checked, and where roles stand."""

from __future__ import annotations

import pytest
import torch

from mi_utils import models
from mi_utils.prompts import BEHAVIOURS, ModelDoesNotKnowTask, PromptPairs, behaviour_pairs, ioi_pairs, watch_prompts

GOOD = {
    "clean": [
        "When Mary and John went to the store, John gave a drink to",
        "When Anna and Peter went to the store, Peter gave a drink to",
    ],
    "corrupted": [
        "When Mary and John went to the store, Mary gave a drink to",
        "When Anna and Peter went to the store, Anna gave a drink to",
    ],
    "correct": [" Mary", " Anna"],
    "incorrect": [" John", " Peter"],
}
S2 = 10  # BOS is 0


@pytest.fixture
def pairs(tiny):
    return PromptPairs(tiny, **GOOD, check=False, template=["a", "b"], roles={"S2": S2, "END": -1})


@pytest.fixture(scope="module")
def handset_model(tmp_path_factory):
    """A model whose weights were set by hand: it does induction, and nothing else."""
    import handset

    return models.load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correct": [" Mary"]}, "different lengths.*1 correct"),
        ({"clean": [], "corrupted": [], "correct": [], "incorrect": []}, "No prompts"),
        ({"clean": GOOD["clean"][0]}, "single string"),
        ({"clean": [GOOD["clean"][0], "When Anna went"]}, "When Anna went"),
        ({"corrupted": [text + " the" for text in GOOD["corrupted"]]}, "15 tokens.*16"),
        ({"correct": [" Mary John", " Anna"]}, "' Mary John' is 2 tokens"),
        ({"incorrect": [" John", " Anna"]}, r"same in pairs \[1\]"),
        ({"corrupted": [GOOD["corrupted"][0], GOOD["clean"][1]]}, r"same in pairs \[1\]"),
        ({"clean": ["<|endoftext|>" + text for text in GOOD["clean"]]}, "BOS"),
        ({"roles": {"IO": 15}}, "IO"),
    ],
)
def test_pairs_that_cannot_be_measured_are_refused_before_the_model_runs(tiny, monkeypatch, change, words):
    monkeypatch.setattr(models, "run", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=words):
        PromptPairs(tiny, **GOOD | change)


def test_a_model_that_does_not_know_the_task_is_refused(tiny):
    """Random weights cannot prefer both answers of a pair: one way round or the other is refused."""
    prompts = {name: values * 2 for name, values in GOOD.items()}
    prompts["correct"] = GOOD["correct"] + GOOD["incorrect"]
    prompts["incorrect"] = GOOD["incorrect"] + GOOD["correct"]
    with pytest.raises(ModelDoesNotKnowTask, match="50%"):
        PromptPairs(tiny, **prompts)
    assert len(PromptPairs(tiny, **prompts, check=False)) == 4
    assert len(PromptPairs(tiny, **prompts, min_accuracy=0.5)) == 4


def test_a_corruption_that_changes_nothing_is_refused(tiny, monkeypatch):
    fixed = torch.zeros(1, 1, models.info(tiny).shape.d_vocab)
    fixed[..., models.single_token(tiny, " Mary")] = fixed[..., models.single_token(tiny, " Anna")] = 1
    monkeypatch.setattr(models, "run", lambda model, tokens, **_: fixed.expand(*tokens.shape, -1))
    with pytest.raises(ValueError, match="same logit difference"):
        PromptPairs(tiny, **GOOD)


# ------------------------------------------------------------------------------------------------------ what pairs know


def test_tokens_and_answers(pairs, tiny):
    assert pairs.clean_tokens.shape == pairs.corrupted_tokens.shape == (2, 15)
    assert (pairs.clean_tokens[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert pairs.differs.nonzero().tolist() == [[0, S2], [1, S2]]
    assert [tiny.tokenizer.decode([i]) for i in pairs.correct_ids] == [" Mary", " Anna"]
    assert pairs.model_name == models.info(tiny).name and len(pairs) == 2


def test_labels_of_positions(pairs):
    labels = pairs.position_labels
    assert labels[0] == "0 BOS" and labels[1] == "1 When"
    assert labels[2] == "2 …"  # the prompts differ here, and it has no role
    assert labels[S2] == f"{S2} S2" and labels[-1] == "14 to (END)"
    assert len(set(labels)) == len(labels)


def test_logit_differences_are_those_of_the_runs(pairs, tiny):
    for tokens, found in (
        (pairs.clean_tokens, pairs.clean_logit_diff),
        (pairs.corrupted_tokens, pairs.corrupted_logit_diff),
    ):
        last = models.run(tiny, tokens)[:, -1]
        for row in range(2):
            expected = last[row, pairs.correct_ids[row]] - last[row, pairs.incorrect_ids[row]]
            assert float(found[row]) == pytest.approx(float(expected), abs=1e-5)


def test_swapping_exchanges_prompts_answers_and_differences(pairs):
    swapped = pairs.swap()
    assert swapped.clean == pairs.corrupted and swapped.correct == pairs.incorrect
    assert torch.equal(swapped.clean_tokens, pairs.corrupted_tokens)
    measured = pairs.swap().clean_logit_diff  # nothing was measured before: run
    assert torch.allclose(measured, -pairs.corrupted_logit_diff, atol=1e-5)
    assert torch.equal(pairs.swap().clean_logit_diff, -pairs.corrupted_logit_diff)  # now carried over
    assert pairs.swap().swap().clean == pairs.clean


@pytest.mark.parametrize("index", [1, slice(1, None), [1], [False, True], torch.tensor([1]), -1])
def test_a_part_is_pairs_again(pairs, index):
    whole = pairs.clean_logit_diff
    part = pairs[index]
    assert isinstance(part, PromptPairs) and len(part) == 1
    assert part.clean == (GOOD["clean"][1],) and part.correct == (" Anna",) and part.template == ("b",)
    assert torch.equal(part.clean_tokens, pairs.clean_tokens[[1]]) and part.correct_ids == pairs.correct_ids[1]
    assert torch.equal(part.clean_logit_diff, whole[[1]]) and part.roles == pairs.roles


def test_only_prompts_that_are_read_count_as_used(pairs):
    with watch_prompts() as seen:
        part = pairs[:1]
        repr(pairs), pairs.swap()
        assert not seen
        assert len(part.corrupted_tokens) == 1 and seen == {pairs.clean[0], pairs.corrupted[0]}


def test_nothing_left_is_an_error(pairs):
    with pytest.raises(IndexError, match="empty"):
        pairs[[]]
    with pytest.raises(IndexError):
        pairs[2]


def test_a_model_that_knows_the_task_passes(handset_model):
    import handset

    pairs = PromptPairs(handset_model, **handset.induction_prompts(5))
    assert (pairs.clean_logit_diff > 5).all() and (pairs.corrupted_logit_diff < 1).all()


# ---------------------------------------------------------------------------------------------------------------- IOI


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random weights beside the small world's own tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from mi_utils.smallworld.tokenizer import build_tokenizer

    directory = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer(n_documents=3000)
    bos = tokenizer.bos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=bos, eos_token_id=bos
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return models.load_model(str(directory))


@pytest.mark.parametrize("split", ["train", "held_out_names", "held_out_templates"])
@pytest.mark.parametrize("order", ["any", "ABBA", "BABA"])
def test_ioi_roles_stand_where_the_names_are(world, split, order):
    pairs = ioi_pairs(world, n=8, seed=3, split=split, order=order, check=False)
    assert len(pairs) == len(set(pairs.clean)) == 8
    roles = pairs.roles
    assert set(roles) == {"IO", "S1", "S1+1", "S2", "END"}
    assert roles["S1+1"] == roles["S1"] + 1 and roles["END"] == pairs.clean_tokens.shape[1] - 1
    if order != "any":
        assert (roles["IO"] < roles["S1"]) == (order == "ABBA")
    for row in range(8):
        clean, corrupted = pairs.clean_tokens[row], pairs.corrupted_tokens[row]
        assert pairs.differs[row].nonzero().flatten().tolist() == [roles["S2"]]
        assert clean[roles["IO"]] == corrupted[roles["S2"]]  # the subject is said again, corrupted: the other one
        assert clean[roles["S1"]] == clean[roles["S2"]]
        assert pairs.correct_ids[row] != pairs.incorrect_ids[row]
        names = models.token_strings(world, [clean[roles["IO"]], clean[roles["S1"]]])
        assert [name.strip() for name in names] == [pairs.correct[row].strip(), pairs.incorrect[row].strip()]


def test_ioi_pairs_are_the_same_for_a_seed(world):
    first, again, other = (ioi_pairs(world, n=6, seed=seed, check=False) for seed in (1, 1, 2))
    assert first.clean == again.clean and first.clean != other.clean
    assert first.roles == other.roles  # so that results of two seeds can be laid side by side


def test_ioi_splits_keep_names_and_templates_apart(world):
    from mi_utils.smallworld.corpus import name_pair_held_out

    def held_out(pairs):
        return {name_pair_held_out(a.strip(), b.strip()) for a, b in zip(pairs.correct, pairs.incorrect, strict=True)}

    train = ioi_pairs(world, n=30, check=False)
    names = ioi_pairs(world, n=30, split="held_out_names", check=False)
    templates = ioi_pairs(world, n=30, split="held_out_templates", check=False)
    assert held_out(train) == {False} and held_out(names) == held_out(templates) == {True}
    assert not set(train.template) & set(templates.template)
    assert len(set(train.template)) > 5


def test_ioi_without_alignment_has_one_length_and_more_templates(world):
    loose = ioi_pairs(world, n=30, align=False, check=False)
    assert set(loose.roles) == {"END"}
    s2 = loose.differs.nonzero()[:, 1]
    assert len(set(s2.tolist())) > 1


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"order": "AABB"}, {"n": 0}])
def test_ioi_of_an_unknown_kind_is_refused(world, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        ioi_pairs(world, check=False, **wrong)


def test_a_tokenizer_that_knows_no_names_is_refused(tiny):
    with pytest.raises(ValueError, match="names"):
        ioi_pairs(tiny, check=False)


def test_random_weights_do_not_know_ioi(world):
    with pytest.raises(ModelDoesNotKnowTask, match="check=False"):
        ioi_pairs(world, n=64)


def test_the_embedded_model_knows_ioi(model):
    pairs = ioi_pairs(model, n=64, split="held_out_names")
    assert float((pairs.clean_logit_diff > 0).float().mean()) >= 0.95
    assert float(pairs.clean_logit_diff.mean()) >= 3


def test_pairs_are_not_run_on_a_model_with_another_tokenizer(pairs, tiny, world):
    from mi_utils import attention_patterns, direct_logit_attribution, load_model, logit_lens, patch_sweep

    pairs.check_model(tiny)
    pairs.check_model(load_model("random:" + str(tiny.mi.path)))
    uses = [lambda: patch_sweep(world, pairs, "z", ("layer",)), lambda: attention_patterns(world, pairs)]
    uses += [lambda: logit_lens(world, pairs), lambda: direct_logit_attribution(world, pairs)]
    for use in uses:
        with pytest.raises(ValueError, match="another tokenizer"):
            use()


# ------------------------------------------------------------------------------------------------- other behaviours


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_embedded_model_knows_each_behaviour_on_prompts_it_was_not_trained_on(model, name):
    pairs = behaviour_pairs(model, name, n=24, split="held_out")
    assert len(set(pairs.clean)) == 24
    assert float((pairs.clean_logit_diff > 0).float().mean()) > 0.9
    assert float(pairs.corrupted_logit_diff.mean()) < 0.3 * float(pairs.clean_logit_diff.mean())
    changed = sorted(place for role, place in pairs.roles.items() if role not in ("END", "IO", "S1", "S1+1"))
    assert all(row.nonzero().flatten().tolist() == changed for row in pairs.differs), "one arrangement in all pairs"
    assert pairs.roles["END"] == pairs.clean_tokens.shape[1] - 1
    other = behaviour_pairs(model, name, n=24, seed=1, split="held_out")
    assert set(other.clean) != set(pairs.clean), "another seed draws other prompts"


def test_what_is_due_follows_from_the_prompt(model):
    for text, wrong, right in _columns(behaviour_pairs(model, "induction", n=6)):
        words = text.split()
        assert words[words.index(words[-1]) + 1] == right.strip() and wrong.strip() in words
    for text, wrong, right in _columns(behaviour_pairs(model, "induction", n=6), "corrupted"):
        words = text.split()
        assert words[words.index(words[-1]) + 1] == wrong.strip() != right.strip(), "in the corrupted prompt the other"
    years = behaviour_pairs(model, "greater_than", n=12)
    for clean, corrupted, correct, incorrect in zip(
        years.clean, years.corrupted, years.correct, years.incorrect, strict=True
    ):
        start, earlier = (_start_year(text) for text in (clean, corrupted))
        assert earlier < int(incorrect) < start < int(correct)
    from mi_utils.smallworld import corpus

    facts = behaviour_pairs(model, "facts", n=12)
    for clean, corrupted, *answers in zip(facts.clean, facts.corrupted, facts.correct, facts.incorrect, strict=True):
        named = [next(c for c in corpus.COUNTRIES if f"{c.name} " in f"{text} ") for text in (clean, corrupted)]
        for country, answer in zip(named, answers, strict=True):
            assert answer.strip() in (country.capital, country.language, country.currency)
    agreement = behaviour_pairs(model, "agreement", n=12)
    assert {label.split(" ")[0] for label in agreement.template} == {"plural", "singular"}


def _columns(pairs, which="clean"):
    return zip(getattr(pairs, which), pairs.incorrect, pairs.correct, strict=True)


def _start_year(text):
    import re

    return int(re.search(r"\d\d(\d\d)", text)[1])


def test_behaviours_are_refused_by_name_split_and_number(tiny):
    with pytest.raises(ValueError, match="there are ioi"):
        behaviour_pairs(tiny, "chess")
    with pytest.raises(ValueError, match="train or held_out"):
        behaviour_pairs(tiny, "facts", split="test")
    with pytest.raises(ValueError, match="at least one"):
        behaviour_pairs(tiny, "facts", n=0)
    with pytest.raises(ValueError, match="words as single tokens|prompts found"):
        behaviour_pairs(tiny, "induction")
