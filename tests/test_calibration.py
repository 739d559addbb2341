"""The study in worlds with a known answer: its short calibration, and that it is the notebooks' own procedure."""

import json

import numpy as np
import pytest

from mi_utils import calibration, case_study
from mi_utils.calibration import FAMILIES, Outcome
from mi_utils.prompts import ModelDoesNotKnowTask, ioi_pairs
from mi_utils.smallworld import handset
from mi_utils.study import KINDS

CAUGHT_BY = {  # which kind of evidence each family of nulls must fail, whatever else it fails
    "random weights": "effect_size",
    "random weights, hand-set shape": "effect_size",
    "shuffled answers": "effect_size",
    "irrelevant heads": "causal",
    "spread over many heads": "causal",
    "only at one place": "held_out",
    "other seeds differ": "seeds",
    "any damage will do": "alternatives",
}


@pytest.fixture(scope="module")
def outcomes(model):
    return calibration.calibrate(short=True, progress=False)


def test_the_study_says_no_where_there_is_nothing_and_yes_where_something_was_planted(outcomes):
    for outcome in outcomes:
        truth = FAMILIES[outcome.family].truth
        assert outcome.verdict == ("supported" if truth == "planted" else "not supported"), outcome
    assert calibration.passes(outcomes)


def test_every_kind_of_evidence_catches_the_null_that_is_made_for_it(outcomes):
    kinds = {prediction.name: prediction.kind for prediction in case_study.PREDICTIONS}
    assert {prediction.kind for prediction in case_study.PREDICTIONS} == set(KINDS) == set(CAUGHT_BY.values())
    for outcome in outcomes:
        if FAMILIES[outcome.family].truth == "null":
            assert CAUGHT_BY[outcome.family] in [kinds[name] for name in outcome.failed], outcome


def test_the_full_calibration_has_enough_worlds():
    counts = {truth: sum(f.count for f in FAMILIES.values() if f.truth == truth) for truth in ("null", "planted")}
    assert counts["null"] >= 100 and counts["planted"] >= 40
    assert set(CAUGHT_BY) == {name for name, family in FAMILIES.items() if family.truth == "null"}
    assert all(family.short for family in FAMILIES.values() if family.truth != "trained")


def test_the_page_and_the_bars_follow_from_the_outcomes():
    nulls = [Outcome("spread over many heads", i, "not supported", ["necessity of the found heads"]) for i in range(95)]
    planted = [Outcome("one head a step", i, "supported") for i in range(40)]
    alarms = [Outcome("shuffled answers", i, "supported") for i in range(5)]
    assert calibration.passes(nulls + alarms + planted)
    assert not calibration.passes(nulls + alarms + alarms[:1] + planted)
    missed = [Outcome("two induction heads", i, "refused", reason="no gap") for i in range(3)]
    assert not calibration.passes(nulls + planted + missed)
    page = calibration.page(nulls + alarms + planted, "It took a while.")
    assert "5 of 100 null worlds" in page and "(5.0%; exact 95 % interval 1.6% to 11.3%)" in page
    assert "40 of 40 planted worlds" in page and "| spread over many heads | null | 95 | 0 | 0 | causal 95 |" in page


def test_a_calibration_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(calibration, "run_world", lambda f, i: ran.append((f, i)) or Outcome(f, i, "supported"))
    first = calibration.calibrate(short=True, folder=tmp_path, progress=False)
    worlds, file = len(ran), tmp_path / calibration.FILE
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], lines[4][:20]]))  # killed while it wrote the fourth
    assert calibration.calibrate(short=True, folder=tmp_path, progress=False) == first
    assert len(ran) == worlds + worlds - 3
    assert calibration.calibrate(short=True, folder=tmp_path, progress=False) == first
    assert len(ran) == worlds + worlds - 3, "all are kept, also what was written behind half a line"
    monkeypatch.setattr(calibration, "_code_hash", lambda: "other code")
    calibration.calibrate(short=True, folder=tmp_path, progress=False)
    assert len(ran) == 3 * worlds - 3 and json.loads(file.read_text().splitlines()[0]) == {"calibration": "other code"}


# ------------------------------------------------------------------------------------------------ worlds


def test_the_prompts_of_a_world_are_those_of_the_notebooks(model):
    for split in ("train", case_study.HELD_OUT):
        ours, theirs = (make(model, n=24, seed=5, split=split) for make in (calibration.same_ioi_pairs, ioi_pairs))
        assert (ours.clean, ours.corrupted, ours.correct, ours.roles) == (
            theirs.clean, theirs.corrupted, theirs.correct, theirs.roles,
        )  # fmt: skip


def test_shuffled_answers_exchange_names_on_about_half_of_the_prompts(model):
    plain = ioi_pairs(model, n=24, seed=5)
    shuffled = calibration.shuffled_pairs(model, n=24, seed=5, check=False, coin=1)
    turned = np.array(shuffled.correct) != np.array(plain.correct)
    assert 6 <= turned.sum() <= 18 and shuffled.clean == plain.clean
    assert [shuffled.correct[i] for i in np.flatnonzero(turned)] == [plain.incorrect[i] for i in np.flatnonzero(turned)]


def test_a_wiring_plants_what_it_says():
    wiring = handset.Wiring(previous={4: 1.0}, induction={0: 0.5, 2: 0.5}, noise=0.01, seed=1)
    network = calibration.load_handset(wiring)
    assert wiring.planted == [(0, 4), (1, 0), (1, 2)]
    assert sorted(case_study.discover(network, 0, pairs=handset.induction_pairs)) == wiring.planted
    assert case_study.necessity(network, wiring.planted, 1, pairs=handset.induction_pairs).low > 0.9


def test_a_network_that_works_at_one_place_does_not_know_the_held_out_template():
    network = calibration.load_handset(handset.Wiring(only_at=handset.FIRST + 1, noise=0.01))
    assert float(handset.induction_pairs(network).clean_logit_diff.min()) > 5
    with pytest.raises(ModelDoesNotKnowTask):
        handset.induction_pairs(network, split="held_out_templates")


def test_too_few_heads_for_random_sets_are_refused(model):
    from types import SimpleNamespace

    found = [[layer, head] for layer in (0, 1) for head in range(4)]  # as JSON has them
    assert len(case_study.other_heads(model, found)) == 8 and (1, 3) not in case_study.other_heads(model, found)
    with pytest.raises(ValueError, match="7 heads beside the 9 found"):
        case_study.other_heads(model, [*found, [2, 0]])
    assert case_study.n_found(SimpleNamespace(n_layers=12, n_heads=12)) == 15
    with pytest.raises(ValueError, match="5 heads"):
        case_study.n_found(SimpleNamespace(n_layers=1, n_heads=5))
