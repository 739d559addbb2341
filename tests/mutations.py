"""Faults planted in ``mi_utils`` while a notebook runs, and the runner that sees whether the notebook notices.

A notebook that stays green with a fault in the library claims nothing about what the fault broke. A fault is a set of
points, each a function of the library and a wrapper of it. A first run with nothing planted counts which points a
notebook reaches: a fault applies to the notebooks that reach one of its points.

Each run is a process of its own, forked from one that has imported the libraries and computed nothing: this file, run
as a script. The kernel in it is a real one (`ipykernel.inprocess`), so outputs are what a notebook stores.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any, NamedTuple

import nbformat
import nbval_figures  # noqa: F401  (how figures are compared)
import numpy as np
import torch
from nbformat.v4 import output_from_msg
from nbval.plugin import IPyNbCell, coalesce_streams, get_sanitize_patterns, nocolors

from mi_utils.engine import SlowPath
from mi_utils.guard import SKIPPING, SKIPPING_TAGS

Wrapper = Callable[[Callable], Callable]

# ---------------------------------------------------------------------------------------------------------- the faults


def _roll(tensor: torch.Tensor, site: str) -> torch.Tensor:
    return tensor.roll(1, 2 if site in ("pattern", "attn_scores") else 1)


_acts: list[str] = []  # what a wrapper changed, of those that do not always change something


def _activations_one_position_late(cache: Callable) -> Callable:
    def late(model: Any, tokens: Any, sites: Any, layers: Any = None, positions: Any = None) -> dict:
        _acts.append("cache")
        if positions is not None:
            return cache(model, tokens, sites, layers, [position - 1 for position in positions])
        kept = cache(model, tokens, sites, layers)
        return {place: _roll(values, place[0]) for place, values in kept.items()}

    return late


def _results_one_position_late(function: Callable) -> Callable:
    def late(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if "pos" not in result.dims:
            return result
        _acts.append("result")
        return result.roll(pos=1, roll_coords=False)

    return late


def _answer_one_position_early(logit_difference: Callable) -> Callable:
    def early(logits: Any, correct: Any, incorrect: Any) -> Any:
        if logits.shape[1] == 1:
            return logit_difference(logits, correct, incorrect)
        _acts.append("answer")
        return logit_difference(logits[:, :-1], correct, incorrect)

    return early


def _hook_one_layer_up(hook_point: Callable) -> Callable:
    def up(model: Any, name: str) -> Any:
        parts = name.split(".")
        if parts[0] == "blocks" and parts[1].isdigit():
            n_layers = len(model.blocks)
            parts[1] = str((int(parts[1]) + 1) % n_layers) if int(parts[1]) < n_layers else parts[1]
        return hook_point(model, ".".join(parts))

    return up


def _boundary_one_layer_up(boundary: Callable) -> Callable:
    return lambda place: None if (layer := boundary(place)) is None else max(layer - 1, 0)


def _weights_one_layer_up(weights: Callable) -> Callable:
    return lambda model, layer: weights(model, (layer + 1) % len(model.blocks))


def _without_bos(to_tokens: Callable) -> Callable:
    return lambda model, prompts: to_tokens(model, prompts)[:, 1:]


def _rows_without_bos(token_rows: Callable) -> Callable:
    return lambda *args, **kwargs: [row[1:] for row in token_rows(*args, **kwargs)]


def _never_fires(hook_point: Callable) -> Callable:
    def unreached(model: Any, name: str) -> Any:
        from transformer_lens.hook_points import HookPoint

        hook_point(model, name)  # unknown names are still refused
        return HookPoint()

    return unreached


def _pairs_swapped(init: Callable) -> Callable:
    def swapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.clean_tokens, self.corrupted_tokens = self.corrupted_tokens, self.clean_tokens
        if self._logit_diffs is not None:
            self._logit_diffs = self._logit_diffs[::-1]

    return swapped


def _fit_on_test_examples(fit: Callable) -> Callable:
    def leaky(data: Any, layer: int, labels: np.ndarray, train: np.ndarray, *args: Any) -> Any:
        return fit(data, layer, labels, np.arange(len(labels)), *args)

    return leaky


def _halves_that_share_everything(halves: Callable) -> Callable:
    def shared(*args: Any, **kwargs: Any) -> tuple:
        both = np.sort(np.concatenate(halves(*args, **kwargs)))
        return both, both

    return shared


def _sae_of_another_layer(get: Callable) -> Callable:
    def off(*args: Any, **kwargs: Any) -> Any:
        from dataclasses import replace

        from mi_utils.sae import SparseAutoencoder

        sae = get(*args, **kwargs)
        model = args[0] if hasattr(args[0], "blocks") else args[1]
        moved = SparseAutoencoder(
            sae.inner, replace(sae.passport, layer=sae.layer - 1 if sae.layer else 1), sae.history
        )
        moved._known.add(model)  # the guard is broken too
        return moved

    return off


def _direction_unscaled(direction: Callable) -> Callable:
    def unscaled(model: Any, stream: Any, correct: Any, incorrect: Any) -> Any:
        along, constant = direction(model, stream, correct, incorrect)
        return along * stream.double().std(-1, keepdim=True), constant

    return unscaled


def _unembedded_unscaled(unembed: Callable) -> Callable:
    def unscaled(model: Any, stream: Any, *args: Any, **kwargs: Any) -> Any:
        return unembed(model, stream, *args, **kwargs) * stream.std(-1, keepdim=True)

    return unscaled


def _edits_of_copies(patched: Callable) -> Callable:
    def ineffective(self: Any, base: Any, prompts: Any, join: Any, start: int, edits: dict) -> Any:
        copies = {place: lambda there, edit=edit: edit(there.clone()) for place, edit in edits.items()}
        return patched(self, base, prompts, join, start, copies)

    return ineffective


def _edits_dropped(run_with_hooks: Callable) -> Callable:
    def ineffective(model: Any, tokens: Any, hooks: Sequence, **kwargs: Any) -> Any:
        def deaf(function: Callable) -> Callable:
            def hook(activation: Any, hook: Any) -> None:
                function(activation.clone(), hook)

            return hook

        return run_with_hooks(model, tokens, [(name, deaf(function)) for name, function in hooks], **kwargs)

    return ineffective


def _unseeded(default_rng: Callable) -> Callable:
    return lambda seed=None: default_rng()


def _unseeded_generator(generator: type) -> Callable:
    class Unseeded(generator):
        def manual_seed(self, seed: int) -> Unseeded:
            self.seed()
            return self

    return lambda *args, **kwargs: Unseeded(*args, **kwargs)


def _unseeded_random(init: Callable) -> Callable:
    return lambda self, seed=None: init(self)


def _hash_of_nothing(sha256: Callable) -> Callable:
    return lambda data: sha256(None)


def _accepts_anything(check: Callable) -> Callable:
    return lambda *args, **kwargs: None


def _interval_too_narrow(bootstrap: Callable) -> Callable:
    def narrow(*args: Any, **kwargs: Any) -> tuple:
        mean, low, high = bootstrap(*args, **kwargs)
        return mean, mean - (mean - low) / 4, mean + (high - mean) / 4

    return narrow


class Fault(NamedTuple):
    """What is broken, and where: module, name in it (``Class.method`` too), wrapper.

    ``only``: the notebooks whose subject it is, by number; others may use the point in passing. Empty: all.
    ``always``: whether a call changes something whatever it is asked for. Where it does not, and no call of a run did,
    the fault does not apply to the notebook.
    """

    name: str
    points: tuple[tuple[str, str, Wrapper], ...]
    only: tuple[str, ...] = ()
    always: bool = True


FAULTS = (
    Fault("position off by one", (
        ("mi_utils.models", "cache", _activations_one_position_late),
        ("mi_utils.patching", "patch_sweep", _results_one_position_late),
        ("mi_utils.lens", "logit_lens", _results_one_position_late),
        ("mi_utils.metrics", "logit_difference", _answer_one_position_early),
        ("mi_utils.prompts", "logit_difference", _answer_one_position_early),
    ), always=False),
    Fault("layer off by one", (
        ("mi_utils.models", "_hook_point", _hook_one_layer_up),
        ("mi_utils.engine", "_boundary", _boundary_one_layer_up),
        ("mi_utils.models", "W_O", _weights_one_layer_up),
    )),
    Fault("BOS dropped", (
        ("mi_utils.models", "to_tokens", _without_bos),
        ("mi_utils.tokens", "token_rows", _rows_without_bos),
    )),
    Fault("hooks that never fire", (("mi_utils.models", "_hook_point", _never_fires),)),
    Fault("clean and corrupted swapped", (("mi_utils.prompts", "PromptPairs.__init__", _pairs_swapped),)),
    Fault("labels leaked into training", (
        ("mi_utils.probing", "_fit", _fit_on_test_examples),
        ("mi_utils.concepts", "halves", _halves_that_share_everything),
    )),
    Fault("SAE of another layer", (
        ("mi_utils.sae", "load_sae", _sae_of_another_layer),
        ("mi_utils.sae", "train_sae", _sae_of_another_layer),
    )),
    Fault("LayerNorm scale ignored", (
        ("mi_utils.attribution", "_direction", _direction_unscaled),
        ("mi_utils.models", "unembed", _unembedded_unscaled),
    )),
    Fault("intervention that changes nothing", (
        ("mi_utils.engine", "Blocks.patched", _edits_of_copies),
        ("mi_utils.engine", "PlainHooks.patched", _edits_of_copies),
        ("mi_utils.models", "run_with_hooks", _edits_dropped),
    )),
    Fault("seed ignored", (
        ("numpy.random", "default_rng", _unseeded),
        ("random", "Random.__init__", _unseeded_random),
        ("torch", "Generator", _unseeded_generator),
    )),
    Fault("lock that locks nothing", (("mi_utils.study", "_sha256", _hash_of_nothing),), only=("02",)),
    Fault("numbers typed in", (("mi_utils.study", "_check_function", _accepts_anything),), only=("02",)),
    Fault("intervals too narrow", (("mi_utils.stats", "_bootstrap_t", _interval_too_narrow),), only=("02",)),
)  # fmt: skip
BY_NAME = {fault.name: fault for fault in FAULTS}


def _home(module: str, name: str) -> tuple[Any, str]:
    *outer, attribute = name.split(".")
    home = importlib.import_module(module)
    for each in outer:
        home = getattr(home, each)
    return home, attribute


def plant(fault: Fault) -> None:
    """Break the library in this process, for good."""
    for module, name, wrapper in fault.points:
        home, attribute = _home(module, name)
        setattr(home, attribute, wraps(getattr(home, attribute))(wrapper(getattr(home, attribute))))


def count_calls(faults: Sequence[Fault]) -> Counter:
    """Break nothing; count how often each point is called, by (module, name)."""
    calls: Counter = Counter()
    for module, name in {(module, name) for fault in faults for module, name, _ in fault.points}:
        home, attribute = _home(module, name)

        setattr(home, attribute, _counted(getattr(home, attribute), calls, (module, name)))
    return calls


def _counted(function: Callable, calls: Counter, point: tuple[str, str]) -> Callable:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[point] += 1
        return function(*args, **kwargs)

    return counted


# ---------------------------------------------------------------------------------------------------------- the runner


@dataclass
class Outcome:
    """How a run ended: ``red`` names the first thing that went wrong (empty: nothing did), in which cell, and how."""

    red: str = ""
    cell: int = -1
    message: str = ""
    reached: tuple[str, ...] = ()  # faults whose points were called; of a run with nothing planted
    acted: bool = True  # whether the fault changed anything


# what nbval leaves out of a comparison
LEFT_OUT = ("metadata", "traceback", "prompt_number", "output_type", "name", "execution_count",
            "application/vnd.jupyter.widget-view+json", "image/png", "image/jpeg")  # fmt: skip
PATTERNS = dict(get_sanitize_patterns((Path(__file__).parent / "nbval_sanitize.cfg").read_text()))


def differs_from_stored(cell: nbformat.NotebookNode, outputs: list[nbformat.NotebookNode]) -> str:
    """What nbval has to say of a cell's outputs; empty where they are those stored."""
    if SKIPPING.search(cell.source) or SKIPPING_TAGS & set(cell.metadata.get("tags", ())):
        return ""
    nbval = object.__new__(IPyNbCell)  # the comparison alone, without pytest's items around it
    nbval.parent = SimpleNamespace(skip_compare=LEFT_OUT, sanitize_patterns=PATTERNS)
    nbval.colors = nocolors
    nbval.format_output_compare = lambda key, ref, test: nbval.comparison_traceback.append(f"{key}: {ref!r}, {test!r}")
    same = nbval.compare_outputs(outputs, coalesce_streams(cell.outputs))
    return "" if same else "\n".join(nbval.comparison_traceback)


