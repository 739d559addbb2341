"""A study: the plan that is written down first, the evidence that comes after, and the verdict that follows from both.

A plan is locked under a hash before there is any evidence, and cannot be changed afterwards. Evidence is computed by a
function that is handed over, never typed in. The verdict needs all five kinds of evidence (:data:`KINDS`), and says
which are missing. Nothing that was measured can be taken back: results that speak against the hypothesis stay. Prompts
on which something was found are told to the study, and held-out evidence from any of them is refused.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import shlex
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mi_utils.prompts import PromptPairs

KINDS = {
    "causal": "an intervention on the model changes the behaviour as predicted",
    "held_out": "it holds on prompts that played no part in finding it",
    "seeds": "it holds with other seeds, of training or else of the prompts",
    "alternatives": "other explanations fail to account for it",
    "effect_size": "the effect is large enough to matter, with an interval",
}
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, threshold: value >= threshold,
    "<=": lambda value, threshold: value <= threshold,
    ">": lambda value, threshold: value > threshold,
    "<": lambda value, threshold: value < threshold,
}
PLAN = ("question", "hypothesis", "predictions", "falsifier", "technique", "validation", "model", "seed")


class StudyError(ValueError):
    """A study was used in a way that would make its verdict worthless."""


class PlanLocked(StudyError):
    """The plan was to be changed after its lock."""


class PlanChanged(StudyError):
    """The plan or the evidence is not what it was when it was locked or recorded."""


class EvidenceRefused(StudyError):
    """What was offered is not evidence: typed in, not a measurement, not foreseen in the plan, or not held out."""


class VerdictRefused(StudyError):
    """A final verdict was asked for while evidence is missing."""


@dataclass(frozen=True)
class Prediction:
    """One inequality on one named measurement.

    Args:
        name: short and unique in its study, such as "restores on held-out names".
        relation: ">=", "<=", ">" or "<", read as: measured value, relation, threshold.
        threshold: fixed before the measurement, in its units.
        statement: what it says about the model, in a sentence.
        kind: which kind of evidence it brings; one of :data:`KINDS`.

    Raises:
        StudyError: an unknown relation or kind, an empty text, or a threshold that is no finite number.
    """

    name: str
    relation: str
    threshold: float
    statement: str
    kind: str

    def __post_init__(self) -> None:
        for field in ("name", "statement"):
            _need_text(f"A prediction's {field}", getattr(self, field))
        if self.relation not in RELATIONS:
            raise StudyError(f"{self.name}: unknown relation {self.relation!r}. Use one of {', '.join(RELATIONS)}.")
        if self.kind not in KINDS:
            raise StudyError(f"{self.name}: unknown kind of evidence {self.kind!r}. Use one of {', '.join(KINDS)}.")
        if not _is_number(self.threshold):
            raise StudyError(f"{self.name}: the threshold must be a finite number, not {self.threshold!r}.")
        object.__setattr__(self, "threshold", float(self.threshold))

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.threshold:g}"

    def holds(self, evidence: Evidence) -> bool:
        """Whether the evidence satisfies it: by the less favourable end of the interval where there is one."""
        least = evidence.low if self.relation.startswith(">") else evidence.high
        return RELATIONS[self.relation](evidence.value if least is None else least, self.threshold)


@dataclass(frozen=True)
class Evidence:
    """One measurement, how it was computed, and when. Made by :meth:`Study.add` only."""

    prediction: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    method: str | None
    function: str
    source_hash: str
    arguments: str
    environment: int  # index into the study's environments
    at: str
    prompts: int = 0  # different prompts (clean and corrupted) of the pairs used; 0 where no pairs were used
    explored: int = 0  # of these, how many had been explored before
    seal: str = ""

    def sealed(self, before: str) -> str:
        """Hash of the record and of what came before it, the earlier record's seal or the plan's hash.

        The time is not part of it, so that two runs of a study can be compared.
        """
        record = {name: value for name, value in asdict(self).items() if name not in ("at", "seal")}
        return _sha256([before, record])


@dataclass(frozen=True)
class Verdict:
    """What the evidence says.

    Attributes:
        status: "supported" (all five kinds are there and every prediction holds), "not supported" (all are there and
            at least one fails), or "incomplete".
        missing: kinds of evidence, then names of predictions, for which nothing was measured.
        failed: names of predictions that do not hold.
    """

    status: str
    missing: list[str]
    failed: list[str]

    def __str__(self) -> str:
        parts = [self.status]
        if self.missing:
            parts.append("missing: " + ", ".join(self.missing))
        if self.failed:
            parts.append("does not hold: " + ", ".join(self.failed))
        return "; ".join(parts)

    @property
    def reason(self) -> str:
        """The verdict's grounds in sentences."""
        kinds = [name for name in self.missing if name in KINDS]
        predictions = [name for name in self.missing if name not in KINDS]
        parts = [f"Nothing shows that {KINDS[kind]} (kind {kind!r})." for kind in kinds]
        if predictions:
            parts.append(f"Not measured: {', '.join(predictions)}.")
        if self.failed:
            parts.append(f"Does not hold: {', '.join(self.failed)}.")
        return " ".join(parts) or "Every prediction holds, and all five kinds of evidence are there."


