"""A feature at a glance: how often and how strongly it is active, on what, and what it writes to the logits.

The HTML uses the reader's own text and background colours, so it is at home on light and dark pages, and asks no other
host for anything. Beside it stands a still picture of the same, for places that show no styled HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mi_utils import features, models
from mi_utils.features import Dictionary, Example
from mi_utils.svg import FONT, INK, WIDTH

if TYPE_CHECKING:
    import xarray as xr

BLUE = (33, 102, 172)
MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
LETTER = 7.25  # pixels of a letter of 12-pixel monospace
BARS = (320, 72)  # pixels of the histogram


@dataclass(frozen=True)  # no tuple: IPython would print its fields instead of the plain text
class Dashboard:
    """What :func:`feature_dashboard` shows: as HTML, as a still picture (SVG) and as plain text."""

    html: str
    picture: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.html, "image/svg+xml": self.picture, "text/plain": self.text}


class _Content(NamedTuple):
    title: str
    facts: str
    bars: list[tuple[float, float, int]]  # lower and upper edge, count
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    groups: list[tuple[str, list[Example]]]
    largest: float


def feature_dashboard(
    search: xr.Dataset, model: Any, sae: Dictionary, feature: int, *, n: int = 6, logits: int = 6, room: int = 84
) -> Dashboard:
    """One feature of a :func:`feature_search`: histogram, strongest and quantile examples, top logits.

    Every token is shaded by the feature's activation on it, darkest at the largest of all. The token that the example
    is about is underlined. Quantile examples come from the middle of ``n`` equal parts of the feature's active tokens:
    they say what it is usually active on, which the strongest ones do not.

    Args:
        search, sae: of the same dictionary.
        n: how many examples of each kind. logits: how many promoted and suppressed tokens.
        room: letters in a line; examples are cut to it around their token.

    Raises:
        ValueError: a feature that is not there, or a search of another dictionary.
    """
    if (search.attrs["site"], search.attrs["layer"], search.sizes["feature"]) != (sae.site, sae.layer, sae.n_features):
        raise ValueError(
            f"The search is of {search.sizes['feature']} features at {search.attrs['site']} of layer "
            f"{search.attrs['layer']}; this dictionary has {sae.n_features} at {sae.site} of layer {sae.layer}."
        )
    if search.attrs["model"] != models.info(model).name:
        raise ValueError(f"The search is of {search.attrs['model']}, this model is {models.info(model).name}.")
    groups = [
        ("Strongest", features.examples(search, model, feature, n)),
        ("Spread over quantiles", features.examples(search, model, feature, n, which="quantiles")),
    ]
    groups = [(name, [_cut(example, room) for example in shown]) for name, shown in groups]
    one = search.sel(feature=feature)
    active = int(one["active"])
    best = features.logit_effects(model, sae, [feature], top=logits).isel(feature=0)
    largest = float(np.nan_to_num(one["top_activation"].values[0]))
    facts = f"active on {active:,} of {search.attrs['n_tokens']:,} tokens ({float(one['density']):.2%})"
    content = _Content(
        title=f"Feature {feature} · {search.attrs['model']}, {sae.site}, layer {sae.layer}",
        facts=facts + (f", at most {largest:.3g}" if active else ": dead"),
        bars=_histogram(one),
        promoted=list(zip(best["promoted"].values.tolist(), best["promoted_effect"].values.tolist(), strict=True)),
        suppressed=list(
            zip(best["suppressed"].values.tolist(), best["suppressed_effect"].values.tolist(), strict=True)
        ),
        groups=groups,
        largest=largest,
    )
    return Dashboard(_html(content), _picture(content), _text(content))


def _histogram(one: xr.Dataset, bars: int = 24) -> list[tuple[float, float, int]]:
    """Counts between equally wide edges, up to the strongest: the search's bins, shared out evenly where they span
    several of these."""
    largest = float(np.nan_to_num(one["top_activation"].values[0]))
    if not largest:
        return []
    low = one["bin"].values
    high = np.minimum(np.append(low[1:], np.inf), largest * 1.0001)
    counts = one["histogram"].values.astype(float)
    edges = np.linspace(0, largest * 1.0001, bars + 1)
    width = np.maximum(high - low, 1e-12)
    shared = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    sizes = (np.clip(shared / width, 0, 1) * counts).sum(1)
    return [(float(a), float(b), round(size)) for a, b, size in zip(edges[:-1], edges[1:], sizes.tolist(), strict=True)]


def _cut(example: Example, room: int) -> Example:
    """As many words around the token as there is room for."""
    first = last = example.at
    length = len(example.words[example.at])
    while True:
        before = first > 0 and length + len(example.words[first - 1]) <= room
        first, length = (first - 1, length + len(example.words[first - 1])) if before else (first, length)
        after = last + 1 < len(example.words) and length + len(example.words[last + 1]) <= room
        last, length = (last + 1, length + len(example.words[last + 1])) if after else (last, length)
        if not (before or after):
            break
    chosen = slice(first, last + 1)
    return example._replace(words=example.words[chosen], activations=example.activations[chosen], at=example.at - first)


def _shown(word: str) -> str:
    word = word.replace("<|endoftext|>", "□").replace("\n", "↵").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in word)


def _alpha(activation: float, largest: float) -> float:
    return round(0.7 * max(0.0, activation) / largest, 2) if largest else 0.0


def _bars(content: _Content, x: float, y: float) -> list[str]:
    """The histogram's bars with their baseline and its two ends, as SVG."""
    wide, tall = BARS
    most = max((count for _, _, count in content.bars), default=0) or 1
    step = wide / max(len(content.bars), 1)
    parts = [
        f'<rect x="{x + i * step:.1f}" y="{y + tall - tall * count / most:.1f}" width="{step - 1:.1f}" '
        f'height="{tall * count / most:.1f}" fill="rgb{BLUE}"><title>{low:.2f} to {high:.2f}: {count}</title></rect>'
        for i, (low, high, count) in enumerate(content.bars)
    ]
    parts.append(f'<line x1="{x}" y1="{y + tall}" x2="{x + wide}" y2="{y + tall}" stroke="#8c959f"/>')
    labels = ((x, "start", "0"), (x + wide / 2, "middle", "activation"), (x + wide, "end", f"{content.largest:.3g}"))
    parts += [
        f'<text x="{at:.1f}" y="{y + tall + 14}" text-anchor="{anchor}" font-size="11">{text}</text>'
        for at, anchor, text in labels
    ]
    return parts


