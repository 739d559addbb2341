"""Sparse autoencoders: the training step is SAELens', planted features are found, and no SAE speaks for a place that it
was not trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mi_utils import models
from mi_utils import sae as saes
from mi_utils.models import load_model
from mi_utils.results import NothingChanged
from mi_utils.sae import BrokenSAE, SparseAutoencoder, WrongSAE
from mi_utils.tokens import row_activations, token_rows

SITE, LAYER = "resid_post", 0
TEXTS = ["Mary and John went to the store.", "The cat sat on the mat because it was warm, and John left the house."]
QUICK = {"site": SITE, "layer": LAYER, "n_features": 64, "k": 8, "batch_size": 64, "progress": False}


@pytest.fixture(scope="module")
def rows(tiny):
    """Random tokens behind BOS: plenty, and of several lengths."""
    rng = np.random.default_rng(0)
    bos = tiny.tokenizer.bos_token_id
    return [[bos, *rng.integers(0, bos, size=rng.integers(5, 30)).tolist()] for _ in range(400)]


@pytest.fixture(scope="module")
def trained(tiny, rows):
    """An SAE of the tiny model."""
    return saes.train_sae(tiny, tokens=rows, n_tokens=8_000, monitor_every=1000, **QUICK)


@pytest.fixture
def folder(trained, tmp_path):
    """The same, saved."""
    return trained.save(tmp_path / "sae")


def set_config(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_weights(folder, change, passport=True):
    """Change the tensors, and write the passport's hash anew, as if the file had been saved so."""
    from safetensors.torch import load_file, save_file

    state = change(load_file(folder / saes.WEIGHTS))
    save_file(state, folder / saes.WEIGHTS)
    if passport:
        set_config(folder, saes.PASSPORT, weights=saes._file_hash(folder / saes.WEIGHTS))


def by_hand(weight, bias, model, site=SITE, layer=LAYER, b_enc=None):
    """A ReLU SAE with these directions (unit rows) as encoder and decoder."""
    from sae_lens import SAE

    n, d = weight.shape
    inner = SAE.from_dict({"architecture": "standard", "d_in": d, "d_sae": n, "device": "cpu", "dtype": "float32"})
    with torch.no_grad():
        inner.W_dec.copy_(weight)
        inner.W_enc.copy_(weight.T)
        inner.b_dec.copy_(bias)
        if b_enc is not None:
            inner.b_enc.copy_(b_enc)
    info = models.info(model)
    passport = saes.Passport(
        model=saes._model_name(info), site=site, layer=layer, d_model=d, n_features=n, architecture="standard",
        activation="relu", normalisation="none", processing=info.processing, dtype="float32",
    )  # fmt: skip
    return SparseAutoencoder(inner, passport)


# ---------------------------------------------------------------- training