class ChecklistRow(NamedTuple):
    """One line of the quality checklist, filled in from the study itself."""

    item: str
    met: bool
    evidence: str


class Study:
    """A plan, its lock, the evidence and the verdict.

    Args:
        question: what is to be known.
        hypothesis: the answer that is put to the test.
        predictions: what must be measured if the hypothesis is true; all five kinds for a verdict.
        falsifier: what would show that it is false.
        technique: which techniques measure it, and why these.
        validation: how the result will be checked (held-out data, seeds, controls).
        model: name of the model, as given to ``load_model``.
        seed: seed of prompts and resampling.

    Usage: ``study.lock()`` before any result, ``study.explore(pairs)`` for the prompts on which something is looked
    for, ``study.add(prediction, function, ...)`` for each measurement, ``study.conclude()``, ``study.report(path)``;
    ``study.save(path)`` and ``Study.load(path)`` between notebooks.

    Raises:
        StudyError: an empty text, no predictions, or two of the same name.
    """

    def __init__(
        self,
        question: str,
        hypothesis: str,
        predictions: Sequence[Prediction],
        falsifier: str,
        technique: str,
        validation: str,
        model: str,
        seed: int,
    ) -> None:
        self._hash: str | None = None
        self._locked_at: str | None = None
        self._evidence: list[Evidence] = []
        self._environments: list[dict[str, Any]] = []
        self._explored: list[str] = []
        self.question = question
        self.hypothesis = hypothesis
        self.predictions = predictions
        self.falsifier = falsifier
        self.technique = technique
        self.validation = validation
        self.model = model
        self.seed = seed

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in PLAN:
            if not name.startswith("_"):
                raise AttributeError(f"A study has no {name!r}. Its plan has: {', '.join(PLAN)}.")
            super().__setattr__(name, value)
            return
        if self._hash is not None:
            raise PlanLocked(
                f"The plan was locked at {self._locked_at}: {name} cannot be changed any more. What you learned since "
                "belongs into a new Study, tested on prompts that this one has not seen."
            )
        if name == "predictions":
            value = _checked_predictions(value)
        elif name == "seed":
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise StudyError(f"seed must be a whole number, not {value!r}.")
            value = int(value)
        else:
            value = _need_text(f"The study's {name}", value)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------------- plan

    def plan(self) -> dict[str, Any]:
        """The plan as plain data, predictions as dicts."""
        plan = {name: getattr(self, name) for name in PLAN}
        return plan | {"predictions": [asdict(prediction) for prediction in self.predictions]}

    def lock(self) -> str:
        """Fix the plan. Returns its hash (sha256); a second call returns the same."""
        if self._hash is None:
            self._hash = _sha256(self.plan())
            self._locked_at = _now()
        self._check_plan()
        return self._hash

    @property
    def hash(self) -> str | None:
        """The locked plan's hash, None before the lock."""
        return self._hash

    @property
    def locked_at(self) -> str | None:
        """When the plan was locked (ISO 8601, UTC)."""
        return self._locked_at

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """All that was measured, in order."""
        return tuple(self._evidence)

    @property
    def environments(self) -> tuple[dict[str, Any], ...]:
        """The machines and versions on which evidence was computed."""
        return tuple(self._environments)

    @property
    def explored(self) -> tuple[str, ...]:
        """Prompts on which something was looked for, in order."""
        return tuple(self._explored)

    def prediction(self, name: str) -> Prediction:
        """The prediction of that name.

        Raises:
            EvidenceRefused: the plan has none.
        """
        for prediction in self.predictions:
            if prediction.name == name:
                return prediction
        names = ", ".join(repr(prediction.name) for prediction in self.predictions)
        raise EvidenceRefused(f"The plan has no prediction {name!r}. It has: {names}.")

    # ------------------------------------------------------------------------------------------------- evidence

    def explore(self, prompts: PromptPairs | Iterable[str]) -> int:
        """Say which prompts are looked at to find something. From then on they cannot be held-out evidence.

        Args:
            prompts: pairs (their clean and corrupted prompts both count), or texts.

        Returns:
            How many prompts have been explored in all.

        Raises:
            StudyError: a single text in place of several, or what is no text.
        """
        if isinstance(prompts, str):
            raise StudyError("Give a list of prompts, or PromptPairs, not a single text.")
        texts = (*prompts.clean, *prompts.corrupted) if hasattr(prompts, "corrupted") else tuple(prompts)
        for text in texts:
            _need_text("An explored prompt", text)
        self._explored = list(dict.fromkeys([*self._explored, *texts]))
        return len(self._explored)

    def add(self, prediction_name: str, function: Callable, *args: Any, **kwargs: Any) -> Evidence:
        """Compute one measurement and record it under its prediction.

        Several measurements may be made for one prediction; it holds only if all of them satisfy it. The same
        measurement made again (same function, arguments and outcome) is recorded once, so that a cell can be rerun.

        Args:
            prediction_name: a prediction of the plan.
            function: computes the measurement from ``args`` and ``kwargs``. Returns a number, or a number with its
                interval: ``stats.bootstrap_interval(...)``, anything with ``value``, ``low`` and ``high``, or a
                labelled result with these variables (``mean`` is taken for ``value``).

        Returns:
            The record, with the function's name and a hash of its source.

        Raises:
            EvidenceRefused: the plan is not locked or has no such prediction; a number in place of a function; a
                function that depends on nothing; an outcome that is not one finite number; an effect size without
                interval; held-out evidence that used a prompt which was explored.
            PlanChanged: the plan is not what was locked.
        """
        if self._hash is None:
            raise EvidenceRefused("Lock the plan before the first evidence: study.lock().")
        self._check_plan()
        prediction = self.prediction(prediction_name)
        _check_function(prediction_name, function, args, kwargs)
        # Names and hashes before the call: the function might change what it was given.
        name, source_hash = _qualified_name(function), _source_hash(function)
        arguments = _describe_arguments(args, kwargs)
        from mi_utils.prompts import watch_prompts

        with watch_prompts() as used:
            outcome = function(*args, **kwargs)
        value, low, high, n, method = _read_outcome(prediction_name, outcome)
        known = used & set(self._explored)
        if prediction.kind == "held_out" and known:
            raise EvidenceRefused(
                f"{prediction_name}: {len(known)} of the {len(used)} prompts it was measured on were explored before, "
                f"such as {min(known)!r}. What was found on a prompt is no surprise there. Measure on prompts that "
                "played no part: another split, other templates and names (stats.split_prompts)."
            )
        if prediction.kind == "effect_size" and low is None:
            raise EvidenceRefused(
                f"{prediction_name}: an effect size needs an interval. Let the function return "
                "stats.bootstrap_interval(...) or stats.effect_size(...)."
            )
        for earlier in self._evidence:
            same = (earlier.prediction, earlier.function, earlier.source_hash, earlier.arguments) == (
                prediction_name, name, source_hash, arguments,
            )  # fmt: skip
            if same and _close(earlier.value, value) and _close(earlier.low, low) and _close(earlier.high, high):
                return earlier
        record = Evidence(
            prediction_name, value, low, high, n, method, name, source_hash, arguments,
            self._environment(), _now(), len(used), len(known),
        )  # fmt: skip
        record = replace(record, seal=record.sealed(self._last_seal()))
        self._evidence.append(record)
        return record

    def outcome(self, prediction_name: str) -> str:
        """Whether a prediction "holds", "fails" or is "not measured"."""
        prediction = self.prediction(prediction_name)
        found = [record for record in self._evidence if record.prediction == prediction_name]
        if not found:
            return "not measured"
        return "holds" if all(prediction.holds(record) for record in found) else "fails"

    def verdict(self) -> Verdict:
        """What the evidence says so far; see :class:`Verdict`.

        Raises:
            PlanChanged: plan or evidence were tampered with.
        """
        self._check_plan()
        outcomes = {prediction.name: self.outcome(prediction.name) for prediction in self.predictions}
        measured = {prediction.kind for prediction in self.predictions if outcomes[prediction.name] != "not measured"}
        missing = [kind for kind in KINDS if kind not in measured]
        missing += [name for name, outcome in outcomes.items() if outcome == "not measured"]
        failed = [name for name, outcome in outcomes.items() if outcome == "fails"]
        status = "incomplete" if missing else "not supported" if failed else "supported"
        return Verdict(status, missing, failed)

    def conclude(self, directory: str | Path = "build/runs", tracking: str = "json") -> Verdict:
        """The final verdict, added to the log of runs whatever it is.

        Args:
            directory, tracking: of the log; see :func:`mi_utils.runlog.log_run`. "wandb" copies it there as well.

        Raises:
            VerdictRefused: a kind of evidence or a prediction's measurement is missing; says which.
            PlanChanged: plan or evidence were tampered with.
        """
        verdict = self.verdict()
        if self._hash is None:
            raise VerdictRefused("No verdict: the plan is not locked, and nothing was measured.")
        if verdict.missing:
            raise VerdictRefused(f"No verdict: {verdict.reason} Measure it, or report the study as incomplete.")
        from mi_utils import runlog

        parameters = {
            "model": self.model, "seed": self.seed, "plan": self._hash[:12], "hypothesis": self.hypothesis,
            "predictions": {prediction.name: str(prediction) for prediction in self.predictions},
        }  # fmt: skip
        measured: dict[str, list[dict[str, Any]]] = {}
        for record in self._evidence:
            one = {"value": record.value, "low": record.low, "high": record.high, "n": record.n}
            measured.setdefault(record.prediction, []).append(one)
        results = {"verdict": verdict.status, "failed": verdict.failed, "measured": measured}
        runlog.log_run(self.question, parameters, results, directory=directory, tracking=tracking)
        return verdict

    def checklist(self) -> list[ChecklistRow]:
        """The quality checklist, every line filled in from what the study holds."""
        verdict = self.verdict()
        kinds_of = {prediction.name: prediction.kind for prediction in self.predictions}
        first = min((record.at for record in self._evidence), default=None)
        rows = [
            ChecklistRow(
                "Question, falsifier and thresholds were fixed before the first result",
                self._hash is not None and (first is None or str(self._locked_at) <= first),
                f"locked {self._locked_at} as {self._hash[:12]}, first evidence {first or 'not yet there'}"
                if self._hash else "the plan is not locked",
            )
        ]  # fmt: skip
        for kind, meaning in KINDS.items():
            found = [record for record in self._evidence if kinds_of[record.prediction] == kind]
            named = ", ".join(f"{name} ({self.outcome(name)})" for name in dict.fromkeys(r.prediction for r in found))
            rows.append(ChecklistRow(f"It was measured whether {meaning}", bool(found), named or "nothing measured"))
        unmeasured = [name for name in kinds_of if self.outcome(name) == "not measured"]
        rows.append(
            ChecklistRow(
                "Every prediction of the plan was measured",
                not unmeasured,
                "not measured: " + ", ".join(unmeasured) if unmeasured else f"all {len(kinds_of)}",
            )
        )
        held_out = [record for record in self._evidence if kinds_of[record.prediction] == "held_out"]
        unknown = [record.prediction for record in held_out if not record.prompts]
        rows.append(
            ChecklistRow(
                "No held-out prompt had been explored before",
                bool(held_out) and bool(self._explored) and not unknown,
                "nothing measured" if not held_out
                else "no explored prompts were named: study.explore(pairs)" if not self._explored
                else "prompts not known (no PromptPairs were used): " + ", ".join(dict.fromkeys(unknown)) if unknown
                else f"{sum(r.prompts for r in held_out)} held out, 0 of them explored before",
            )
        )  # fmt: skip
        bare = [record.prediction for record in self._evidence if record.low is None]
        rows.append(
            ChecklistRow(
                "Every measurement has an interval",
                bool(self._evidence) and not bare,
                "without: " + ", ".join(dict.fromkeys(bare)) if bare else f"{len(self._evidence)} measurements",
            )
        )
        rows.append(
            ChecklistRow(
                "Results against the hypothesis are reported",
                bool(self._evidence),
                "does not hold: " + ", ".join(verdict.failed) if verdict.failed
                else "no prediction failed" if self._evidence else "nothing measured",
            )
        )  # fmt: skip
        code = (here[name] for here in self._environments for name in ("commit", "mi_utils") if name in here)
        commits = list(dict.fromkeys(map(str, code)))
        # A commit with a "+" stands for files that differ from it, and that nobody else has.
        known = bool(commits) and not any(commit == "None" or commit.endswith("+") for commit in commits)
        rows.append(
            ChecklistRow(
                "The code is that of a commit; versions and machine are recorded",
                known,
                "commit " + ", ".join(commit[:12] for commit in commits) if known
                else "computed outside a git commit, or with files that differ from it" if commits
                else "nothing measured",
            )
        )  # fmt: skip
        return rows

    # ------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write plan, hash and evidence as JSON.

        A file that holds another locked plan, or evidence that this study does not have, is not overwritten: it is
        set aside as ``<name>-<hash of its plan>.json``. A study that failed does not vanish because a better one came
        after it.

        Raises:
            PlanChanged: plan or evidence were tampered with.
        """
        self._check_plan()
        path = Path(path)
        self._set_aside(path)
        raw = {
            "plan": self.plan(), "hash": self._hash, "locked_at": self._locked_at,
            "evidence": [asdict(record) for record in self._evidence], "environments": self._environments,
            "explored": self._explored,
        }  # fmt: skip
        raw["seal"] = _sha256(raw)  # over the times and machines as well, which the other hashes leave out
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a saved study.

        Raises:
            PlanChanged: the file was edited after it was locked or after the evidence was recorded.
            StudyError: the file is no study.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            plan = raw["plan"]
            predictions = [Prediction(**prediction) for prediction in plan["predictions"]]
            study = cls(**plan | {"predictions": predictions})
            study._evidence = [Evidence(**record) for record in raw["evidence"]]
            study._environments = list(raw["environments"])
            study._explored = list(raw["explored"])
            study._locked_at = raw["locked_at"]
            study._hash = raw["hash"]
            seal = raw.pop("seal")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StudyError(f"{path} is no saved study ({type(error).__name__}: {error}).") from error
        study._check_plan(str(path))
        if seal != _sha256(raw):
            raise PlanChanged(
                f"{path} was edited after it was saved: a time, a machine, or evidence that was taken out. "
                "What was measured stays, also what speaks against. Go back to the file as it was, or measure again."
            )
        return study

    def report(
        self, path: str | Path, figures: Sequence[Any] = (), notes: str = "", *, command: str | None = None
    ) -> Path:
        """Write the report for a stranger: ``.html`` (one file, nothing loaded from outside) and ``.md`` beside it.

        Args:
            path: where to; the ending does not matter. The Markdown's figures stand beside it as ``.svg``.
            figures: plotly figures, as made by ``mi_utils.plots``.
            notes: what else a reader should know (limits, counterexamples); plain text, an empty line between
                paragraphs.
            command: the one command that runs the study again; by default the course's, with this model and seed.

        Returns:
            The HTML file.

        Raises:
            PlanChanged: plan or evidence were tampered with.
        """
        from mi_utils import report

        self._check_plan()
        command = command or f"python -m mi_utils run --fresh --model {shlex.quote(self.model)} --seed {self.seed}"
        return report.write(self, Path(path), figures, notes, command)

    # ------------------------------------------------------------------------------------------------- details

    def _set_aside(self, path: Path) -> None:
        """Move an earlier study out of the way that would be lost otherwise."""
        if not path.is_file():
            return
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            seals = [record["seal"] for record in raw["evidence"]]
            plan_hash = raw["hash"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise StudyError(f"{path} is no saved study and is not overwritten: choose another name.") from error
        mine = [record.seal for record in self._evidence]
        if plan_hash == self._hash:  # what was looked at stays looked at, also where the plan was locked again
            self._explored = list(dict.fromkeys([*raw.get("explored", ()), *self._explored]))
        if plan_hash is None or (plan_hash == self._hash and mine[: len(seals)] == seals):
            return
        number, aside = 1, path.with_name(f"{path.stem}-{plan_hash[:8]}{path.suffix}")
        while aside.exists() and aside.read_bytes() != path.read_bytes():
            number += 1
            aside = path.with_name(f"{path.stem}-{plan_hash[:8]}-{number}{path.suffix}")
        path.replace(aside)

    def _environment(self) -> int:
        """Index of this process's environment, added when it is new."""
        here = json.loads(json.dumps(_environment()))
        if here not in self._environments:
            self._environments.append(here)
        return self._environments.index(here)

    def _check_plan(self, where: str = "this study") -> None:
        if self._hash is None:
            if self._evidence:
                raise PlanChanged(f"{where} has evidence but its plan is not locked: it was edited.")
            return
        if _sha256(self.plan()) != self._hash:
            raise PlanChanged(
                f"The plan of {where} is not the one that was locked at {self._locked_at}: its hash differs from "
                f"{self._hash[:12]}. Restore the plan, or start a new study with the new plan and new evidence."
            )
        before = self._hash
        for record in self._evidence:
            if record.seal != record.sealed(before):
                raise PlanChanged(
                    f"The evidence for {record.prediction!r} in {where} was edited after it was computed, or evidence "
                    "before it was taken out. Compute it again in a new study."
                )
            before = record.seal

    def _last_seal(self) -> str | None:
        return self._evidence[-1].seal if self._evidence else self._hash


