"""OV and QK circuits, against dense matrices, against hooked activations and against weights we set ourselves."""

import handset
import numpy as np
import pytest
import torch

from mi_utils import models, ov_qk
from mi_utils.models import load_model


@pytest.fixture(scope="module", params=["folded", "raw"])
def model(directory, request):
    return load_model(directory, processing=request.param)


@pytest.fixture(scope="module")
def tokens(model):
    return models.to_tokens(model, handset.induction_prompts(3)["clean"])


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))


def dense_positivity(matrix):
    eigenvalues = np.linalg.eigvals(matrix.double().numpy())
    return float(eigenvalues.sum().real / np.abs(eigenvalues).sum())


# ------------------------------------------------------------------------------------------------------------ factors


def scaled(model, layer, tokens):
    """The stream over LayerNorm's scale, not centred: centring is the factors' business."""
    stream = models.cache(model, tokens, ["resid_pre"], layers=[layer])["resid_pre", layer]
    norm = models.attention_norm(model, layer)
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    return stream / (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_head_reads_what_the_factors_say(model, tokens, which, layer):
    weight, bias = ov_qk.read_weights(model, layer, which)
    hooked = models.cache(model, tokens, [which], layers=[layer])[which, layer]
    read = torch.einsum("pim,hmd->pihd", scaled(model, layer, tokens), weight) + bias
    torch.testing.assert_close(read, hooked, atol=1e-4, rtol=0)


def test_factors_give_the_hooked_output_of_a_head(model, tokens):
    layer, head = 1, 2
    cached = models.cache(model, tokens, ["z", "pattern"], layers=[layer])
    written = cached["z", layer][:, :, head] @ models.W_O(model, layer)[head]
    w_v, w_o = (factor[head] for factor in ov_qk.ov_factors(model, layer))
    bias = ov_qk.read_weights(model, layer, "v")[1][head] @ w_o
    moved = cached["pattern", layer][:, head] @ (scaled(model, layer, tokens) @ w_v @ w_o)
    torch.testing.assert_close(moved + bias, written, atol=1e-4, rtol=0)


def test_grouped_heads_read_the_values_that_they_share(architectures):
    for model in architectures.values():
        tokens = models.to_tokens(model, ["When Mary and John went to the store"])
        weight, bias = ov_qk.read_weights(model, 1, "v")
        hooked = models.cache(model, tokens, ["v"], layers=[1])["v", 1]
        read = torch.einsum("pim,hmd->pihd", scaled(model, 1, tokens), weight) + bias
        shared = weight.shape[0] // hooked.shape[2]
        torch.testing.assert_close(read, hooked.repeat_interleave(shared, 2), atol=1e-4, rtol=0)


def test_rotary_models_have_no_qk_circuit_but_an_ov_circuit(architectures):
    for model in architectures.values():
        for call in (
            lambda model=model: ov_qk.qk_factors(model, 0),
            lambda model=model: ov_qk.weight_scores(model),
            lambda model=model: ov_qk.matching_scores(model),
            lambda model=model: ov_qk.composition_scores(model, "k"),
            lambda model=model: ov_qk.score_parts(model, torch.zeros(1, 3, dtype=torch.long), 0, 0),
        ):
            with pytest.raises(ov_qk.NotInTheWeights, match="rotary"):
                call()
        assert abs(ov_qk.copying_scores(model)).max() <= 1
        assert ov_qk.composition_scores(model, "v").notnull().any()


# ----------------------------------------------------------------------------------------------------------------- OV


@pytest.mark.parametrize("embedding", ov_qk.EMBEDDINGS)
def test_copying_scores_are_those_of_the_dense_matrix(model, embedding):
    scores = ov_qk.copying_scores(model, embedding=embedding)
    norm = models.final_norm(model)
    read_out = torch.diag(norm.weight) @ models.W_U(model)
    read_out = read_out - read_out.mean(0)
    seen = ov_qk.token_vectors(model, embedding=embedding)
    for layer, head in ((0, 0), (2, 3)):
        w_v, w_o = (factor[head] for factor in ov_qk.ov_factors(model, layer))
        dense = seen @ w_v @ w_o @ read_out
        assert dense.shape == (62, 62)
        assert float(scores[layer, head]) == pytest.approx(dense_positivity(dense), abs=1e-4)


def test_copying_scores_of_chosen_tokens_are_those_of_the_circuit_between_them(model):
    chosen = [3, 9, 17, 21, 40, 50, 55, 58, 60, 61]
    scores = ov_qk.copying_scores(model, tokens=chosen)
    seen, out = ov_qk.token_vectors(model, chosen), ov_qk._unembedding(model, chosen)
    w_v, w_o = (factor[1] for factor in ov_qk.ov_factors(model, 1))
    assert float(scores[1, 1]) == pytest.approx(dense_positivity(seen @ w_v @ w_o @ out), abs=1e-4)


def test_scores_do_not_depend_on_processing(directory):
    folded, raw = (load_model(directory, processing=processing) for processing in ("folded", "raw"))
    # Folding also takes the vocabulary's mean out of the unembedding, which moves the copying scores a little.
    np.testing.assert_allclose(ov_qk.copying_scores(folded), ov_qk.copying_scores(raw), atol=0.05)
    parts = [ov_qk.position_pattern(each, 0) for each in (folded, raw)]
    np.testing.assert_allclose(*parts, atol=1e-3)


def test_the_ov_circuit_is_what_a_head_adds_to_the_logits(model):
    """Attending to a position that holds a token alone: LayerNorm, values, output, read out without the last scale."""
    tokens, outputs = [4, 30, 12], [7, 12]
    circuit = ov_qk.ov_circuit(model, 1, 2, tokens, outputs)
    assert circuit.dims == ("source", "output") and circuit.shape == (3, 2)
    stream = models.W_E(model)[tokens]
    normalised = model.blocks[1].ln1(stream[None])[0]
    bias = models.attention_bias(model, 1, "v")[2] + models.attention_norm(model, 1).bias @ models.W_V(model, 1)[2]
    values = normalised @ models.W_V(model, 1)[2] + models.attention_bias(model, 1, "v")[2] - bias
    written = values @ models.W_O(model, 1)[2]
    read = (written - written.mean(-1, keepdim=True)) * models.final_norm(model).weight
    expected = read @ models.W_U(model)[:, outputs]
    np.testing.assert_allclose(circuit, expected, atol=1e-4)


def test_effective_embeddings_are_the_stream_after_the_first_mlp(directory):
    """On a model whose first attention writes nothing there is a run to compare with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        hf.transformer.h[0].attn.c_proj.weight.zero_()
        hf.transformer.h[0].attn.c_proj.bias.zero_()
        hf.transformer.wpe.weight.zero_()
    quiet = f"{directory}-quiet"
    hf.save_pretrained(quiet)
    AutoTokenizer.from_pretrained(directory).save_pretrained(quiet)
    model = load_model(quiet, processing="raw")
    tokens = torch.tensor([[0, 5, 9, 33]])
    stream = models.cache(model, tokens, ["resid_post"], layers=[0])["resid_post", 0][0]
    torch.testing.assert_close(ov_qk.token_vectors(model, tokens[0], "effective"), stream, atol=1e-5, rtol=0)


def test_hand_set_heads_copy_and_match_as_they_were_set(hand):
    copying = ov_qk.copying_scores(hand)
    assert float(copying[handset.INDUCTION]) == pytest.approx(1, abs=1e-4)
    others = copying.values.copy()
    others[handset.INDUCTION] = 0
    assert np.abs(others).max() < 1e-6, "the other heads write nothing that the unembedding reads"
    weights = ov_qk.weight_scores(hand)
    assert weights.attrs["previous_token_head"] == "L{}H{}".format(*handset.PREVIOUS)
    assert float(weights.previous_token[handset.PREVIOUS]) > 0.99
    assert float(weights.induction[handset.INDUCTION]) == pytest.approx(1, abs=1e-3)
    assert abs(float(weights.duplicate_token[handset.INDUCTION])) < 1e-4, "it seeks a predecessor, not the token"


# -------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("kind", ov_qk.COMPOSITIONS)
def test_composition_is_the_dense_ratio_of_norms(model, kind):
    scores = ov_qk.composition_scores(model, kind)
    w_v, w_o = (factor[1] for factor in ov_qk.ov_factors(model, 0))
    first = w_v @ w_o
    if kind == "v":
        left, right = (factor[3] for factor in ov_qk.ov_factors(model, 2))
        second = left @ right
    else:
        q, k = (factor[3] for factor in ov_qk.qk_factors(model, 2))
        second = q @ k.T if kind == "q" else k @ q.T
    expected = (first @ second).norm() / first.norm() / second.norm()
    assert float(scores.sel(writer="L0H1", reader="L2H3")) == pytest.approx(float(expected), abs=1e-5)
    assert np.isnan(scores.sel(writer="L2H3", reader="L0H1")) and np.isnan(scores.sel(writer="L1H0", reader="L1H1"))


def test_random_matrices_compose_as_the_law_says(model):
    """Squared scores of random products average 1 / d_model."""
    scores = ov_qk.composition_scores(model, "v", n_random=300)
    mean, spread = scores.attrs["baseline"], scores.attrs["baseline_sd"]
    assert mean**2 + spread**2 == pytest.approx(1 / models.info(model).shape.d_model, rel=0.05)


def test_the_hand_set_heads_compose_by_keys(hand):
    previous, induction = ("L{}H{}".format(*place) for place in (handset.PREVIOUS, handset.INDUCTION))
    keys, queries = (ov_qk.composition_scores(hand, kind) for kind in ("k", "q"))
    assert float(keys.sel(writer=previous, reader=induction)) > 2 * keys.attrs["baseline"]
    assert float(queries.sel(writer=previous, reader=induction)) < 1e-3
    assert float(keys.fillna(0).sum()) == pytest.approx(float(keys.sel(writer=previous, reader=induction)))


# ----------------------------------------------------------------------------------------------------------------- QK


@pytest.mark.parametrize("by", ov_qk.PARTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_parts_of_the_scores_sum_to_the_hooked_scores(model, tokens, by, layer):
    parts = ov_qk.score_parts(model, tokens, layer, 1, by=by)
    hooked = models.cache(model, tokens, ["attn_scores"], layers=[layer])["attn_scores", layer][:, 1]
    total = parts.sum(["query_part", "key_part"]).values
    seen = np.tril(np.ones(total.shape[1:])) > 0
    np.testing.assert_allclose(total[:, seen], hooked.numpy()[:, seen], atol=1e-4)


def test_matching_scores_are_those_of_the_dense_matrix(model):
    q, k = (factor[1] for factor in ov_qk.qk_factors(model, 2))
    seen = ov_qk.token_vectors(model)
    assert float(ov_qk.matching_scores(model)[2, 1]) == pytest.approx(
        dense_positivity(seen @ q @ k.T @ seen.T), abs=1e-4
    )
    w_v, w_o = (factor[3] for factor in ov_qk.ov_factors(model, 0))
    through = ov_qk.matching_scores(model, through=(0, 3))
    expected = dense_positivity(seen @ q @ k.T @ (seen @ w_v @ w_o).T)
    assert float(through[2, 1]) == pytest.approx(expected, abs=1e-4)
    assert np.isnan(through[0]).all()


def test_the_first_layer_reads_tokens_alone(model):
    direct, effective = (ov_qk.matching_scores(model, embedding=which) for which in ("direct", "effective"))
    np.testing.assert_allclose(effective[0], direct[0], atol=1e-5)
    assert np.abs(effective[1:] - direct[1:]).max() > 1e-3


@pytest.mark.parametrize("kind", ["GPTNeo", "GPT2"])
def test_scores_have_the_scale_of_the_model(kind, tmp_path):
    """GPT-Neo does not divide by √d_head; a GPT-2 may divide by the layer's number, too."""
    import transformers
    from conftest import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "initializer_range": 0.3}
    more = {
        "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
                   "max_position_embeddings": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **more[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokens = load_model(str(tmp_path)), torch.tensor([[tokenizer.bos_token_id, 5, 9, 33, 7]])
    for layer in (0, 1):
        total = ov_qk.score_parts(model, tokens, layer, 1).sum(["query_part", "key_part"]).values
        hidden = np.triu(np.ones(total.shape[1:]), 1) > 0
        found = torch.from_numpy(np.where(hidden, -np.inf, total)).softmax(-1)
        seen = models.cache(model, tokens, ["pattern"], layers=[layer])["pattern", layer][:, 1]
        np.testing.assert_allclose(found, seen, atol=1e-5)


def test_the_pattern_of_positions_is_exact_where_all_tokens_are_alike(directory):
    """A vocabulary of one embedding: the average token is every token, and the first layer sees nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        hf.transformer.wte.weight.copy_(hf.transformer.wte.weight[3].expand_as(hf.transformer.wte.weight))
    alike = f"{directory}-alike"
    hf.save_pretrained(alike)
    AutoTokenizer.from_pretrained(directory).save_pretrained(alike)
    model = load_model(alike)
    seen = models.cache(model, torch.tensor([[0, 5, 9, 33, 7]]), ["pattern"], layers=[0])["pattern", 0][0]
    np.testing.assert_allclose(ov_qk.position_pattern(model, 0, n=5)[0], seen, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ov_qk.ov_circuit(m, 9, 0, [1]), "no layer 9"),
        (lambda m: ov_qk.ov_circuit(m, 0, 9, [1]), "no head 9"),
        (lambda m: ov_qk.ov_circuit(m, 0, 0, [99]), "outside the vocabulary"),
        (lambda m: ov_qk.ov_circuit(m, 0, 0, []), "at least one"),
        (lambda m: ov_qk.copying_scores(m, embedding="plain"), "direct or effective"),
        (lambda m: ov_qk.composition_scores(m, "o"), "compose by"),
        (lambda m: ov_qk.read_weights(m, 0, "z"), "not 'z'"),
        (lambda m: ov_qk.position_pattern(m, 0, n=500), "it has|has 64"),
        (lambda m: ov_qk.score_parts(m, torch.zeros(1, 2, dtype=torch.long), 0, 0, by="neuron"), "component, head"),
    ],
)
def test_what_is_not_there_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