def planted(n=100, d=64, samples=40_000, active=3, seed=0):
    """Activations that are sums of a few of n known unit directions, each as large as it happens to be."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    sizes = (torch.rand(samples, n, generator=generator) + 0.5) * (
        torch.rand(samples, n, generator=generator) < active / n
    )
    return sizes @ directions, directions


def recovered(directions, sae):
    """Share of the planted directions that some feature has at a cosine of at least 0.9."""
    found = torch.nn.functional.normalize(sae.directions, dim=-1)
    return float(((directions @ found.T).max(1).values >= 0.9).float().mean())


@pytest.mark.parametrize(("architecture", "k"), [("topk", 3), ("batchtopk", 3)])
def test_planted_features_are_recovered(architecture, k):
    x, directions = planted()
    settings = {"n_features": 200, "architecture": architecture, "k": k, "batch_size": 512, "progress": False}
    sae = saes.fit_sae(x, n_tokens=400_000, learning_rate=3e-3, **settings)
    assert recovered(directions, sae) >= 0.95
    untrained = saes.fit_sae(x, n_tokens=512, learning_rate=1e-9, **settings)
    assert recovered(directions, untrained) < 0.05
    assert saes._variance_explained(x, sae.decode(sae.encode(x))) > 0.8


def test_the_fast_step_is_saelens_own_step():
    x, _ = planted(samples=6000)
    settings = {"n_features": 160, "k": 4, "batch_size": 128, "n_tokens": 128 * 150, "progress": False, "seed": 3}
    fast, slow = (saes.fit_sae(x, fast=fast, **settings) for fast in (True, False))
    assert float(slow.history.dead_fraction.max()) > 0  # so the auxiliary loss was at work
    torch.testing.assert_close(fast.directions, slow.directions, atol=2e-3, rtol=0)
    torch.testing.assert_close(fast.encode(x[:200]), slow.encode(x[:200]), atol=2e-2, rtol=0)
    np.testing.assert_allclose(fast.history.loss, slow.history.loss, rtol=1e-3)


def test_the_fast_step_has_saelens_gradients():
    # One step of plain gradient descent, so that no optimiser hides a factor.
    x, _ = planted(samples=256)
    gradients = []
    for fast in (True, False):
        settings = {
            "architecture": "topk", "n_features": 96, "k": 5, "n_tokens": 256 * 10, "batch_size": 256, "seed": 1,
            "learning_rate": 1.0, "sparsity": None, "widths": None,
        }  # fmt: skip
        sae = saes._training_sae(settings, x.shape[1], "cpu", {})
        sae.b_dec.data = x.mean(0)
        sae.b_enc.data = torch.linspace(-0.1, 0.1, 96)
        trainer = saes._trainer(sae, iter([x]), settings, "cpu", fast)
        trainer.n_forward_passes_since_fired[:10] = 1e9  # dead
        trainer.optimizer = torch.optim.SGD(sae.parameters(), lr=1.0)
        before = {name: value.detach().clone() for name, value in sae.named_parameters()}
        trainer.step(x)
        gradients.append({name: before[name] - value.detach() for name, value in sae.named_parameters()})
    assert set(gradients[0]) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, value in gradients[1].items():
        assert value.abs().max() > 0
        torch.testing.assert_close(gradients[0][name], value, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("architecture", saes.ARCHITECTURES)
def test_every_architecture_trains_saves_and_loads(architecture, tiny, rows, tmp_path):
    sae = saes.train_sae(tiny, architecture=architecture, tokens=rows, n_tokens=4000, **QUICK)
    about = sae.passport
    assert (about.architecture, about.n_features, about.d_model) == (architecture, 64, 32)
    assert ("jumprelu" in about.activation) == (architecture in ("batchtopk", "jumprelu", "matryoshka"))
    x = row_activations(tiny, rows[:20], SITE, LAYER)
    features = sae.encode(x)
    assert features.shape == (len(x), 64) and (features >= 0).all() and sae.decode(features).shape == x.shape
    again = saes.load_sae(sae.save(tmp_path / "sae"), tiny)
    assert torch.equal(again.encode(x), features) and torch.equal(again.decode(features), sae.decode(features))
    assert again.passport == sae.passport
    assert set(sae.history.data_vars) >= {"l0", "variance_explained", "cross_entropy_recovered", "dead_fraction"}


def test_training_is_decided_by_its_seed_and_leaves_the_global_one_alone(tiny, rows):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (
        saes.train_sae(tiny, tokens=rows, n_tokens=2000, seed=seed, **QUICK).directions for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)


def train_until_killed(monkeypatch, looks, model, **settings):
    """Training that is killed when the monitor looks for the so-many-th time."""
    monitor, calls = saes._monitor, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == looks:
            raise KeyboardInterrupt
        return monitor(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saes, "_monitor", killed)
        saes.train_sae(model, **settings)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(architecture, tiny, rows, tmp_path, monkeypatch):
    settings = QUICK | {"architecture": architecture, "n_tokens": 6000, "buffer_tokens": 1500, "tokens": rows}
    settings |= {"monitor_every": 10, "checkpoint_every": 10}
    whole = saes.train_sae(tiny, **settings)
    train_until_killed(monkeypatch, 6, tiny, folder=tmp_path, **settings)
    assert (tmp_path / "checkpoint.pt").is_file()
    with pytest.raises(ValueError, match="learning_rate"):
        saes.train_sae(tiny, folder=tmp_path, learning_rate=0.5, **settings)
    taken: list[int] = []
    step = saes._trainer

    def counting(*arguments):
        trainer = step(*arguments)
        inner = trainer.step
        trainer.step = lambda batch: (taken.append(1), inner(batch))[1]
        return trainer

    monkeypatch.setattr(saes, "_trainer", counting)
    resumed = saes.train_sae(tiny, folder=tmp_path, **settings)
    assert len(taken) == 6000 // 64 - 50  # the last checkpoint was at step 50
    assert torch.equal(resumed.directions, whole.directions)
    assert resumed.history.equals(whole.history) and resumed.passport == whole.passport
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_goes_on_with_the_same_text_and_weights_only(tiny, tiny_dir, rows, tmp_path, monkeypatch):
    settings = QUICK | {"n_tokens": 3000, "monitor_every": 10, "checkpoint_every": 10, "folder": tmp_path}
    train_until_killed(monkeypatch, 3, tiny, tokens=rows, **settings)
    with pytest.raises(ValueError, match="first rows"):
        saes.train_sae(tiny, tokens=rows[::-1], **settings)
    with pytest.raises(ValueError, match="processing"):
        saes.train_sae(models.load_model(str(tiny_dir), processing="raw"), tokens=rows, **settings)


def test_no_penalty_is_no_penalty(tiny, rows):
    settings = QUICK | {"architecture": "standard", "n_tokens": 3000, "tokens": rows}
    first, second = (saes.train_sae(tiny, **settings, sparsity=sparsity) for sparsity in (0.0, 1e-9))
    torch.testing.assert_close(first.directions, second.directions, atol=1e-4, rtol=1e-3)


def test_saving_leaves_other_files_alone(trained, tmp_path):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    trained.save(tmp_path)
    assert secret.stat().st_mode & 0o777 == 0o600


def test_training_says_nothing_to_wandb(tiny, rows, monkeypatch):
    import wandb

    for name in ("init", "log", "finish"):
        monkeypatch.setattr(wandb, name, lambda *a, **k: pytest.fail("wandb was asked for"))
    saes.train_sae(tiny, tokens=rows, n_tokens=1000, **QUICK)


def test_bad_settings_are_refused_before_anything_is_computed(tiny, rows, monkeypatch):
    monkeypatch.setattr(models, "cache", lambda *a, **k: pytest.fail("the model was run"))
    for changes, words in (
        ({"site": "resid_mid"}, "Unknown site"),
        ({"layer": 2}, "no layer 2"),
        ({"architecture": "gated"}, "Unknown architecture"),
        ({"n_tokens": 10}, "less than one batch"),
        ({"n_features": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            saes.train_sae(tiny, **{"tokens": rows} | QUICK | changes)
    monkeypatch.setattr(saes, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="smaller buffer_tokens"):
        saes.train_sae(tiny, tokens=rows, n_tokens=1000, **QUICK)


def test_a_diverging_run_says_so(tiny, rows):
    with pytest.raises(RuntimeError, match="learning rate"):
        saes.train_sae(
            tiny, tokens=rows, n_tokens=2000, monitor_every=1, learning_rate=1e30, architecture="standard", **QUICK
        )


# ---------------------------------------------------------------- evaluation


def test_a_perfect_sae_changes_nothing(tiny, rows):
    eye = torch.eye(32)
    sae = by_hand(torch.cat([eye, -eye]), torch.zeros(32), tiny)  # x = relu(x) − relu(−x)
    found = saes.evaluate_sae(tiny, sae, rows[:40])
    assert float(found.variance_explained) == pytest.approx(1, abs=1e-6)
    assert float(found.cross_entropy_recovered) == pytest.approx(1, abs=1e-4)
    assert float(found.shrinkage) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(found.l0, 32)
    assert float(found.dead_fraction) == 0 and float(found.density.sum()) == pytest.approx(32)
    np.testing.assert_allclose(found.cross_entropy_sae, found.cross_entropy, atol=1e-4)
    assert found.sizes["prompt"] == 40 and found.attrs["n_tokens"] == sum(len(row) - 1 for row in rows[:40])


def test_an_sae_that_says_nothing_recovers_nothing(tiny, rows):
    sae = by_hand(torch.eye(32), torch.zeros(32), tiny, b_enc=torch.full((32,), -1e6))
    found = saes.evaluate_sae(tiny, sae, rows[:40])
    assert float(found.cross_entropy_recovered) == pytest.approx(0, abs=1e-6)
    assert float(found.dead_fraction) == 1 and float(found.l0.sum()) == 0 and np.isnan(found.shrinkage)
    x = row_activations(tiny, rows[:40], SITE, LAYER).double()
    expected = 1 - float(x.square().sum() / (x - x.mean(0)).square().sum())
    assert float(found.variance_explained) == pytest.approx(expected, abs=1e-6)


def test_shrinkage_is_what_the_encoder_takes_off(tiny, rows):
    eye = torch.eye(32)
    sae = by_hand(torch.cat([eye, -eye]), torch.zeros(32), tiny)
    with torch.no_grad():
        sae.inner.W_enc.mul_(0.7)
    assert float(saes.evaluate_sae(tiny, sae, rows[:20]).shrinkage) == pytest.approx(0.3, abs=1e-5)


def test_cross_entropies_are_those_of_a_plain_run(tiny, rows):
    sae = by_hand(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) / 6, torch.full((32,), 0.1), tiny)
    found = saes.evaluate_sae(tiny, sae, rows[:5])
    x = row_activations(tiny, rows[:5], SITE, LAYER)
    edits = {
        "": lambda a: a, "_sae": lambda a: sae.decode(sae.encode(a)), "_zero": lambda a: 0 * a,
        "_mean": lambda a: x.mean(0).expand_as(a),
    }  # fmt: skip
    for number, row in enumerate(rows[:5]):
        tokens = torch.tensor([row])
        for name, edit in edits.items():

            def hook(activation, hook, edit=edit):
                return torch.cat([activation[:, :1], edit(activation[:, 1:])], 1)  # BOS is left alone

            logits = models.run_with_hooks(tiny, tokens, [(models.hook_name(SITE, LAYER), hook)])
            losses = torch.nn.functional.cross_entropy(logits[0, 1:-1], tokens[0, 2:])
            value = float(found[f"cross_entropy{name}"][number])
            assert value == pytest.approx(float(losses), rel=1e-4), name


def test_documents_packed_in_a_row_give_the_loss_of_each_alone(tiny, trained):
    bos = tiny.tokenizer.bos_token_id
    packed = [bos, 5, 6, 7, bos, 9, 10, 11]
    tokens = torch.tensor([packed])
    losses = torch.nn.functional.cross_entropy(models.run(tiny, tokens)[0, :-1], tokens[0, 1:], reduction="none")
    expected = float(losses[[1, 2, 5, 6]].mean())
    assert float(saes.evaluate_sae(tiny, trained, [packed])["cross_entropy"][0]) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="at least two more tokens"):
        saes.evaluate_sae(tiny, trained, [[bos, 5] * 4])


def test_evaluation_refuses_what_it_cannot_measure(tiny, trained):
    with pytest.raises(ValueError, match="at least two more tokens"):
        saes.evaluate_sae(tiny, trained, [[tiny.tokenizer.bos_token_id, 5]])
    with pytest.raises(ValueError, match="must be BOS"):
        saes.evaluate_sae(tiny, trained, [[5, 6, 7, 8]])


def test_a_site_that_nothing_depends_on_is_refused(tiny, rows):
    """There is no loss to recover: the ratio would be 0 by 0."""
    written = models.W_out(tiny, LAYER), models.b_out(tiny, LAYER)
    before = [each.clone() for each in written]
    try:
        for each in written:
            each.zero_()
        with pytest.raises(NothingChanged, match="change no prediction"):
            saes.train_sae(tiny, tokens=rows, n_tokens=1000, **(QUICK | {"site": "mlp_out"}))
    finally:
        for each, values in zip(written, before, strict=True):
            each.copy_(values)


# ---------------------------------------------------------------- the passport


def test_the_passport_says_where_an_sae_comes_from(trained, tiny, folder):
    about = saes.load_sae(folder, tiny).passport
    assert (about.site, about.layer, about.processing, about.dtype) == (SITE, LAYER, "folded", "float32")
    assert about.corpus == "400 given rows" and about.n_tokens == 8_000 and about.versions["sae-lens"]
    assert about.variance_explained == pytest.approx(saes.probe_fit(tiny, trained), abs=1e-3)
    assert len(about.weights) == 64 and "given rows" in about.table()


def test_the_same_sae_one_layer_off_is_refused(tiny, folder):
    set_config(folder, saes.PASSPORT, layer=1)
    with pytest.raises(WrongSAE, match="layer"):
        saes.load_sae(folder, tiny)  # SAELens' config still says 0
    config = json.loads((folder / saes.CONFIG).read_text())
    config["metadata"]["hook_name"] = "blocks.1.hook_resid_post"
    (folder / saes.CONFIG).write_text(json.dumps(config))
    with pytest.raises(WrongSAE, match="explains .* another layer's"):
        saes.load_sae(folder, tiny)  # nothing in the files gives it away
    (folder / saes.PASSPORT).unlink()
    with pytest.raises(WrongSAE, match="layer 0|should explain at least"):
        saes.load_sae(folder, tiny)  # not even a stored figure to compare with


def test_wrong_places_are_refused(tiny, trained, folder, tmp_path, tiny_dir):
    with pytest.raises(WrongSAE, match="Wrong layer: asked for 1"):
        saes.load_sae(folder, tiny, layer=1)
    with pytest.raises(WrongSAE, match="Wrong site"):
        saes.load_sae(folder, tiny, site="mlp_out")
    with pytest.raises(WrongSAE, match="Wrong processing.*'folded'"):
        saes.load_sae(folder, load_model(str(tiny_dir), processing="raw"))
    with pytest.raises(WrongSAE, match="Wrong dtype.*float32"):
        saes.load_sae(folder, load_model(str(tiny_dir), dtype="bfloat16"))
    with pytest.raises(WrongSAE, match="float64"):
        trained.encode(torch.zeros(2, 32, dtype=torch.float64))
    with pytest.raises(WrongSAE, match=r"\.\.\., 32"):
        trained.encode(torch.zeros(2, 31))


def test_another_model_is_refused_by_name_and_by_numbers(trained, folder, tiny_dir, tiny, rows):
    other = load_model(f"random:{tiny_dir}:5")  # same shape and tokenizer, other weights
    with pytest.raises(WrongSAE, match="Wrong model.*random"):
        saes.load_sae(folder, other)
    set_config(folder, saes.PASSPORT, model=saes._model_name(models.info(other)))
    with pytest.raises(WrongSAE, match="another model's"):
        saes.load_sae(folder, other)
    with pytest.raises(WrongSAE, match="Wrong model"):
        saes.evaluate_sae(other, trained, rows[:5])


def test_a_wrong_width_is_refused(tiny, folder, trained):
    with pytest.raises(WrongSAE, match="Wrong width of mlp_post"):
        replace(trained.passport, site="mlp_post").check(tiny)
    set_config(folder, saes.CONFIG, d_in=48)
    with pytest.raises(BrokenSAE, match="should be .48, 64"):
        saes.load_sae(folder, tiny)


def nan_in(state):
    state["W_dec"][3, 4] = float("nan")
    return state


def test_damaged_files_are_refused(tiny, trained, tmp_path):
    def fresh(name):
        return trained.save(tmp_path / name)

    folder = fresh("nan")
    set_weights(folder, nan_in)
    with pytest.raises(BrokenSAE, match="1 of 2048 numbers in W_dec.*NaN"):
        saes.load_sae(folder, tiny)
    folder = fresh("short")
    (folder / saes.WEIGHTS).write_bytes((folder / saes.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(BrokenSAE, match="cut short"):
        saes.load_sae(folder, tiny)
    folder = fresh("changed")
    set_weights(folder, lambda state: state | {"b_dec": state["b_dec"] + 1}, passport=False)
    with pytest.raises(BrokenSAE, match="not the file that its passport"):
        saes.load_sae(folder, tiny)
    folder = fresh("double")
    set_weights(folder, lambda state: {name: value.double() for name, value in state.items()})
    with pytest.raises(BrokenSAE, match="float64.*float32"):
        saes.load_sae(folder, tiny)
    folder = fresh("half")
    set_weights(folder, lambda state: {name: value.half() for name, value in state.items()})
    with pytest.raises(BrokenSAE, match="says that its weights are float32"):
        saes.load_sae(folder, tiny)
    folder = fresh("missing")
    (folder / saes.WEIGHTS).unlink()
    with pytest.raises(BrokenSAE, match="lacks sae_weights"):
        saes.load_sae(folder, tiny)
    folder = fresh("text")
    (folder / saes.CONFIG).write_text("{")
    with pytest.raises(BrokenSAE, match="no JSON"):
        saes.load_sae(folder, tiny)
    folder = fresh("passport")
    (folder / saes.PASSPORT).write_text('{"model": "tiny"}')
    with pytest.raises(BrokenSAE, match="no passport"):
        saes.load_sae(folder, tiny)
    with pytest.raises(ValueError, match="no SAE 'nothing-like-it'"):
        saes.load_sae("nothing-like-it", tiny)


def test_half_precision_on_disk_is_whole_in_use(trained, tiny, tmp_path):
    folder = trained.save(tmp_path / "half", dtype="float16")
    sae = saes.load_sae(folder, tiny)
    assert sae.directions.dtype == torch.float32
    torch.testing.assert_close(sae.directions, trained.directions, atol=1e-3, rtol=0)
    assert (folder / saes.WEIGHTS).stat().st_size < 0.6 * (2 * 64 * 32 + 96) * 4 + 600


# ---------------------------------------------------------------- releases

RELEASE = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from mi_utils import models, load_model, sae as saes
from mi_utils.sae import WrongSAE, BrokenSAE

model = load_model("gpt2-small")
commit = "57c08bf4de9b1fa42b1b2c0e0b5c7a3f0b2b8f6a"
repository = Path(os.environ["HF_HOME"]) / "hub" / "models--jbloom--GPT2-Small-SAEs-Reformatted"
(repository / "refs").mkdir(parents=True)
(repository / "refs" / "main").write_text(commit)

def release(layer, fitted_to, said=None, width=768, change=None):
    x = saes._probe_activations(model, "resid_pre", [fitted_to])[fitted_to]
    _, _, parts = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    directions = torch.cat([parts, -parts])[:, :width]
    name = f"blocks.{layer}.hook_resid_pre"
    folder = repository / "snapshots" / commit / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {"W_enc": directions.T.contiguous(), "W_dec": directions.contiguous(),
             "b_enc": torch.zeros(len(directions)), "b_dec": x.mean(0)[:width].contiguous()}
    if change:
        change(state)
    save_file(state, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(len(directions))}, folder / "sparsity.safetensors")
    config = {  # the keys of SAELens before 6.0, as the release has them
        "model_name": "gpt2-small", "hook_point": said or name, "hook_point_layer": layer,
        "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext", "context_size": 128, "d_in": width,
        "d_sae": len(directions), "dtype": "torch.float32", "device": "cpu", "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder

def refused(error, words, **where):
    try:
        saes.load_sae("gpt2-small-res-jb", model, **where)
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(f"{words}: loaded")

release(8, 8)
sae = saes.load_sae("gpt2-small-res-jb", model, layer=8)
about = sae.passport
assert (about.model, about.site, about.layer, about.d_model) == ("gpt2-small", "resid_pre", 8, 768), about
assert about.processing == "folded" and about.corpus == "Skylion007/openwebtext" and about.context == 128, about
assert saes.probe_fit(model, sae) > 0.99
refused(ValueError, "not in the hub cache", layer=3)
refused(ValueError, "Choose one of", site="resid_pre")
raw = load_model("gpt2-small", processing="raw")
try:
    saes.load_sae("gpt2-small-res-jb", raw, layer=8)
except WrongSAE as found:
    assert "processing" in str(found)
else:
    raise AssertionError("raw weights")
del raw
release(8, 1)
refused(WrongSAE, "", layer=8)
release(8, 8, said="blocks.7.hook_resid_pre")
refused(WrongSAE, "layer 7", layer=8)
release(8, 8, width=512)
refused(WrongSAE, "width", layer=8)
release(8, 8, change=lambda state: state["W_enc"].fill_(float("nan")))
refused(BrokenSAE, "NaN", layer=8)
folder = release(8, 8)
weights = folder / "sae_weights.safetensors"
weights.write_bytes(weights.read_bytes()[:-1000])
refused(BrokenSAE, "cut short", layer=8)
"""


