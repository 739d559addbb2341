"""Head reports, on the transformer whose heads we set ourselves and on random ones."""

import io

import handset
import numpy as np
import pytest
import torch

from mi_utils.models import load_model
from mi_utils.naming import NO_NAME, head_report
from mi_utils.prompts import PromptPairs


def save_permuted(directory, seed):
    """The hand-set model with the heads of both layers in another order.

    Returns:
        The directory, and where the previous-token and the induction head are now.
    """
    model = handset.build_handset()
    rng, places = np.random.default_rng(seed), []
    for layer, wanted in ((0, handset.PREVIOUS[1]), (1, handset.INDUCTION[1])):
        order = rng.permutation(handset.N_HEADS)  # new place i holds the old head order[i]
        columns = np.concatenate([np.arange(handset.D_HEAD) + handset.D_HEAD * head for head in order])
        attention = model.transformer.h[layer].attn
        with torch.no_grad():
            fused = attention.c_attn.weight.clone()
            for part in range(3):
                start = part * handset.D_MODEL
                attention.c_attn.weight[:, start : start + handset.D_MODEL] = fused[:, start + columns]
            attention.c_proj.weight.copy_(attention.c_proj.weight.clone()[columns])
        places.append((layer, int(np.flatnonzero(order == wanted)[0])))
    model.save_pretrained(directory)
    handset.build_tokenizer().save_pretrained(directory)
    return str(directory), places


@pytest.mark.parametrize("seed", range(20))
def test_hand_set_heads_are_named_wherever_they_are(tmp_path, seed):
    directory, (previous, induction) = save_permuted(tmp_path, seed)
    model = load_model(directory)
    assert head_report(model, *previous).names == ("previous token",)
    assert head_report(model, *induction).names == ("induction", "copying")
    idle = np.random.default_rng(seed).choice([head for head in range(handset.N_HEADS) if head != previous[1]])
    assert head_report(model, 0, int(idle)).names == (NO_NAME,)


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))


def test_the_evidence_is_that_of_the_induction_head(hand):
    pairs = PromptPairs(hand, **handset.induction_prompts(4))
    report = head_report(hand, *handset.INDUCTION, pairs=pairs)
    assert report["attention: what followed it earlier (induction)"] == pytest.approx(1, abs=1e-3)
    assert report["copying, direct embeddings"] == pytest.approx(1, abs=1e-3)
    assert report["repeated tokens: nats lost"] > 1
    assert report["prompt pairs: share of the effect lost"] == pytest.approx(1, abs=0.4)
    assert [each.kind for each in report.evidence[-2:]] == ["mean ablation"] * 2  # the kind decides what is seen
    others = {each.what: each.others for each in report.evidence}
    assert others["repeated tokens: nats lost"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(KeyError, match="copying, direct"):
        report["warmth"]


def test_the_report_shows_as_text_as_html_and_in_rich(hand):
    from rich.console import Console

    report = head_report(hand, *handset.PREVIOUS)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    for shown in (str(report), report._repr_html_(), console.export_text()):
        assert "previous token" in shown and "attention: the token before" in shown and "1.00" in shown
    assert report.name == "previous token"


def test_an_idle_head_is_said_to_write_nothing(hand):
    report = head_report(hand, 0, 0)
    assert any("writes nothing" in note for note in report.notes)


def test_random_weights_earn_no_names(tmp_path):
    model = load_model(str(handset.save_random(tmp_path)))
    names = [head_report(model, layer, head).names for layer in range(3) for head in range(4)]
    assert sum(each == (NO_NAME,) for each in names) >= 11


def test_rotary_models_get_a_report_without_qk_evidence(architectures):
    report = head_report(architectures["llama"], 1, 2)
    assert not [each for each in report.evidence if each.kind == "QK"]
    assert any("QK" in note for note in report.notes)


def test_heads_that_are_not_there_are_refused(hand):
    with pytest.raises(ValueError, match="no head 5"):
        head_report(hand, 0, 5)