def _html(content: _Content) -> str:
    wide, tall = BARS
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + 20}" height="{tall + 24}" fill="currentColor" '
        f'role="img" aria-label="histogram of activations">{"".join(_bars(content, 10, 4))}</svg>'
    )

    def row(example: Example) -> str:
        spans = "".join(
            f'<span title="{activation:.3g}" style="background: rgba({BLUE[0]}, {BLUE[1]}, {BLUE[2]}, '
            f'{_alpha(activation, content.largest)}){"; border-bottom: 2px solid" if i == example.at else ""}">'
            + (f"<b>{escape(_shown(word))}</b>" if i == example.at else escape(_shown(word)))
            + "</span>"
            for i, (word, activation) in enumerate(zip(example.words, example.activations, strict=True))
        )
        cell = 'style="text-align: right; padding: 1px 8px; font-variant-numeric: tabular-nums"'
        return (
            f"<tr><td {cell}>{example.activation:.2f}</td><td {cell}>{example.share:.0%}</td>"
            f'<td style="text-align: left; white-space: pre-wrap; font-family: {MONOSPACE}">{spans}</td></tr>'
        )

    def effects(pairs: Sequence[tuple[str, float]]) -> str:
        return ", ".join(f"<code>{escape(_shown(token))}</code>&nbsp;{effect:+.2f}" for token, effect in pairs)

    tables = "".join(
        f'<p style="margin: 10px 0 2px"><b>{name}</b></p>'
        '<table style="font-size: 13px; color: inherit; background: none; border-collapse: collapse">'
        "<tr><th>activation</th><th>stronger than</th>"
        f'<th style="text-align: left">text</th></tr>{"".join(map(row, shown))}</table>'
        for name, shown in content.groups
        if shown
    )
    return (
        f'<div style="font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.5; color: inherit">'
        f'<p style="margin: 0"><b>{escape(content.title)}</b><br>{escape(content.facts)}</p>{picture}'
        f'<p style="margin: 4px 0">Promotes {effects(content.promoted)}<br>Suppresses {effects(content.suppressed)}'
        f"<br>(logits per unit of activation)</p>{tables}</div>"
    )