@functools.cache
def _environment() -> dict[str, Any]:
    from mi_utils import compute

    return compute.environment()


def _checked_predictions(predictions: Sequence[Prediction]) -> tuple[Prediction, ...]:
    predictions = tuple(predictions)
    if not predictions:
        raise StudyError("A study without predictions cannot fail. Give at least one Prediction.")
    if wrong := [prediction for prediction in predictions if not isinstance(prediction, Prediction)]:
        raise StudyError(f"predictions must be Prediction objects, not {wrong[0]!r}.")
    names = [prediction.name for prediction in predictions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StudyError(f"Two predictions have the same name: {', '.join(twice)}.")
    return predictions


def _need_text(what: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise StudyError(f"{what} must be a text, not {text!r}.")
    return text


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | str | bytes) or value is None:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check_function(prediction: str, function: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    if not callable(function):
        what = f"the number {function!r}" if _is_number(function) else f"a {type(function).__name__}"
        raise EvidenceRefused(
            f"{prediction}: got {what} where a function belongs. Evidence is computed, never typed in: "
            "study.add(name, function, arguments...)."
        )
    plain = function
    while isinstance(plain, functools.partial):
        args, kwargs, plain = args + plain.args, {**plain.keywords, **kwargs}, plain.func
    if isinstance(plain, types.FunctionType) and not (args or kwargs):
        code = plain.__code__
        if not code.co_names and not code.co_freevars and not plain.__defaults__ and not plain.__kwdefaults__:
            raise EvidenceRefused(
                f"{prediction}: {_qualified_name(function)} depends on nothing, so it is a number typed in. "
                "Pass a function that measures, and what it measures on."
            )


def _read_outcome(prediction: str, outcome: Any) -> tuple[float, float | None, float | None, int | None, str | None]:
    """Value, low, high, n and method of what a measuring function returned."""

    def part(name: str) -> Any:
        if isinstance(outcome, Mapping):  # an xarray Dataset is one
            found = outcome.get(name)
            return getattr(outcome, "attrs", {}).get(name) if found is None else found
        return getattr(outcome, name, None)

    value = part("mean") if isinstance(outcome, Mapping) and part("value") is None else part("value")
    low, high, n, method = (part(name) for name in ("low", "high", "n", "method"))
    if value is None or low is None or high is None:
        value, low, high, n, method = outcome, None, None, None, None
    numbers = [value, *(number for number in (low, high) if number is not None)]
    if not all(_is_number(number) for number in numbers):
        shape = getattr(value, "shape", None)
        what = f"an array of shape {tuple(shape)}" if shape else repr(value)[:80]
        raise EvidenceRefused(
            f"{prediction}: the function returned {what}; a measurement is one finite number, or one with its "
            "interval. Bring an array over prompts to one with stats.bootstrap_interval(...)."
        )
    value, low, high = (None if number is None else float(number) for number in (value, low, high))
    if low is not None and not low <= value <= high:
        raise EvidenceRefused(f"{prediction}: the value {value:g} lies outside its interval [{low:g}, {high:g}].")
    return value, low, high, None if n is None else int(n), None if method is None else str(method)


def _qualified_name(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"


def _source_hash(function: Callable) -> str:
    """Twelve digits of the source's sha256 (of the name where there is no source, as in compiled code)."""
    while isinstance(function, functools.partial):
        function = function.func
    code = function if hasattr(function, "__code__") or hasattr(function, "__func__") else type(function)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        source = _qualified_name(function)
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _describe_arguments(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Arguments in words: simple values as they are, everything else by its kind and size."""

    def describe(value: Any) -> str:
        if hasattr(value, "mi"):  # a model: which one makes the difference between two seeds
            dtype = str(value.mi.dtype).removeprefix("torch.")
            return f"{value.mi.name} ({value.mi.processing}, {value.mi.device}, {dtype})"
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        if isinstance(value, list | tuple) and len(value) <= 8:
            return f"[{', '.join(map(describe, value))}]"
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{type(value).__name__} {'x'.join(map(str, shape))}"
        size = f" of {len(value)}" if hasattr(value, "__len__") else ""
        return f"{type(value).__name__}{size}"

    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


def _close(a: float | None, b: float | None) -> bool:
    """Equal up to what kernels on a GPU may differ by."""
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)


def _sha256(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