def test_gpt2_small_res_jb_loads_from_the_hub_cache(hub_cache, tmp_path):
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    for repository in (hub_cache / "hub").iterdir():
        (home / "hub" / repository.name).symlink_to(repository)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", RELEASE], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------- the shipped ones

SHIPPED = saes.shipped_saes()


def test_shipped_saes_are_two_or_more_and_small():
    assert len(SHIPPED) >= 2
    assert sum(file.stat().st_size for file in saes.SHIPPED.rglob("*")) < 10e6


def owner(name: str) -> Any:
    """The model that a shipped SAE is for."""
    return load_model(name.rsplit("-", 2)[0])


@pytest.fixture(scope="module")
def unseen(model):
    """Documents that no SAE was trained on; the seeds share their tokenizer."""
    return token_rows(model, 80_000, seed=41)


def test_every_shipped_sae_has_its_recipe():
    from mi_utils.smallworld.train_saes import SHIPPED_SAES

    assert sorted(SHIPPED_SAES) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sae_is_faithful_sparse_and_alive(name, unseen):
    model = owner(name)
    sae = saes.load_sae(name, model)
    found = saes.evaluate_sae(model, sae, unseen[:150])
    assert float(found.cross_entropy_recovered) >= 0.95 and float(found.cross_entropy_recovered_mean) >= 0.95
    assert found.attrs["l0"] <= 20 and abs(float(found.shrinkage)) < 0.1
    active = sae.encode(row_activations(model, unseen, sae.site, sae.layer)) > 0
    assert float((~active.any(0)).float().mean()) <= 0.05  # on 80,000 tokens


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sae_one_layer_off_is_refused(name):
    model = owner(name)
    sae = saes.load_sae(name, model)
    for layer in (sae.layer - 1, sae.layer + 1):
        if 0 <= layer < models.info(model).shape.n_layers:
            with pytest.raises(WrongSAE, match="explains"):
                SparseAutoencoder(sae.inner, replace(sae.passport, layer=layer)).check_model(model)
