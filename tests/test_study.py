"""A study cannot be bent: the plan stays, numbers are computed, all count, the verdict says what is missing."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from test_course import outside_requests

from mi_utils import archive, models, plots, runlog, stats, study
from mi_utils.prompts import PromptPairs
from mi_utils.study import KINDS, EvidenceRefused, PlanChanged, PlanLocked, Prediction, Study, StudyError

ENVIRONMENT = {
    "python": "3.11", "platform": "somewhere", "device": "cpu", "cpu_count": 2, "commit": "c0ffee" * 6,
    "packages": {"torch": "2.13.0", "absent": None},
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(study, "_environment", lambda: ENVIRONMENT)


def plan(**changes):
    given = {
        "question": "Which heads carry the name?",
        "hypothesis": "L2H1 does.",
        "predictions": [Prediction(f"p {kind}", ">=", 0.5, f"It shows in {kind}.", kind) for kind in KINDS],
        "falsifier": "The effect of L2H1 is below one half.",
        "technique": "Activation patching.",
        "validation": "Held-out templates, other seeds.",
        "model": "smallworld",
        "seed": 0,
    }
    return Study(**given | changes)


def measure(mean, n=20):
    """An estimate whose interval is about mean +- 0.05."""
    return stats.bootstrap_interval(np.random.default_rng(0).normal(mean, 0.1, size=n))


def filled(**means):
    made = plan()
    made.lock()
    for kind in KINDS:
        made.add(f"p {kind}", measure, means.get(kind, 0.8))
    return made


# ------------------------------------------------------------------------------------------------ plan and lock


def test_the_hash_is_that_of_the_plan_alone():
    assert plan().lock() == plan().lock() == filled().lock()
    assert plan(seed=1).lock() != plan().lock()
    assert plan(falsifier="Something else.").lock() != plan().lock()


@pytest.mark.parametrize("field", study.PLAN)
def test_nothing_of_the_plan_changes_after_its_lock(field):
    made = plan()
    setattr(made, field, getattr(made, field))  # before the lock it may
    made.lock()
    with pytest.raises(PlanLocked, match=field):
        setattr(made, field, getattr(made, field))


def test_a_plan_changed_behind_the_studys_back_is_noticed():
    made = filled()
    object.__setattr__(made.predictions[0], "threshold", 0.1)
    for act in (made.verdict, made.checklist, lambda: made.add("p seeds", measure, 0.9)):
        with pytest.raises(PlanChanged):
            act()


def test_plans_that_cannot_fail_are_refused():
    for changes in (
        {"predictions": []},
        {"predictions": [plan().predictions[0]] * 2},
        {"predictions": ["it works"]},
        {"falsifier": " "},
        {"seed": "0"},
        {"seed": True},
    ):
        with pytest.raises(StudyError):
            plan(**changes)
    bad = {"relation": "=", "kind": "vibes", "threshold": float("nan"), "name": "", "statement": 3}
    for changes in ({name: value} for name, value in bad.items()):
        with pytest.raises(StudyError):
            Prediction(**{"name": "a", "relation": ">", "threshold": 1, "statement": "s", "kind": "causal"} | changes)
    assert plan(seed=np.int64(3)).seed == 3
    with pytest.raises(AttributeError, match="hypotesis"):
        plan().hypotesis = "a slip of the pen"


# ------------------------------------------------------------------------------------------------ evidence


def test_evidence_comes_after_the_lock_and_under_a_prediction():
    made = plan()
    with pytest.raises(EvidenceRefused, match="Lock the plan"):
        made.add("p causal", measure, 0.8)
    made.lock()
    with pytest.raises(EvidenceRefused, match="'p seeds'"):
        made.add("p cause", measure, 0.8)


@pytest.mark.parametrize("typed_in", [0.93, np.float64(0.93), "0.93", lambda: 0.93, functools.partial(lambda: 0.93)])
def test_a_typed_in_number_is_refused(typed_in):
    made = plan()
    made.lock()
    with pytest.raises(EvidenceRefused, match="typed in"):
        made.add("p causal", typed_in)
    assert made.evidence == ()


@pytest.mark.parametrize("outcome", [float("nan"), float("inf"), True, None, "much", [0.1, 0.2], np.ones(3)])
def test_an_outcome_must_be_one_finite_number(outcome):
    made = plan()
    made.lock()
    with pytest.raises(EvidenceRefused, match="one finite number"):
        made.add("p causal", lambda: made and outcome)


def test_an_effect_size_needs_its_interval():
    made = plan()
    made.lock()
    with pytest.raises(EvidenceRefused, match="interval"):
        made.add("p effect_size", np.mean, [0.8, 0.9])


def test_what_a_function_may_return():
    made = plan()
    made.lock()
    result = xr.DataArray(np.random.default_rng(0).normal(0.8, 0.1, size=20), dims="prompt")
    plain = made.add("p causal", np.mean, [0.8, 0.9])
    scalar = made.add("p causal", lambda values: values.mean(), result)
    labelled = made.add("p causal", stats.summarise, result)
    own = made.add("p causal", lambda: SimpleNamespace(value=0.8, low=0.7, high=np.float32(0.9)))
    assert plain.value == pytest.approx(0.85) and plain.low is None
    assert scalar.value == labelled.value == pytest.approx(float(result.mean()))
    assert labelled.low < labelled.value < labelled.high and labelled.n == 20
    assert (own.low, own.n) == (0.7, None)
    with pytest.raises(EvidenceRefused, match="outside its interval"):
        made.add("p causal", lambda: SimpleNamespace(value=0.5, low=0.7, high=0.9))


def test_evidence_says_where_it_comes_from():
    made = plan()
    made.lock()

    def effect(model, values, seed):
        return float(values.mean()) + 0 * seed

    def loaded(name):
        return SimpleNamespace(mi=SimpleNamespace(name=name, processing="folded", device="cpu", dtype="torch.float32"))

    first = made.add("p seeds", effect, loaded("smallworld-seed1"), np.ones(4), seed=3)
    assert first.function.endswith("effect") and len(first.source_hash) == 12
    assert first.arguments == "smallworld-seed1 (folded, cpu, float32), ndarray 4, seed=3"
    assert made.environments[first.environment] == ENVIRONMENT
    # Another model with the same value is another measurement; the same one again is not.
    assert made.add("p seeds", effect, loaded("smallworld-seed2"), np.ones(4), seed=3) is not first
    assert made.add("p seeds", effect, loaded("smallworld-seed1"), np.ones(4), seed=3) is first
    assert len(made.evidence) == 2


# ------------------------------------------------------------------------------------------------ held-out prompts

BEGINNINGS = ["The cat sat on the", "The dog sat on the", "The cat left the", "The dog left the"]


def made_up_pairs(model, beginnings=BEGINNINGS, **options):
    """Pairs of one length in which the first noun differs."""
    swapped = [text.replace("cat", "dog") if "cat" in text else text.replace("dog", "cat") for text in beginnings]
    answers = {"correct": [" house"] * len(swapped), "incorrect": [" mat"] * len(swapped)}
    return PromptPairs(model, beginnings, swapped, **answers, check=False, **options)


def mean_difference(pairs):
    return stats.bootstrap_interval(np.tile(pairs.clean_logit_diff.cpu().numpy(), 2) + np.linspace(0, 0.1, 4))


def test_held_out_prompts_that_were_explored_are_refused(tiny):
    first, second = made_up_pairs(tiny, BEGINNINGS[:2]), made_up_pairs(tiny, BEGINNINGS[2:])
    made = plan()
    made.lock()
    assert made.explore(first) == 2 and made.explore(first) == 2
    for pairs in (first, first.swap(), first[[0, 1]]):
        with pytest.raises(EvidenceRefused, match="2 of the 2 prompts .* explored before, such as 'The cat sat"):
            made.add("p held_out", mean_difference, pairs)
    assert made.evidence == ()
    # Neither a closure nor pairs made inside hide them, nor a measurement that was cached before.
    assert len(first.clean_logit_diff) == 2
    for hidden in (
        lambda seed: mean_difference(first),
        lambda seed: mean_difference(made_up_pairs(tiny, BEGINNINGS[:2])),
    ):
        with pytest.raises(EvidenceRefused, match="explored before"):
            made.add("p held_out", hidden, 0)
    held_out = made.add("p held_out", mean_difference, second)
    assert (held_out.prompts, held_out.explored) == (2, 0)
    # Other kinds may use them, and the record says so.
    assert made.add("p causal", mean_difference, first).explored == 2
    row = next(row for row in made.checklist() if "held-out" in row.item)
    assert row.met and row.evidence == "2 held out, 0 of them explored before"


def test_explored_prompts_survive_the_file_and_cannot_be_taken_out_of_it(tmp_path, tiny):
    made = plan()
    made.lock()
    made.explore(made_up_pairs(tiny, BEGINNINGS[:2]))
    path = made.save(tmp_path / "study.json")
    again = Study.load(path)
    assert again.explored == made.explored
    with pytest.raises(EvidenceRefused, match="explored before"):
        again.add("p held_out", mean_difference, made_up_pairs(tiny, BEGINNINGS[:2]))
    raw = json.loads(path.read_text())
    raw["explored"] = []
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanChanged):
        Study.load(path)


def test_locking_the_same_plan_again_does_not_forget_what_was_explored(tmp_path, tiny):
    explored = made_up_pairs(tiny, BEGINNINGS[:2])
    for look in (True, False):
        made = plan()
        made.lock()
        if look:
            made.explore(explored)
        path = made.save(tmp_path / "study.json")
    again = Study.load(path)
    assert len(again.explored) == 2
    with pytest.raises(EvidenceRefused, match="explored before"):
        again.add("p held_out", mean_difference, explored)


def test_the_corrupted_prompts_are_prompts_too(tiny):
    made, pairs = plan(), made_up_pairs(tiny, BEGINNINGS[:2])
    made.lock()
    made.explore(pairs)
    tokens = pairs.corrupted_tokens

    def on_corrupted(pairs):
        return stats.bootstrap_interval(models.run(tiny, pairs.corrupted_tokens)[:, -1, :4].flatten())

    with pytest.raises(EvidenceRefused, match="explored before"):
        made.add("p held_out", on_corrupted, pairs)
    assert len(tokens) == 2


def test_explored_prompts_are_texts():
    for bad in ("one text", ["", "a"], [3]):
        with pytest.raises(StudyError):
            plan().explore(bad)


# ------------------------------------------------------------------------------------------------ verdict


def test_supported_needs_all_five_kinds():
    made = plan()
    made.lock()
    assert made.verdict().missing[:5] == list(KINDS)
    for kind in list(KINDS)[:-1]:
        made.add(f"p {kind}", measure, 0.8)
        assert made.verdict().status == "incomplete" and kind not in made.verdict().missing
    assert made.verdict().missing == ["effect_size", "p effect_size"]
    made.add("p effect_size", measure, 0.8)
    assert str(made.verdict()) == "supported"


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_verdict_with_a_kind_of_evidence_missing_is_refused_with_its_reason(tmp_path, kind):
    made = plan()
    with pytest.raises(study.VerdictRefused, match="not locked"):
        made.conclude(tmp_path)
    made.lock()
    for other in KINDS:
        if other != kind:
            made.add(f"p {other}", measure, 0.8)
    with pytest.raises(study.VerdictRefused, match=f"Nothing shows that {KINDS[kind]}.* p {kind}"):
        made.conclude(tmp_path)
    assert runlog.read_runs(tmp_path) == []


def test_a_verdict_is_logged_whatever_it_is(tmp_path, monkeypatch):
    from mi_utils import compute

    monkeypatch.setattr(compute, "environment", lambda: ENVIRONMENT)
    assert filled().conclude(tmp_path).status == "supported"
    assert filled(seeds=0.1).conclude(tmp_path).reason == "Does not hold: p seeds."
    good, bad = runlog.read_runs(tmp_path)
    assert good["name"] == plan().question and good["parameters"]["plan"] == plan().lock()[:12]
    assert (good["results"]["verdict"], bad["results"]["verdict"]) == ("supported", "not supported")
    assert bad["results"]["failed"] == ["p seeds"]
    assert bad["results"]["measured"]["p seeds"][0]["value"] == pytest.approx(0.1, abs=0.05)


def test_a_kind_that_the_plan_forgot_is_missing():
    made = plan(predictions=[Prediction("only", ">", 0.5, "It is large.", "effect_size")])
    made.lock()
    made.add("only", measure, 0.9)
    verdict = made.verdict()
    assert verdict.status == "incomplete" and verdict.missing == ["causal", "held_out", "seeds", "alternatives"]


def test_the_unfavourable_end_decides():
    estimate = measure(0.52)
    assert estimate.low < 0.5 < estimate.value
    verdict = filled(held_out=0.52).verdict()
    assert verdict.status == "not supported" and verdict.failed == ["p held_out"]
    below = Prediction("a", "<=", 0.5, "s", "causal")
    made = plan(predictions=[below])
    made.lock()
    made.add("a", measure, 0.5)
    assert made.evidence[0].value < 0.5 < made.evidence[0].high and made.outcome("a") == "fails"


@pytest.mark.parametrize(("relation", "holds"), [(">=", True), ("<=", True), (">", False), ("<", False)])
def test_relations_at_the_threshold(relation, holds):
    made = plan(predictions=[Prediction("a", relation, 0.5, "s", "causal")])
    made.lock()
    made.add("a", np.mean, [0.5, 0.5])
    assert made.outcome("a") == ("holds" if holds else "fails")


def test_every_measurement_counts_not_the_best():
    made = filled()
    assert made.verdict().status == "supported"
    made.add("p causal", measure, 0.1)
    made.add("p causal", measure, 0.99)
    assert made.outcome("p causal") == "fails" and made.verdict().failed == ["p causal"]


def test_the_checklist_is_filled_in_from_evidence():
    met = {row.item: row.met for row in filled().checklist()}
    assert len(met) >= 10
    assert [item for item, yes in met.items() if not yes] == ["No held-out prompt had been explored before"]
    empty = plan()
    assert not any(row.met for row in empty.checklist())
    made = plan()
    made.lock()
    made.add("p causal", np.mean, [0.8, 0.9])
    rows = {row.item: row for row in made.checklist()}
    assert not rows["Every measurement has an interval"].met
    assert rows["Every measurement has an interval"].evidence == "without: p causal"
    assert rows[f"It was measured whether {KINDS['causal']}"].evidence == "p causal (holds)"


def test_code_that_is_in_no_commit_is_no_tick(monkeypatch):
    monkeypatch.setattr(study, "_environment", lambda: ENVIRONMENT | {"commit": "c0ffee+"})
    assert not filled().checklist()[-1].met


# ------------------------------------------------------------------------------------------------ files


def test_a_saved_study_goes_on_in_the_next_notebook(tmp_path):
    made = filled(causal=0.2)
    path = made.save(tmp_path / "deep" / "study.json")
    again = Study.load(path)
    assert again.plan() == made.plan() and again.evidence == made.evidence and again.verdict() == made.verdict()
    assert again.checklist() == made.checklist()
    with pytest.raises(PlanLocked):
        again.seed = 1
    fresh = plan()
    assert Study.load(fresh.save(tmp_path / "open.json")).hash is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["plan"]["predictions"][0].update(threshold=0.1),
        lambda raw: raw["plan"].update(hypothesis="L3H2 does."),
        lambda raw: raw["evidence"][0].update(value=0.99),
        lambda raw: raw["evidence"].pop(0),
        lambda raw: raw["evidence"].pop(),
        lambda raw: raw.update(locked_at="2001-01-01T00:00:00+00:00"),
        lambda raw: raw["environments"][0].update(commit="another"),
        lambda raw: raw.update(hash=None),
        lambda raw: raw["evidence"][0].update(explored=1),
    ],
)
def test_an_edited_file_is_refused(tmp_path, edit):
    path = filled(causal=0.2).save(tmp_path / "study.json")
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanChanged):
        Study.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {}}'])
def test_what_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(StudyError, match="no saved study"):
        Study.load(path)


def test_a_study_that_would_be_lost_is_set_aside(tmp_path):
    path = tmp_path / "study.json"
    failed = filled(causal=0.1)
    failed.save(path)
    failed.add("p causal", measure, 0.2)
    failed.save(path)  # more evidence for the same plan: the file goes on
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]
    better = plan(hypothesis="L3H2 does.")
    better.lock()
    better.save(path)
    aside = tmp_path / f"study-{failed.hash[:8]}.json"
    assert Study.load(aside).evidence == failed.evidence and Study.load(path).plan() == better.plan()
    # The same plan begun anew does not wipe out what was measured under it.
    better.add("p causal", measure, 0.1)
    better.save(path)
    fresh = plan(hypothesis="L3H2 does.")
    fresh.lock()
    fresh.save(path)
    assert Study.load(tmp_path / f"study-{fresh.hash[:8]}.json").evidence == better.evidence
    open_plan = plan()
    open_plan.save(tmp_path / "open.json")
    plan(seed=1).save(tmp_path / "open.json")  # an open plan holds nothing that could be lost
    assert len(list(tmp_path.glob("open*"))) == 1
    (tmp_path / "letter.json").write_text("{}")
    with pytest.raises(StudyError, match="not overwritten"):
        plan().save(tmp_path / "letter.json")


# ------------------------------------------------------------------------------------------------ past studies


def test_past_studies_are_found_and_compared(tmp_path):
    filled().save(tmp_path / "a" / "study.json")
    other = plan(model="smallworld-seed1", predictions=[
        Prediction("p causal", ">=", 0.9, "More.", "causal"), Prediction("p new", "<", 1, "New.", "seeds"),
    ])  # fmt: skip
    other.lock()
    other.add("p causal", measure, 0.8)
    other.save(tmp_path / "b" / "study.json")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "study.json").write_text((tmp_path / "a" / "study.json").read_text().replace("0.5", "0.1"))
    past = archive.find_studies(tmp_path)
    assert {each.name: each.verdict for each in past} == {
        "a/study": "supported", "b/study": "incomplete", "c/study": "unreadable",
    }  # fmt: skip
    assert archive.pick(past, other.hash[:6]).name == "b/study" and archive.pick(past, "a/").name == "a/study"
    for name, words in (("study", "fits 3"), ("zzz", "a/study, b/study"), ("c/", "cannot be read")):
        with pytest.raises(StudyError, match=words):
            archive.pick(past, name)
    rows = archive.compare({each.name: each.study for each in past if each.study})
    table = {row[0]: row[1:] for row in rows}
    assert rows[0] == ["", "a/study", "b/study"] and table["verdict"] == ["supported", "incomplete"]
    assert table["model"] == ["smallworld", "smallworld-seed1"] and "hypothesis" not in table
    assert table["p causal"][0].endswith("holds (>= 0.5)") and table["p causal"][1].endswith("fails (>= 0.9)")
    assert table["p new < 1"] == ["–", "not measured"]


# ------------------------------------------------------------------------------------------------ report


@pytest.fixture
def figures():
    values = np.random.default_rng(1).normal(size=(6, 2, 3))
    effect = xr.DataArray(values, dims=("prompt", "layer", "pos"), name="effect")
    return [plots.heatmap(effect, "Patching <b> & more"), plots.bars(effect.isel(pos=0))]


def test_the_report_says_everything_in_both_forms(tmp_path, figures):
    made = filled(alternatives=0.1)
    notes = "First note.\n\nSecond | note with <i>markup</i>."
    page = made.report(tmp_path / "out" / "report.html", figures, notes=notes)
    html, markdown = page.read_text(), page.with_suffix(".md").read_text()
    plain = markdown.replace("\\", "")
    record = made.evidence[0]
    wanted = [
        made.question, made.hypothesis, made.falsifier, made.technique, made.validation, "Verdict: not supported.",
        f"{record.value:.3g} [{record.low:.3g}, {record.high:.3g}]", "fails", record.source_hash, "bootstrap-t",
        made.hash, made.locked_at, "torch 2.13.0", "c0ffee", "2 CPU cores", "First note.", "Every measurement has",
        "python -m mi_utils run --fresh --model smallworld --seed 0",
    ]  # fmt: skip
    for text in wanted:
        assert text in html and text in plain, text
    assert "absent" not in html
    assert "Second | note with <i>markup</i>." in plain and "Second | note with &lt;i&gt;markup&lt;/i&gt;." in html
    columns = [line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")]
    assert set(columns) <= {3, 4, 7, 8}
    for number in (1, 2):
        picture = tmp_path / "out" / f"report-figure-{number}.svg"
        assert picture.read_text().startswith("<svg") and f"]({picture.name})" in markdown
        assert f'id="figure-{number}"' in html
    assert "Figure 1. Patching <b> & more" in plain


def test_the_page_stands_alone(tmp_path, figures):
    html = filled().report(tmp_path / "report", figures).read_text()
    assert outside_requests(html) == []
    assert html.count("plotly.js v") == 1 and "prefers-color-scheme: dark" in html
    bare = filled().report(tmp_path / "bare", []).read_text()
    assert "plotly" not in bare.lower() and len(bare) < 30_000 and outside_requests(bare) == []


def test_an_unfinished_study_is_reported_as_such(tmp_path):
    html = plan().report(tmp_path / "report").read_text()
    assert "Verdict: incomplete." in html and "held out" in html and "not locked" in html
    assert "Nothing was measured yet." in html


def test_what_is_no_figure_is_refused(tmp_path):
    with pytest.raises(TypeError, match="no plotly figure"):
        filled().report(tmp_path / "report", ["picture.png"])