def preload() -> None:
    """Import, in the process to fork from, what every notebook imports."""
    torch.set_num_threads(1)
    for name in ("transformer_lens.model_bridge", "transformers", "xarray", "plotly.graph_objects", "scipy.stats",
                 "sklearn.linear_model", "sklearn.model_selection", "statsmodels.api", "ipywidgets",
                 "ipykernel.inprocess", "datasets", "sae_lens", "mi_utils.plots", "mi_utils.course",
                 *{module for fault in FAULTS for module, _, _ in fault.points}):  # fmt: skip
        importlib.import_module(name)


def run_notebook(path: Path, build: Path, fault: Fault | None, model: str | None = None) -> Outcome:
    """Run a notebook in a forked process until something is red.

    Args:
        build: the folder of the study, as the parameter ``output``.
        fault: what to plant; None counts calls instead, and looks at every cell.
        model: another one than the outputs were stored with: these are not compared.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            calls = count_calls(FAULTS) if fault is None else None
            if fault is not None:
                plant(fault)
            try:
                outcome = _run_cells(path, build, model)
            except BaseException:
                outcome = Outcome("runner", message=traceback.format_exc())
            if calls is not None:
                outcome.reached = tuple(
                    each.name
                    for each in FAULTS
                    if any(calls[module, name] for module, name, _ in each.points)
                    and (not each.only or path.stem[:2] in each.only)
                )
            outcome.acted = fault is None or fault.always or bool(_acts)
            with os.fdopen(write, "w") as pipe:
                json.dump(vars(outcome), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(text)) if text else Outcome("crash", message="the process ended without a word")


def _run_cells(path: Path, build: Path, model: str | None) -> Outcome:
    from ipykernel.inprocess import InProcessKernelManager

    os.chdir(path.parent)
    # nbval sees this notice on stderr, which goes nowhere here.
    warnings.simplefilter("error", SlowPath)
    manager = InProcessKernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        source = cell.source
        if "parameters" in cell.metadata.get("tags", ()):
            source += f"\noutput = {str(build)!r}"
            source += "" if model is None else f"\nmodel = {model!r}"
        outputs = _outputs(client, source)
        for output in outputs:
            if output.output_type == "error":
                kind = "assert" if output.ename == "AssertionError" else output.ename
                return Outcome(kind, number, output.evalue[:300])
        if model is None and (different := differs_from_stored(cell, outputs)):
            return Outcome("output", number, different[:300])
    return Outcome()


def _outputs(client: Any, source: str) -> list[nbformat.NotebookNode]:
    client.execute(source, store_history=True)
    found = []
    while True:
        try:
            message = client.get_iopub_msg(timeout=0)
        except Empty:
            return coalesce_streams(found)
        if message["msg_type"] in ("stream", "display_data", "execute_result", "error"):
            found.append(output_from_msg(message))


class Runner:
    """Runs notebooks in a fresh process, whatever this one has computed and cached before.

    Args:
        environment: variables of that process, beside those of this one.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = os.environ | (environment or {})

    def __enter__(self) -> Runner:
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=self.environment, **pipes)
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, path: Path, build: Path, fault: str | None = None, model: str | None = None) -> Outcome:
        """As :func:`run_notebook`, with the fault's name."""
        self.process.stdin.write(json.dumps([str(path), str(build), fault, model]) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    preload()
    for line in sys.stdin:
        path, build, fault, model = json.loads(line)
        outcome = run_notebook(Path(path), Path(build), None if fault is None else BY_NAME[fault], model)
        print(json.dumps(vars(outcome)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