def _picture(content: _Content) -> str:
    height = 120 + BARS[1] + sum(34 + 20 * len(shown) for _, shown in content.groups if shown)
    parts = [
        f'<text x="12" y="26" font-size="16">{escape(content.title, quote=False)}</text>',
        f'<text x="12" y="45" fill="#57606a">{escape(content.facts, quote=False)}</text>',
        *_bars(content, 14, 60),
    ]
    for i, (name, pairs) in enumerate((("Promotes", content.promoted), ("Suppresses", content.suppressed))):
        at = 14 + BARS[0] + 40 + i * 240
        parts.append(f'<text x="{at}" y="66" fill="#57606a">{name} (logits)</text>')
        parts += [
            f'<text x="{at}" y="{82 + 15 * j}" font-family="{MONOSPACE}" xml:space="preserve">'
            f"{escape(_shown(token), quote=False)} {effect:+.2f}</text>"
            for j, (token, effect) in enumerate(pairs[:5])
        ]
    y = BARS[1] + 104
    for name, shown in content.groups:
        if not shown:
            continue
        y += 26
        parts.append(f'<text x="12" y="{y}" font-weight="bold">{name}</text>')
        for example in shown:
            y += 20
            parts.append(f'<text x="60" y="{y}" text-anchor="end">{example.activation:.2f}</text>')
            parts.append(f'<text x="108" y="{y}" text-anchor="end" fill="#57606a">{example.share:.0%}</text>')
            x = 122.0
            for i, (word, activation) in enumerate(zip(example.words, example.activations, strict=True)):
                text, wide = _shown(word), LETTER * len(_shown(word))
                if alpha := _alpha(activation, content.largest):
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y - 13}" width="{wide:.1f}" height="17" fill="rgb{BLUE}" '
                        f'fill-opacity="{alpha}"/>'
                    )
                if i == example.at:
                    parts.append(
                        f'<line x1="{x:.1f}" y1="{y + 4}" x2="{x + wide:.1f}" y2="{y + 4}" stroke="{INK}" '
                        'stroke-width="2"/>'
                    )
                parts.append(
                    f'<text x="{x:.1f}" y="{y}" font-family="{MONOSPACE}" textLength="{wide:.1f}" '
                    f'xml:space="preserve">{escape(text, quote=False)}</text>'
                )
                x += wide
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{escape(FONT)}" font-size="12" fill="{INK}" role="img" style="max-width: 100%; height: auto">'
        f"<title>{escape(content.title, quote=False)}</title>"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def _text(content: _Content) -> str:
    lines = [content.title, content.facts]
    for name, pairs in (("promotes", content.promoted), ("suppresses", content.suppressed)):
        lines.append(f"{name} " + ", ".join(f"{_shown(token)!r} {effect:+.2f}" for token, effect in pairs))
    for name, shown in content.groups:
        lines.append(name)
        for example in shown:
            words = [f"[{word}]" if i == example.at else word for i, word in enumerate(map(_shown, example.words))]
            lines.append(f"{example.activation:8.2f} {example.share:5.0%}  {''.join(words)}")
    return "\n".join(lines)
