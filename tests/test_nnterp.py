"""nnterp, in a folder of its own beside the course: its standardised names give the logit lens that ours gives.

nnterp 1.3.0 works with nnsight 0.7.0 and does not import with 0.8.1. nnsight 0.7.0 alone would not do for the course:
it sends a session with ``remote="local"`` away instead of rehearsing it. So both are installed below ``build/``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements-nnterp.txt"
FOLDER = ROOT / "build" / "nnterp"

SCRIPT = """
import sys
import numpy as np, torch
from importlib.metadata import version
import nnsight, nnterp
from nnterp import StandardizedTransformer

path, tokens, out = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens))
model = StandardizedTransformer(path, device_map="cpu")
found = []
with torch.no_grad():
    for layer in range(model.num_layers + 1):
        with model.trace(tokens):
            if layer < model.num_layers:
                stream = model.layers_input[layer]
            else:
                stream = model.layers_output[layer - 1]
            logits = model.project_on_vocab(stream).float().save()
        found.append(logits.numpy())
np.save(out, np.stack(found, axis=1))
print("nnsight", nnsight.__file__)
"""


@pytest.fixture(scope="module")
def overlay():
    """The folder with nnterp in it, installed once."""
    stamp = FOLDER / "requirements.txt"
    if not stamp.is_file() or stamp.read_text() != REQUIREMENTS.read_text():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(FOLDER)]
        done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
        if done.returncode:
            reason = f"NOT TESTED: nnterp could not be installed ({done.stderr.strip().splitlines()[-1]})"
            warnings.warn(reason, stacklevel=1)
            pytest.skip(reason)
        stamp.write_text(REQUIREMENTS.read_text())
    return FOLDER


def test_the_requirements_pin_what_the_course_does_not():
    pins = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line and line[0] != "#")
    course = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    assert "nnterp" in pins and pins.keys() & course.keys() == {"nnsight"} and pins["nnsight"] != course["nnsight"]


def test_standardised_names_give_our_logit_lens(overlay, model, tmp_path):
    from mi_utils import large, models
    from mi_utils.prompts import ioi_pairs

    ours = large.load_large_model("smallworld", device="cpu")
    pairs = ioi_pairs(ours, n=4)
    np.save(tmp_path / "tokens.npy", pairs.clean_tokens.cpu().numpy())
    (tmp_path / "lens.py").write_text(SCRIPT)
    arguments = [models.resolve("smallworld"), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    environment = os.environ | {"PYTHONPATH": str(overlay), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "lens.py"), *arguments], env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(overlay) in done.stdout  # it is that nnsight, not the course's
    logits = np.load(tmp_path / "logits.npy")  # prompt, layer, pos, d_vocab
    rows = np.arange(len(pairs))
    correct, incorrect = pairs.correct_ids.cpu().numpy(), pairs.incorrect_ids.cpu().numpy()
    theirs = logits[rows, :, :, correct] - logits[rows, :, :, incorrect]
    expected = large.logit_lens(ours, pairs)["logit_diff"]
    assert float(np.ptp(expected.values)) > 1
    assert np.abs(theirs - expected.values).max() < 1e-4
