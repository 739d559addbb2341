"""Path patching, against the graph written out plainly, circuits and the model set by hand."""

import handset
import numpy as np
import pytest
from plain_circuits import PlainGraph, difference, hugging_face, save_llama

from mi_utils import models
from mi_utils.circuits import Circuit
from mi_utils.graph import Graph
from mi_utils.models import load_model
from mi_utils.paths import path_patch
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs(model, **handset.induction_prompts(3, length=6), check=False)


@pytest.fixture(scope="module")
def plain(directory):
    return PlainGraph(hugging_face(directory))


def in_logits(effect):
    """Undo the normalisation: where clean and corrupted lie close together, it magnifies rounding."""
    return effect * (effect.clean - effect.corrupted) + effect.corrupted


SENDERS = ["embed", "L0H1", "mlp L0", "L1H3"]
RECEIVERS = ["L1H2.q", "L2H0.k", "L2H3.v", "mlp L1", "logits"]


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_frozen_paths_are_single_edges(model, pairs, plain, mode):
    effect = path_patch(model, pairs, SENDERS, RECEIVERS, mode=mode, batch_size=7)
    assert effect.dims == ("prompt", "sender", "receiver") and effect.attrs["elements_changed"] > 0
    clean, corrupted = plain.both(pairs)
    tokens, source = (pairs.corrupted_tokens, clean) if mode == "denoising" else (pairs.clean_tokens, corrupted)
    for sender in SENDERS:
        for receiver in RECEIVERS:

            def carry(s, r, outputs, edge=(sender, receiver)):
                return source[s] if (s, r) == edge else outputs[s]

            expected = difference(pairs, plain.run(tokens, carry=carry)[0]).detach()
            found = in_logits(effect.sel(sender=sender, receiver=receiver))
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"{sender} -> {receiver}")


@pytest.mark.parametrize("receiver", ["L2H0.k", "mlp L2", "logits"])
@pytest.mark.parametrize("sender", ["embed", "L0H1", "mlp L0"])
def test_mlps_may_answer(model, pairs, plain, sender, receiver):
    effect = path_patch(model, pairs, [sender], [receiver], mlps="run", mode="noising")
    clean, corrupted = plain.both(pairs)
    held = {name: value for name, value in clean.items() if "H" in name} | {sender: corrupted[sender]}
    first = plain.run(pairs.clean_tokens, replace=held)
    if receiver == "logits":
        expected = first[0]
    else:
        heard = first[1]
        expected = plain.run(pairs.clean_tokens, carry=lambda s, r, outputs: heard[s] if r == receiver else outputs[s])[
            0
        ]
    found = in_logits(effect[:, 0, 0])
    np.testing.assert_allclose(found, difference(pairs, expected).detach(), atol=1e-4)
    if sender != "embed":  # the last token is the same in both prompts: its MLPs hear nothing of the embeddings
        frozen = in_logits(path_patch(model, pairs, [sender], [receiver], mode="noising")[:, 0, 0])
        assert np.abs(frozen - found).max() > 1e-3


def test_sets_are_patched_together(model, pairs, plain):
    senders, receivers = {"first": ["L0H0", "L0H3"]}, {"keys": ["L1H0.k", "L2H1.k"]}
    effect = path_patch(model, pairs, senders, receivers)
    clean, _ = plain.both(pairs)

    def first(s, r, outputs):
        return clean[s] if s in senders["first"] and r in receivers["keys"] else outputs[s]

    # The second receiver must not hear the first: it reads what it would read with all heads frozen.
    _, base, _ = plain.run(pairs.corrupted_tokens)
    heard = base | {name: clean[name] for name in senders["first"]}
    logits = plain.run(
        pairs.corrupted_tokens, carry=lambda s, r, outputs: heard[s] if r in receivers["keys"] else outputs[s]
    )[0]
    np.testing.assert_allclose(in_logits(effect[:, 0, 0]), difference(pairs, logits).detach(), atol=1e-4)
    assert effect.sender.values.tolist() == ["first"] and effect.receiver.values.tolist() == ["keys"]


