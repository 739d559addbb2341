"""Calibration: the five-phase study of notebooks 02 to 05 in worlds where the right verdict is known beforehand.

In a *null* world the hypothesis "a small set of heads carries the behaviour" is false, and "supported" would be a false
alarm. In a *planted* world it is true by construction. Each family of null worlds breaks the hypothesis in another way,
so that each of the five kinds of evidence has something to catch. The procedure is :mod:`mi_utils.case_study`, the
very functions and thresholds that the notebooks use; ``check=False`` keeps ``PromptPairs`` from refusing a network that
does not know the task before the study has had its chance to be wrong.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mi_utils import models
from mi_utils.case_study import PREDICTIONS, Pairs, Place, carry_out, discover, n_found
from mi_utils.patching import patch_sweep
from mi_utils.prompts import PromptPairs, ioi_pairs
from mi_utils.results import NothingChanged
from mi_utils.smallworld.handset import FIRST, Wiring, induction_pairs, save_handset
from mi_utils.stats import Estimate, pooled_effect, proportion_interval
from mi_utils.study import Study

TRAINED = ("smallworld", "smallworld-seed1", "smallworld-seed2")
MOST_FALSE_ALARMS, LEAST_POWER = 0.05, 0.95
FILE = "calibration.jsonl"


@dataclass
class World:
    """A network and its siblings, the prompts, and how heads are found in it."""

    network: Any
    cases: list[tuple[Any, int]]
    seed: int
    pairs: Pairs
    find: Callable[..., list[Place]] = discover


@dataclass(frozen=True)
class Family:
    """Worlds of a kind.

    Attributes:
        truth: "null", "planted", or "trained" for trained networks, whose truth nobody knows.
        what: in words.
        make: the world of a number.
        count: in the full calibration; ``short`` in the short one.
    """

    truth: str
    what: str
    make: Callable[[int], World]
    count: int
    short: int


@dataclass(frozen=True)
class Outcome:
    """What the study said about one world. ``values`` are (value, low, high) by prediction."""

    family: str
    index: int
    verdict: str
    failed: list[str] = field(default_factory=list)
    values: dict[str, tuple[float, float | None, float | None]] = field(default_factory=dict)
    reason: str = ""
    cpu_seconds: float = 0.0


# ------------------------------------------------------------------------------------------------ worlds


def load_handset(wiring: Wiring) -> Any:
    """The hand-set model with another wiring, loaded."""
    with TemporaryDirectory(prefix="handset-") as folder:
        return models.load_model(str(save_handset(folder, wiring)), device="cpu")


@cache
def _trained(name: str) -> Any:
    return models.load_model(name, device="cpu")


def _hand_world(index: int, main: Callable[..., Wiring], others: Callable[..., Wiring] | None = None) -> World:
    """A hand-set network and two others of the same or another wiring; where the heads are is drawn anew in each."""
    rng = np.random.default_rng([2009, index])

    def one(wire: Callable[..., Wiring]) -> Any:
        noise, seed = float(rng.uniform(0.005, 0.02)), int(rng.integers(2**31))
        return load_handset(wire(rng=rng, noise=noise, seed=seed))

    network = one(main)
    return World(network, [(one(others or main), 100 + index) for _ in range(2)], 100 + index, induction_pairs)


def _head(rng: np.random.Generator) -> int:
    return int(rng.integers(5))


def _planted(rng: np.random.Generator, **noise: Any) -> Wiring:
    return Wiring(previous={_head(rng): 1.0}, induction={_head(rng): 1.0}, **noise)


def _planted_pair(rng: np.random.Generator, **noise: Any) -> Wiring:
    first, second = rng.permutation(5)[:2].tolist()
    share = float(rng.uniform(0.3, 0.7))
    return Wiring(previous={_head(rng): 1.0}, induction={first: share, second: 1 - share}, **noise)


def _spread(rng: np.random.Generator, **noise: Any) -> Wiring:
    shares = {head: 0.1 for head in range(10)}
    return Wiring(previous=shares, induction=shares, n_heads=10, **noise)


def _by_place(rng: np.random.Generator, **noise: Any) -> Wiring:
    return Wiring(previous={_head(rng): 1.0}, induction={_head(rng): 1.0}, only_at=FIRST + 1, **noise)


def _fragile(rng: np.random.Generator, **noise: Any) -> Wiring:
    return Wiring(previous={head: 0.2 for head in range(5)}, induction={_head(rng): 1.0}, rest=0.9, **noise)


def _random_world(index: int, shape: str, pairs: Pairs) -> World:
    network, *others = (models.load_model(f"random:{shape}:{1000 + 3 * index + k}", device="cpu") for k in range(3))
    return World(network, [(other, 100 + index) for other in others], 100 + index, pairs)


def _trained_world(index: int, **how: Any) -> World:
    name = TRAINED[index % len(TRAINED)]
    seed = 100 + 2 * index  # a study uses its seed and the next one
    cases = [(_trained(other), seed) for other in TRAINED if other != name]
    return World(_trained(name), cases, seed, **{"pairs": same_ioi_pairs} | how)


@cache
def _ioi(n: int, seed: int, split: str) -> PromptPairs:
    return ioi_pairs(_trained(TRAINED[0]), n=n, seed=seed, split=split, check=False)


def same_ioi_pairs(model: Any, n: int, seed: int, split: str = "train", check: bool = True) -> PromptPairs:
    """What ``ioi_pairs`` gives for a network with smallworld's tokenizer; drawn once for all networks of a world."""
    drawn = _ioi(n, seed, split)
    return PromptPairs(
        model, drawn.clean, drawn.corrupted, drawn.correct, drawn.incorrect, check=check,
        template=drawn.template, roles=drawn.roles,
    )  # fmt: skip


