"""Past studies: found below a folder, listed with their verdicts, and compared prediction by prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mi_utils.study import Evidence, Study, StudyError

PATTERN = "study*.json"


@dataclass(frozen=True)
class PastStudy:
    """A saved study, or why it cannot be read.

    Attributes:
        name: short and unique in its list: folder and plan hash.
        path: the file.
        study: None where the file was edited or is no study.
        problem: why it is None.
    """

    name: str
    path: Path
    study: Study | None
    problem: str = ""

    @property
    def verdict(self) -> str:
        """Status of the study; "unreadable" where it is none."""
        return self.study.verdict().status if self.study else "unreadable"


def find_studies(folder: str | Path) -> list[PastStudy]:
    """Every study saved below a folder as ``study*.json``, those set aside too; the earliest lock first.

    A file that was tampered with is listed as unreadable, with the reason, and not left out.
    """
    folder = Path(folder)
    found = []
    for path in sorted(folder.rglob(PATTERN)):
        place = path.parent.relative_to(folder).as_posix()
        try:
            study = Study.load(path)
        except StudyError as error:
            found.append(PastStudy(f"{place}/{path.stem}", path, None, str(error)))
            continue
        found.append(PastStudy(f"{place}/{path.stem}", path, study))
    return sorted(found, key=lambda past: ((past.study and past.study.locked_at) or "9", past.name))


def pick(studies: Sequence[PastStudy], name: str) -> PastStudy:
    """The study of that name, or the only one whose name, model or plan hash contains it.

    Raises:
        StudyError: none or several fit, or it cannot be read.
    """
    exact = [past for past in studies if past.name == name]
    fits = exact or [
        past for past in studies
        if name in past.name
        or (past.study and (name in past.study.model or (past.study.hash or "").startswith(name)))
    ]  # fmt: skip
    if len(fits) != 1:
        listed = ", ".join(past.name for past in (fits or studies)) or "none"
        raise StudyError(f"{name!r} fits {len(fits)} of the studies. Name one of: {listed}.")
    if fits[0].study is None:
        raise StudyError(f"{fits[0].name} cannot be read: {fits[0].problem}")
    return fits[0]


def compare(studies: Mapping[str, Study]) -> list[list[str]]:
    """Rows of a table: what differs in the plans, then each prediction with what every study measured for it.

    Args:
        studies: under the names that head the columns.

    Returns:
        The first row is the header ("", names …). A prediction that one of the plans does not have shows "–" there.
        Where thresholds differ between the plans, each cell names its own.
    """
    rows = [["", *studies]]
    for field in ("question", "hypothesis", "falsifier", "technique", "validation", "model", "seed"):
        values = [str(getattr(study, field)) for study in studies.values()]
        if field in ("model", "seed") or len(set(values)) > 1:
            rows.append([field, *values])
    rows.append(["plan", *((study.hash or "not locked")[:12] for study in studies.values())])
    rows.append(["verdict", *(study.verdict().status for study in studies.values())])
    names = dict.fromkeys(prediction.name for study in studies.values() for prediction in study.predictions)
    for name in names:
        plans = [{p.name: p for p in study.predictions}.get(name) for study in studies.values()]
        bars = {f"{p.relation} {p.threshold:g}" for p in plans if p}
        label = f"{name} {bars.pop()}" if len(bars) == 1 else name
        cells = []
        for study, prediction in zip(studies.values(), plans, strict=True):
            if prediction is None:
                cells.append("–")
                continue
            measured = [_shown(record) for record in study.evidence if record.prediction == name]
            bar = "" if label != name else f" ({prediction.relation} {prediction.threshold:g})"
            cells.append(", ".join([*measured, study.outcome(name)]) + bar)
        rows.append([label, *cells])
    return rows


def _shown(record: Evidence) -> str:
    value = f"{record.value:.3g}"
    return value if record.low is None else f"{value} [{record.low:.3g}, {record.high:.3g}]"
