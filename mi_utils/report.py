"""A study written down for a stranger: one HTML page that stands alone, and the same in Markdown.

What the report says is decided once, as a list of parts; two small writers turn it into Markdown and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mi_utils.figures import STYLE as FIGURE_STYLE
from mi_utils.figures import drawing_script, figure_html, plotly_script
from mi_utils.svg import draw

if TYPE_CHECKING:
    from mi_utils.study import Evidence, Study


class Heading(NamedTuple):
    text: str


class Paragraph(NamedTuple):
    text: str
    lead: str = ""  # set in bold before the text


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


class Figure(NamedTuple):
    number: int
    figure: Mapping[str, Any]  # plotly's own dict

    @property
    def caption(self) -> str:
        title = (self.figure.get("layout", {}).get("title") or {}).get("text") or "untitled"
        return f"Figure {self.number}. {unescape(re.sub('<[^>]*>', ' ', title)).strip()}"


Part = Heading | Paragraph | Table | Figure

_VERDICTS = {
    "supported": "Every prediction holds, and all five kinds of evidence are there.",
    "not supported": "All five kinds of evidence are there, and at least one prediction does not hold.",
    "incomplete": "Something that the plan or a verdict needs was not measured.",
}
_COLOURS = {  # of words in tables, on white and on black
    "holds": "good", "yes": "good", "supported": "good",
    "fails": "bad", "no": "bad", "not supported": "bad",
    "not measured": "open", "incomplete": "open",
}  # fmt: skip


def write(study: Study, path: Path, figures: Sequence[Any] = (), notes: str = "", command: str = "") -> Path:
    """Write ``path`` as ``.html`` and ``.md``, and the Markdown's figures as ``.svg`` beside them.

    Returns:
        The HTML file.

    Raises:
        TypeError: something among the figures is no plotly figure.
    """
    page, markdown = path.with_suffix(".html"), path.with_suffix(".md")
    parts = compose(study, [_as_dict(figure) for figure in figures], notes, command)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures: dict[int, str] = {}
    for part in parts:
        picture = draw(part.figure) if isinstance(part, Figure) else None
        if picture is not None:
            file = page.with_name(f"{page.stem}-figure-{part.number}.svg")
            file.write_text(picture, encoding="utf-8")
            pictures[part.number] = file.name
    markdown.write_text(to_markdown(study.question, parts, pictures), encoding="utf-8")
    page.write_text(to_html(study.question, parts), encoding="utf-8")
    return page


def compose(study: Study, figures: Sequence[Mapping[str, Any]], notes: str, command: str = "") -> list[Part]:
    """What the report says, in order."""
    verdict = study.verdict()
    named = {prediction.name for prediction in study.predictions}
    summary = _VERDICTS[verdict.status]
    if verdict.failed:
        summary += f" Does not hold: {', '.join(verdict.failed)}."
    if verdict.missing:
        summary += f" Not measured: {', '.join(name if name in named else _kind(name) for name in verdict.missing)}."
    parts: list[Part] = [
        Paragraph(summary, lead=f"Verdict: {verdict.status}."),
        Paragraph(study.hypothesis, lead="Hypothesis."),
        Paragraph(study.falsifier, lead="What would show it to be false."),
        Paragraph(study.technique, lead="Technique."),
        Paragraph(study.validation, lead="How it was to be checked."),
        Heading("Predictions and what was measured"),
        Paragraph(
            "Thresholds were fixed before the first measurement. A prediction holds if every measurement made for it "
            "does, judged by the end of its interval that is less favourable; where there is no interval, by the "
            "value itself."
        ),
        Table(
            ["Prediction", "Kind of evidence", "Measured [interval]", "n", "Threshold", "Outcome"],
            [row for prediction in study.predictions for row in _measured(study, prediction)],
        ),
    ]
    if figures:
        parts.append(Heading("Figures"))
        parts += [Figure(number, figure) for number, figure in enumerate(figures, start=1)]
    if notes.strip():
        parts.append(Heading("Notes"))
        parts += [Paragraph(" ".join(text.split())) for text in re.split(r"\n\s*\n", notes.strip())]
    parts += [
        Heading("Quality checklist"),
        Table(
            ["", "Met", "Shown by"],
            [[row.item, "yes" if row.met else "no", row.evidence] for row in study.checklist()],
        ),
        Heading("How each number was computed"),
        Table(
            ["Prediction", "Function", "Called with", "Prompts", "Hash of its source", "Interval by", "When"],
            [_computed(record) for record in study.evidence],
        )
        if study.evidence
        else Paragraph("Nothing was measured yet."),
        Heading("How it was made"),
        Table(["", ""], _made(study, command)),
    ]
    return parts


def _kind(name: str) -> str:
    return name.replace("_", " ")


def _measured(study: Study, prediction: Any) -> list[list[str]]:
    """A row for every measurement of a prediction, or one that says that there is none."""
    about = [f"{prediction.name}: {prediction.statement}", _kind(prediction.kind)]
    threshold = f"{prediction.relation} {prediction.threshold:g}"
    found = [record for record in study.evidence if record.prediction == prediction.name]
    if not found:
        return [[*about, "–", "–", threshold, "not measured"]]
    return [
        [*about, _value(record), "–" if record.n is None else str(record.n), threshold,
         "holds" if prediction.holds(record) else "fails"]
        for record in found
    ]  # fmt: skip


def _value(record: Evidence) -> str:
    value = f"{record.value:.3g}"
    return value if record.low is None else f"{value} [{record.low:.3g}, {record.high:.3g}]"


def _computed(record: Evidence) -> list[str]:
    return [
        record.prediction, record.function, record.arguments or "–",
        f"{record.prompts}, {record.explored} of them explored before" if record.prompts else "not known",
        record.source_hash,
        record.method or ("–" if record.low is None else "not said"), record.at,
    ]  # fmt: skip


def _made(study: Study, command: str) -> list[list[str]]:
    rows = [
        ["Model", study.model],
        ["Seed", str(study.seed)],
        ["Plan locked", study.locked_at or "not locked"],
        ["Hash of the plan", study.hash or "–"],
        ["Explored before", f"{len(study.explored)} prompts" if study.explored else "no prompts were named"],
    ]
    for number, here in enumerate(study.environments, start=1):
        tag = f" ({number})" if len(study.environments) > 1 else ""
        versions = ", ".join(f"{name} {version}" for name, version in here.get("packages", {}).items() if version)
        rows += [
            [f"Device{tag}", f"{here.get('device')}, {here.get('cpu_count')} CPU cores"],
            [f"System{tag}", f"{here.get('platform')}, Python {here.get('python')}"],
            [f"Versions{tag}", versions],
            [f"Commit{tag}", str(here.get("commit") or "not known")],
        ]
        if here.get("mi_utils", here.get("commit")) != here.get("commit"):
            rows.append([f"mi_utils{tag}", str(here["mi_utils"] or "not known")])
    if command:
        rows.append(["To run it again", f"{command} (in the repository, at the commit above)"])
    return rows


def _as_dict(figure: Any) -> dict[str, Any]:
    if not hasattr(figure, "to_plotly_json"):
        raise TypeError(f"{type(figure).__name__} is no plotly figure: give figures as mi_utils.plots makes them.")
    return figure.to_dict()


# ------------------------------------------------------------------------------------------------ Markdown


def to_markdown(title: str, parts: Sequence[Part], pictures: Mapping[int, str]) -> str:
    """The report as Markdown. ``pictures`` names the file of each figure that could be drawn."""
    blocks = [f"# {_quiet(title)}"]
    for part in parts:
        if isinstance(part, Heading):
            blocks.append(f"## {_quiet(part.text)}")
        elif isinstance(part, Paragraph):
            blocks.append((f"**{_quiet(part.lead)}** " if part.lead else "") + _quiet(part.text))
        elif isinstance(part, Figure):
            file = pictures.get(part.number)
            shown = f"![{_quiet(part.caption)}]({file})\n\n" if file else ""
            blocks.append(f"{shown}*{_quiet(part.caption)}*" + ("" if file else " (in the HTML report)"))
        else:
            lines = [part.header, ["---"] * len(part.header), *([_quiet(cell) for cell in row] for row in part.rows)]
            blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def _quiet(text: str) -> str:
    """Text in which Markdown sees no markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