def test_a_noised_path_is_a_circuit_without_that_edge(model, pairs):
    effect = path_patch(model, pairs, ["L0H1", "mlp L1"], ["L2H0.q"], mode="noising")
    for sender in effect.sender.values:
        circuit = Circuit.full(Graph.of(model)).without(f"{sender} -> L2H0.q")
        cut = circuit.faithfulness(model, pairs)
        np.testing.assert_allclose(in_logits(effect.sel(sender=sender, receiver="L2H0.q")), cut.raw, atol=1e-4)


def test_the_path_set_by_hand(known):
    model, pairs = known
    heads = [f"L0H{head}" for head in range(5)]
    receivers = [f"L1H3.{channel}" for channel in "qkv"] + ["logits"]
    effect = path_patch(model, pairs, [*heads, "L1H3"], receivers).mean("prompt")
    assert float(effect.sel(sender="L0H2", receiver="L1H3.k")) == pytest.approx(1, abs=1e-3)
    assert float(effect.sel(sender="L1H3", receiver="logits")) == pytest.approx(1, abs=1e-3)
    assert float(np.abs(effect).sum()) == pytest.approx(2, abs=1e-2)  # and nothing else does anything


def test_what_comes_before_the_sender_hears_nothing(model, pairs):
    effect = path_patch(model, pairs, ["L0H0", "L1H0"], ["L0H1.q", "L1H1.q", "mlp L1"])
    assert effect.attrs["skipped_cells"] == 3 * 3
    np.testing.assert_array_equal(effect.sel(sender="L1H0", receiver=["L0H1.q", "L1H1.q"]), 0)
    with pytest.raises(NothingChanged, match="no path"):
        path_patch(model, pairs, ["L1H0"], ["L1H1.q"])


def test_grouped_attention_and_rotary_positions(tmp_path):
    model = load_model(save_llama(tmp_path, n_kv_heads=2))
    pairs = PromptPairs(model, **handset.induction_prompts(2, length=6), check=False)
    everything = [
        "embed",
        *(f"L0H{head}" for head in range(4)),
        "mlp L0",
        *(f"L1H{head}" for head in range(4)),
        "mlp L1",
    ]
    effect = path_patch(model, pairs, {"everything": everything}, ["logits", "L1H1.k"])
    np.testing.assert_allclose(in_logits(effect.sel(receiver="logits"))[:, 0], effect.clean, atol=1e-4)
    assert np.abs(in_logits(effect.sel(receiver="L1H1.k"))[:, 0] - effect.corrupted).max() > 1e-3
    with pytest.raises(ValueError, match="L1H2.k"):
        path_patch(model, pairs, ["embed"], ["L1H2.k"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["L9H0"], ["logits"]), {}, "L9H0"),
        ((["L0H0"], ["L2H9.q"]), {}, "L2H9"),
        ((["head 3"], ["logits"]), {}, "names no part"),
        ((["logits"], ["logits"]), {}, "cannot send"),
        ((["L0H0.q"], ["logits"]), {}, "cannot send"),
        ((["L0H0"], ["L1H0"]), {}, "cannot receive"),
        ((["L0H0"], ["embed"]), {}, "cannot receive"),
        (([], ["logits"]), {}, "No senders"),
        ((["L0H0"], {"none": []}), {}, "No receivers"),
        ((["L0H0"], {"both": ["L1H0.q", "logits"]}), {}, "set of their own"),
        ((["L0H0"],), {"mlps": "on"}, "mlps"),
        ((["L0H0"],), {"mode": "swap"}, "mode"),
        ((["L0H0"],), {"metric": "nonsense"}, "metric"),
        ((["L0H0"],), {"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(model, pairs, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        path_patch(model, pairs, *arguments, **options)


def test_no_hooks_are_left(model, pairs):
    path_patch(model, pairs, ["L0H0"], ["L1H0.q"])
    with pytest.raises(NothingChanged):
        same = pairs[[0]]
        same.corrupted_tokens = same.clean_tokens
        path_patch(model, same, ["L0H0"])
    assert not any(point.fwd_hooks for point in model.mi_hook_points.values())
    assert not models.run(model, pairs.clean_tokens).requires_grad