def shuffled_pairs(
    model: Any, n: int, seed: int, split: str = "train", check: bool = True, *, coin: int = 0
) -> PromptPairs:
    """IOI pairs in which a coin says which of the two names is called the correct one."""
    pairs = _ioi(n, seed, split)
    heads = np.random.default_rng([coin, seed, len(split)]).random(len(pairs)) < 0.5
    names = zip(pairs.correct, pairs.incorrect, heads, strict=True)
    answers = [(b, a) if turn else (a, b) for a, b, turn in names]
    return PromptPairs(
        model, pairs.clean, pairs.corrupted, [a for a, _ in answers], [b for _, b in answers], check=check,
        template=pairs.template, roles=pairs.roles,
    )  # fmt: skip


def irrelevant_heads(network: Any, seed: int, check: bool = True, pairs: Pairs = ioi_pairs) -> list[Place]:
    """As many heads as would be found, drawn from the half that restores least: a discovery that went wrong."""
    prompts = pairs(network, n=24, seed=seed, split="train", check=check)
    effect = np.abs(pooled_effect(patch_sweep(network, prompts, site="z", over=("layer", "head"), progress=False)))
    least = np.argsort(effect.values, axis=None)[: effect.size // 2]
    chosen = np.random.default_rng(seed).permutation(least)[: n_found(models.info(network).shape)]
    return [tuple(map(int, np.unravel_index(i, effect.shape))) for i in chosen]


FAMILIES: dict[str, Family] = {
    "random weights": Family(
        "null", "untrained twins of smallworld, on IOI",
        partial(_random_world, shape="smallworld", pairs=same_ioi_pairs), 18, 1,
    ),
    "random weights, hand-set shape": Family(
        "null", "untrained networks of the hand-set model's shape, on induction",
        partial(_random_world, shape="handset", pairs=induction_pairs), 12, 1,
    ),
    "shuffled answers": Family(
        "null", "trained networks; a coin says which name is correct",
        lambda index: _trained_world(index, pairs=partial(shuffled_pairs, coin=index)), 18, 1,
    ),
    "irrelevant heads": Family(
        "null", "trained networks; heads from the half with the least effect",
        partial(_trained_world, find=irrelevant_heads), 12, 1,
    ),
    "spread over many heads": Family(
        "null", "hand-set; each step is shared by ten heads, so no small set carries it",
        partial(_hand_world, main=_spread), 10, 1,
    ),
    "only at one place": Family(
        "null", "hand-set; works at the position of the discovery prompts and nowhere else",
        partial(_hand_world, main=_by_place), 10, 1,
    ),
    "other seeds differ": Family(
        "null", "hand-set; planted here, spread over many heads in the other seeds",
        partial(_hand_world, main=_planted, others=_spread), 10, 1,
    ),
    "any damage will do": Family(
        "null", "hand-set; all heads of layer 0 are needed at once, found or not",
        partial(_hand_world, main=_fragile), 10, 1,
    ),
    "one head a step": Family(
        "planted", "hand-set; one previous-token and one induction head, places drawn anew",
        partial(_hand_world, main=_planted), 26, 1,
    ),
    "two induction heads": Family(
        "planted", "hand-set; the induction step shared by two heads, places and shares drawn anew",
        partial(_hand_world, main=_planted_pair), 16, 1,
    ),
    "trained networks": Family(
        "trained", "the three shipped seeds on other prompts; nobody planted anything", _trained_world, 6, 0,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ running


def run_world(family: str, index: int) -> Outcome:
    """The whole study in one world."""
    started = time.process_time()
    world = FAMILIES[family].make(index)
    study = Study(
        question="Which heads carry the behaviour?",
        hypothesis="A small set of heads carries it: those that restore most.",
        predictions=PREDICTIONS,
        falsifier="Any of the five predictions fails.",
        technique="As in notebook 02.",
        validation="As in notebook 02.",
        model=models.info(world.network).name,
        seed=world.seed,
    )
    study.lock()
    try:
        carry_out(study, world.network, world.cases, check=False, pairs=world.pairs, find=world.find)
        verdict = study.verdict()
    except (ValueError, NothingChanged) as error:  # the tools refused: no verdict, and that is not "supported"
        return Outcome(family, index, "refused", reason=str(error)[:300], cpu_seconds=time.process_time() - started)
    values = {record.prediction: (record.value, record.low, record.high) for record in study.evidence}
    return Outcome(
        family, index, verdict.status, verdict.failed, values, cpu_seconds=round(time.process_time() - started, 2)
    )


def calibrate(
    short: bool = False, workers: int = 1, folder: str | Path | None = None, progress: bool = True
) -> list[Outcome]:
    """Run every world; one that was run before, by the same code, is read from the file.

    Args:
        short: a few worlds of each family, for continuous integration.
        workers: processes, one thread each.
        folder: where the outcomes are kept, a line each, so that a run that was cut short goes on. None keeps nothing.
    """
    from tqdm.auto import tqdm

    counts = {name: each.short if short else each.count for name, each in FAMILIES.items()}
    # All families in turn, so that a run that is cut short has seen something of each.
    wanted = [(name, i) for i in range(max(counts.values())) for name, count in counts.items() if i < count]
    file = None if folder is None else Path(folder) / FILE
    done = {(outcome.family, outcome.index): outcome for outcome in _kept(file)}
    left = [each for each in wanted if each not in done]
    with tqdm(total=len(wanted), initial=len(wanted) - len(left), delay=5, disable=not progress, unit="world") as bar:
        for outcome in _run_all(left, workers):
            done[outcome.family, outcome.index] = outcome
            if file is not None:
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
            bar.update()
    return [done[each] for each in wanted]


def _run_all(worlds: Sequence[tuple[str, int]], workers: int) -> Iterator[Outcome]:
    if workers == 1 or len(worlds) < 2:
        yield from (run_world(*each) for each in worlds)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    import torch

    # One thread each: these networks are too small to share.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(run_world, *each) for each in worlds]):
            yield future.result()


def _kept(file: Path | None) -> Iterator[Outcome]:
    """Outcomes in the file; a file of other code is begun anew."""
    if file is None:
        return
    header = json.dumps({"calibration": _code_hash()})
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines[:1] != [header]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(header + "\n", encoding="utf-8")
        return
    if not file.read_text(encoding="utf-8").endswith("\n"):  # cut off by a kill: the next line is one of its own
        with file.open("a", encoding="utf-8") as open_file:
            open_file.write("\n")
    for line in lines[1:]:
        try:
            yield Outcome(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue


def _code_hash() -> str:
    """Of the modules that decide an outcome."""
    names = (
        "models prompts metrics results engine patching compute stats study case_study calibration smallworld/corpus "
        "smallworld/lexicon smallworld/tokenizer smallworld/handset"
    )
    here, digest = Path(__file__).parent, hashlib.sha256()
    weights = sorted(here.glob("smallworld/assets/**/*.safetensors"))
    for path in [*(here / f"{name}.py" for name in names.split()), *weights]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ reading


def share_supported(outcomes: Sequence[Outcome], truth: str) -> Estimate:
    """Share of "supported" among the worlds of a truth, with its Clopper-Pearson interval."""
    chosen = [outcome for outcome in outcomes if FAMILIES[outcome.family].truth == truth]
    return proportion_interval(sum(outcome.verdict == "supported" for outcome in chosen), len(chosen))


def passes(outcomes: Sequence[Outcome]) -> bool:
    """Whether false alarms are at most 5 % of the nulls and power is at least 95 % of the planted worlds."""
    alarms, power = share_supported(outcomes, "null").value, share_supported(outcomes, "planted").value
    return alarms <= MOST_FALSE_ALARMS and power >= LEAST_POWER


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Rows for each family and each truth; the first is the header."""
    kinds = {prediction.name: prediction.kind.replace("_", " ") for prediction in PREDICTIONS}
    rows = [["worlds", "truth", "n", "supported", "refused", "failed predictions, by kind of evidence"]]
    for truth in ("null", "planted", "trained"):
        names = [name for name, family in FAMILIES.items() if family.truth == truth]
        for name in names:
            own = [outcome for outcome in outcomes if outcome.family == name]
            if not own:
                continue
            failed = Counter(kinds[each] for outcome in own for each in outcome.failed)
            said = ", ".join(f"{kind} {count}" for kind, count in failed.most_common()) or "none"
            counts = [sum(o.verdict == verdict for o in own) for verdict in ("supported", "refused")]
            rows.append([name, truth, str(len(own)), *map(str, counts), said])
        of_truth = [outcome for outcome in outcomes if outcome.family in names]
        if of_truth and truth != "trained":
            share = share_supported(outcomes, truth)
            k = round(share.value * share.n)
            exact = f"{share.value:.1%}, exact 95 % interval {share.low:.1%} to {share.high:.1%}"
            refused = sum(outcome.verdict == "refused" for outcome in of_truth)
            rows.append([f"all {truth}", truth, str(share.n), str(k), str(refused), exact])
    return rows


def page(outcomes: Sequence[Outcome], took: str) -> str:
    """The table as a Markdown page. ``took``: machine and time, in a sentence."""
    header, *rows = table(outcomes)
    alarms, power = share_supported(outcomes, "null"), share_supported(outcomes, "planted")
    lines = [
        "# Calibration", "",
        "Can the study say no, and can it say yes? The five-phase study of notebooks 02 to 05, the same functions and "
        "thresholds, in worlds where the right verdict is known.", "",
        f"- False alarms: {round(alarms.value * alarms.n)} of {alarms.n} null worlds are called \"supported\" "
        f"({alarms.value:.1%}; exact 95 % interval {alarms.low:.1%} to {alarms.high:.1%}). At most 5 % are allowed.",
        f"- Power: {round(power.value * power.n)} of {power.n} planted worlds are called \"supported\" "
        f"({power.value:.1%}; {power.low:.1%} to {power.high:.1%}). At least 95 % are asked for.", "",
        "| " + " | ".join(header) + " |", "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows), "",
        "What the worlds are:", "",
        *(f"- *{name}* ({family.truth}): {family.what}." for name, family in FAMILIES.items()), "",
        "A world that the tools refuse (no gap between clean and corrupted, say) counts as not supported. The last "
        "column says which kind of evidence caught how many worlds. What fails causally mostly fails on held-out "
        "prompts and on other seeds as well; each of the other kinds has a family that it above all turns away. "
        "Trained networks are listed for comparison and count for neither share, because nobody knows their truth.", "",
        "What it does not show: the rate of false alarms among *your* hypotheses. It is that of these families of "
        "worlds, with these thresholds, on networks of two and four layers.", "",
        f"{took} To run it again: `python -m mi_utils calibrate`.", "",
    ]  # fmt: skip
    return "\n".join(lines)