# ------------------------------------------------------------------------------------------------ HTML

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0;
  --good: #1a7f37; --bad: #cf222e; --open: #9a6700; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #3d444d;
  --good: #3fb950; --bad: #f85149; --open: #d29922; --shade: #151b23; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.3; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.verdict { border-left: 5px solid var(--tone); background: var(--shade); padding: 0.7rem 1rem; }
.verdict b { color: var(--tone); }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.6rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td { overflow-wrap: anywhere; min-width: 3rem; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.good { color: var(--good); } td.bad { color: var(--bad); } td.open { color: var(--open); }
td.good, td.bad, td.open { font-weight: 600; white-space: nowrap; }
figure { margin: 1.5rem 0; } figcaption { color: var(--soft); font-size: 0.9rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def to_html(title: str, parts: Sequence[Part]) -> str:
    """The report as one page. Plotly's script stands in it once, from the installed package."""
    drawn = any(isinstance(part, Figure) for part in parts)
    body = [f"<h1>{escape(title)}</h1>"]
    for part in parts:
        if isinstance(part, Heading):
            body.append(f"<h2>{escape(part.text)}</h2>")
        elif isinstance(part, Paragraph):
            body.append(_paragraph(part))
        elif isinstance(part, Figure):
            drawing = figure_html(part.figure, part.number)
            body.append(f"<figure>{drawing}<figcaption>{escape(part.caption)}</figcaption></figure>")
        else:
            body.append(_table(part))
    script = ""
    if drawn:
        script = f"<script>{plotly_script()}</script>"
        body.append(f"<script>{drawing_script()}</script>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}{FIGURE_STYLE}</style>{script}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _paragraph(part: Paragraph) -> str:
    lead = f"<b>{escape(part.lead)}</b> " if part.lead else ""
    tone = _COLOURS.get(part.lead.removeprefix("Verdict: ").removesuffix("."))
    opening = f'<p class="verdict" style="--tone: var(--{tone})">' if tone else "<p>"
    return f"{opening}{lead}{escape(part.text)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    top = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return f'<div class="table"><table>{top}<tbody>\n{rows}\n</tbody></table></div>'


def _cell(text: str) -> str:
    kind = _COLOURS.get(text) or ("number" if re.fullmatch(r"[<>=]* ?-?[\d.e+-]+( \[.*\])?", text) else "")
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"
