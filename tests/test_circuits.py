"""Scores of edges and circuits as run, against the graph written out plainly and against weights we set ourselves."""

import handset
import numpy as np
import pytest
import torch
from plain_circuits import PlainGraph, hugging_face, save_llama

from mi_utils import models
from mi_utils.circuits import Circuit, faithfulness_curve, nested_circuits, smallest_circuit
from mi_utils.edges import eap, eap_ig
from mi_utils.graph import CannotDecompose, Graph
from mi_utils.models import load_model
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged
from mi_utils.smallworld.handset import CHANGES, PLANTED
from mi_utils.stats import pooled_effect


@pytest.fixture(scope="module", params=["folded", "raw"])
def model(directory, request):
    return load_model(directory, processing=request.param)


@pytest.fixture(scope="module")
def pairs(model):
    return PromptPairs(model, **handset.induction_prompts(3, length=6), check=False)


@pytest.fixture(scope="module")
def plain(directory):
    return PlainGraph(hugging_face(directory))


KNOWN_EDGES = {"embed -> L0H2.v", "L0H2 -> L1H3.k", "L1H3 -> logits"}


# ------------------------------------------------------------------------------------------------------- the graph


def test_gpt2_small_has_the_published_number_of_edges():
    graph = Graph(12, 12)
    assert len(graph.edges) == len(set(graph.edges)) == 32_491
    assert len(graph.senders) == 1 + 12 * 13 and len(graph.nodes) == 158


def test_graph_is_the_plain_one(model, plain):
    graph = Graph.of(model)
    assert {f"{sender} -> {receiver}" for sender, receiver in plain.edges()} == set(graph.edges)
    ends = zip(graph.edge_sender, graph.edge_receiver, strict=True)
    assert list(graph.edges) == [f"{graph.senders[s]} -> {graph.receivers[r]}" for s, r in ends]


# -------------------------------------------------------------------------------------------------------- scores


def assert_scores(scores, expected):
    """Every edge on every prompt, to 1e-5 of the largest."""
    found = {edge: scores.sel(edge=edge).values for edge in scores.edge.values.tolist()}
    expected = {f"{s} -> {r}": value.numpy() for (s, r), value in expected.items()}
    scale = max(np.abs(value).max() for value in expected.values())
    assert found.keys() == expected.keys() and scale > 0.1
    for edge, value in expected.items():
        np.testing.assert_allclose(found[edge], value, atol=1e-5 * scale, err_msg=edge)


def embeddings(plain, pairs):
    clean, corrupted = plain.both(pairs)
    return clean["embed"], corrupted["embed"]


@pytest.mark.parametrize("at", ["clean", "corrupted"])
def test_eap_is_the_published_algorithm(model, pairs, plain, at):
    clean, corrupted = embeddings(plain, pairs)
    scores = eap(model, pairs, at=at, batch_size=2)
    assert_scores(scores, plain.scores(pairs, clean if at == "clean" else corrupted))
    assert scores.dims == ("prompt", "edge") and scores.attrs["elements_changed"] > 0


def average(parts):
    return {edge: sum(part[edge] for part in parts) / len(parts) for edge in parts[0]}


@pytest.mark.parametrize(("rule", "points"), [("left", (0, 1 / 3, 2 / 3)), ("midpoint", (1 / 6, 1 / 2, 5 / 6)),
                                              ("right", (1 / 3, 2 / 3, 1))])  # fmt: skip
def test_eap_ig_is_the_published_algorithm(model, pairs, plain, rule, points):
    clean, corrupted = embeddings(plain, pairs)
    parts = [plain.scores(pairs, corrupted + point * (clean - corrupted)) for point in points]
    assert_scores(eap_ig(model, pairs, steps=3, rule=rule, batch_size=2), average(parts))


def test_activations_variant_moves_one_layers_senders_at_a_time(model, pairs, plain):
    clean, corrupted = plain.both(pairs)
    groups = [["embed"]]
    for layer in range(plain.n_layers):
        groups += [[f"L{layer}H{head}" for head in range(plain.n_heads)], [f"mlp L{layer}"]]
    expected = {}
    for group in groups:
        parts = []
        for point in (0.25, 0.75):
            moved = {node: corrupted[node] + point * (clean[node] - corrupted[node]) for node in group}
            parts.append(plain.scores(pairs, clean["embed"], senders=group, replace=moved))
        expected |= average(parts)
    assert_scores(eap_ig(model, pairs, steps=2, variant="activations"), expected)


@pytest.mark.parametrize("score", [eap, eap_ig, lambda *a, **k: eap_ig(*a, variant="activations", steps=2, **k)])
def test_a_senders_edges_sum_to_its_node_score(model, pairs, score):
    edges, nodes = score(model, pairs), score(model, pairs, level="node")
    summed = edges.groupby("sender").sum().sel(sender=nodes.node.values)
    np.testing.assert_allclose(summed, nodes, atol=1e-5 * float(np.abs(edges).max()) + 1e-6)


def test_integrated_gradients_add_up_to_the_difference(model, pairs):
    gaps = []
    for steps in (4, 64):
        scores = eap_ig(model, pairs, steps=steps)
        total = scores[:, (scores.sender == "embed").values].sum("edge")
        gaps.append(float(np.abs(total - (scores.clean - scores.corrupted)).max()))
    assert gaps[1] < 0.02 and gaps[1] < gaps[0]


def save_linear(directory):
    """A GPT-2 that is linear in its embeddings: uniform attention, no MLPs, LayerNorms that divide by a constant."""
    from transformers import GPT2LMHeadModel

    handset.save_random(directory)
    model = GPT2LMHeadModel.from_pretrained(directory)
    model.config.layer_norm_epsilon = 1e6
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : 2 * model.config.n_embd] = 0
            block.mlp.c_proj.weight.zero_()
            block.ln_1.weight *= 1e3
        model.transformer.ln_f.weight *= 1e3
    model.save_pretrained(directory)
    return directory


def test_eap_is_exact_where_the_model_is_linear(tmp_path):
    directory = str(save_linear(tmp_path))
    model, plain = load_model(directory), PlainGraph(hugging_face(directory))
    pairs = PromptPairs(model, **handset.induction_prompts(2, length=6), check=False)
    scores = eap(model, pairs)
    every = set(plain.edges())
    corrupted = plain.both(pairs)[1]
    whole = plain.circuit(pairs, every, corrupted)
    rng = np.random.default_rng(0)
    strong = scores.edge.values[np.argsort(-np.abs(scores.values).max(0))][:20].tolist()
    for edge in {*strong, *rng.choice(scores.edge.values, 10).tolist()}:
        cut = plain.circuit(pairs, every - {tuple(edge.split(" -> "))}, corrupted)
        np.testing.assert_allclose(scores.sel(edge=edge), whole - cut, atol=2e-4 * float(np.abs(scores).max()))


def test_eap_ig_recovers_the_circuit_set_by_hand(known):
    model, pairs = known
    scores = np.abs(eap_ig(model, pairs, steps=15).mean("prompt"))
    order = np.argsort(-scores.values)
    assert set(scores.edge.values[order[:3]]) == KNOWN_EDGES
    # On the way between the runs the embeddings shrink, so that LayerNorm lets the induction head's v move a little.
    assert float(scores[order[3]]) < 0.1 * float(scores[order[2]])


def test_eap_misses_it_because_attention_is_saturated(known):
    """The reason for integrated gradients: at either end of the line the softmax hardly moves."""
    model, pairs = known
    scores = eap(model, pairs).mean("prompt")
    assert abs(float(scores.sel(edge="L0H2 -> L1H3.k"))) < 1e-2 < float(scores.sel(edge="L1H3 -> logits"))


# ------------------------------------------------------------------------------------------------ circuits as run


def tuples(edges):
    return {tuple(edge.split(" -> ")) for edge in edges}


@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_a_circuit_runs_as_it_is_drawn(model, pairs, plain, ablation):
    graph, rng = Graph.of(model), np.random.default_rng(1)
    clean, corrupted = plain.both(pairs)
    base = corrupted if ablation == "corrupted" else {name: x.mean(0, keepdim=True) for name, x in clean.items()}
    for share in (0.05, 0.5, 0.9):
        chosen = [edge for edge in graph.edges if rng.random() < share]
        result = Circuit(graph, tuple(chosen)).faithfulness(model, pairs, ablation=ablation, batch_size=2)
        expected = plain.circuit(pairs, tuples(chosen), base)
        np.testing.assert_allclose(result.raw, expected, atol=1e-4)
        scale = result.clean - result.corrupted
        np.testing.assert_allclose(result * scale + result.corrupted, expected, atol=1e-4)


@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_all_edges_are_the_model_and_none_the_other_run(model, pairs, ablation):
    graph = Graph.of(model)
    whole, empty = Circuit.full(graph), Circuit(graph, ())
    result = faithfulness_curve(model, pairs, [whole, empty], ablation=ablation)
    np.testing.assert_allclose(result.raw[:, 0], pairs.clean_logit_diff, atol=1e-4)
    np.testing.assert_allclose(result[:, 0], 1, atol=1e-3)
    np.testing.assert_array_equal(result[:, 1], 0)
    if ablation == "corrupted":
        np.testing.assert_allclose(result.raw[:, 1], pairs.corrupted_logit_diff, atol=1e-4)


def test_pruning_changes_nothing_but_the_number_of_edges(model, pairs):
    graph, rng = Graph.of(model), np.random.default_rng(0)
    loose = Circuit(graph, ("embed -> logits", *rng.choice(graph.edges, 50, replace=False).tolist()))
    tight = loose.pruned()
    assert len(loose) > len(tight) > 0 and set(tight.edges) < set(loose.edges)
    a, b = (circuit.faithfulness(model, pairs).raw for circuit in (loose, tight))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_pruning_keeps_paths_from_the_embeddings_to_the_logits():
    graph = Graph(2, 2)
    path = ("embed -> L0H1.v", "L0H1 -> L1H0.q", "L1H0 -> mlp L1", "mlp L1 -> logits")
    dangling = ("L0H0 -> L1H0.k", "embed -> L1H1.q", "L0H0 -> logits")
    assert set(Circuit(graph, path + dangling).pruned().edges) == set(path)
    assert Circuit(graph, dangling).pruned().edges == ()


def test_the_circuit_set_by_hand_is_faithful_minimal_and_complete(known):
    model, pairs = known
    circuit = Circuit.from_scores(eap_ig(model, pairs, steps=15), 3)
    assert set(circuit.edges) == KNOWN_EDGES and circuit.nodes == ("embed", "L0H2", "L1H3", "logits")
    assert float(pooled_effect(circuit.faithfulness(model, pairs))) == pytest.approx(1, abs=1e-3)
    lost = circuit.minimality(model, pairs, by="edge")
    assert lost.dims == ("prompt", "context", "part") and lost.part.size == 3
    np.testing.assert_allclose(lost, 1, atol=1e-3)
    gap = circuit.completeness(model, pairs)["gap"]
    np.testing.assert_allclose(gap, 0, atol=1e-3)
    for seed in range(3):
        twin = circuit.random_twin(seed)
        assert len(twin) == 3
        assert float(pooled_effect(twin.faithfulness(model, pairs))) < 0.1


@pytest.mark.parametrize("changed", CHANGES)
def test_each_change_finds_the_edges_that_were_planted_for_it_and_no_others(changed):
    model = load_model("handset")
    found, sized = (PromptPairs(model, **handset.induction_prompts(6, seed=seed, changed=changed)) for seed in (0, 1))
    circuit = smallest_circuit(model, sized, eap_ig(model, found), range(1, 30))
    assert set(circuit.edges) == set(PLANTED[changed])


def test_the_smallest_circuit_is_the_first_size_that_is_faithful(known):
    model, pairs = known
    scores = eap_ig(model, pairs)
    assert len(smallest_circuit(model, pairs, scores, [40, 3, 2])) == 3
    kept = faithfulness_curve(model, pairs, [smallest_circuit(model, pairs, scores, [20, 10])])
    assert abs(float(pooled_effect(kept)[0]) - 1) <= 0.05
    with pytest.raises(ValueError, match="2 edges|0 edges"):
        smallest_circuit(model, pairs, scores, [1, 2])


def test_jaccard_counts_shared_edges(model):
    edges = Graph.of(model).edges
    first, second = Circuit(Graph.of(model), edges[:6]), Circuit(Graph.of(model), edges[3:9])
    assert first.jaccard(second) == second.jaccard(first) == pytest.approx(3 / 9)
    assert first.jaccard(first) == 1 and first.jaccard(Circuit(Graph.of(model), edges[6:9])) == 0
    with pytest.raises(ValueError, match="different shapes"):
        first.jaccard(Circuit(Graph(9, 2), ("embed -> logits",)))
    with pytest.raises(ValueError, match="empty"):
        Circuit(Graph.of(model), ()).jaccard(Circuit(Graph.of(model), ()))


def test_minimality_in_a_context_and_completeness_of_a_part(model, pairs):
    """A circuit that lacks half of the model is not complete; what is out already costs nothing more."""
    graph = Graph.of(model)
    circuit = Circuit.from_nodes(graph, [node for node in graph.nodes if "L1" not in node])
    lost = circuit.minimality(model, pairs, contexts=[(), ("L0H0",)])
    assert np.abs(lost.sel(part="L0H0").isel(context=0)).max() > 1e-3
    np.testing.assert_allclose(lost.sel(part="L0H0").isel(context=1), 0, atol=1e-6)
    report = circuit.completeness(model, pairs, n_random=2)
    assert report.sizes == {"prompt": 3, "subset": len(circuit.nodes) - 2 + 2}
    np.testing.assert_allclose(report["gap"], report["model"] - report["circuit"])
    assert np.abs(report["gap"]).max() > 0.05


def test_random_twins_are_connected_and_of_the_same_size(model, pairs):
    graph = Graph.of(model)
    for n, seed in [(1, 0), (2, 1), (17, 2), (200, 3), (len(graph.edges), 4)]:
        circuit = Circuit(graph, graph.edges[:n])
        twin = circuit.random_twin(seed)
        assert len(twin) == n and twin == circuit.random_twin(seed)
        if n < 100:
            assert set(twin.pruned().edges) == set(twin.edges)
    assert circuit.random_twin(4).edges == graph.edges
    assert Circuit(graph, graph.edges[:40]).random_twin(0) != Circuit(graph, graph.edges[:40]).random_twin(1)


def test_curve_and_its_areas(model, pairs):
    circuits = nested_circuits(eap_ig(model, pairs), (0.05, 0.3, 1.0))
    curve = faithfulness_curve(model, pairs, circuits)
    assert curve.dims == ("prompt", "circuit") and curve.n_edges[-1] == len(Graph.of(model).edges)
    pooled = pooled_effect(curve).values
    assert pooled[-1] == pytest.approx(1, abs=1e-3)
    x = curve.fraction.values
    area = sum((b - a) * (f + g) / 2 for a, b, f, g in zip(x, x[1:], pooled, pooled[1:], strict=False))
    assert curve.attrs["cpr"] == pytest.approx(area)
    assert curve.attrs["cmd"] >= 0
    whole = faithfulness_curve(model, pairs, [Circuit.full(Graph.of(model))] * 2)
    assert np.isnan([whole.attrs["cmd"], whole.attrs["cpr"]]).all()  # no width, no area
    for wrong in ({"subsets": []}, {"contexts": ()}):
        measure = (
            Circuit.full(Graph.of(model)).completeness
            if "subsets" in wrong
            else Circuit.full(Graph.of(model)).minimality
        )
        with pytest.raises(ValueError, match="No (subsets|contexts) given"):
            measure(model, pairs, **wrong)
    with pytest.raises(ValueError, match="no scores of edges or nodes"):
        nested_circuits(curve)


def test_circuits_by_nodes(model, pairs):
    scores = eap(model, pairs, level="node")
    circuit = Circuit.from_scores(scores, 5)
    assert circuit.selected == "nodes" and len(circuit.nodes) <= 6
    all_nodes = Circuit.from_nodes(Graph.of(model), Graph.of(model).senders)
    assert all_nodes.edges == Graph.of(model).edges


def test_signed_selection_leaves_out_what_harms(model, pairs):
    scores = eap(model, pairs)
    n = int((scores.mean("prompt") > 0).sum())
    assert all(value > 0 for value in Circuit.from_scores(scores, n, by="signed", prune=False).scores.values())
    assert any(value < 0 for value in Circuit.from_scores(scores, n, prune=False).scores.values())


def test_a_circuit_is_kept_as_it_was(known, tmp_path):
    model, pairs = known
    circuit = Circuit.from_scores(eap_ig(model, pairs), 4)
    assert Circuit.load(circuit.save(tmp_path / "a" / "circuit.json")) == circuit
    with pytest.raises(ValueError, match="no circuit"):
        Circuit.from_dict({"edges": []})


# --------------------------------------------------------------------------------------------- other architectures


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_rmsnorm_and_rotary_positions(tmp_path, processing):
    model = load_model(save_llama(tmp_path), processing=processing)
    pairs = PromptPairs(model, **handset.induction_prompts(2, length=6), check=False)
    graph = Graph.of(model)
    curve = faithfulness_curve(model, pairs, [Circuit.full(graph), Circuit(graph, ())])
    np.testing.assert_allclose(curve.raw[:, 0], pairs.clean_logit_diff, atol=1e-4)
    np.testing.assert_allclose(curve.raw[:, 1], pairs.corrupted_logit_diff, atol=1e-4)
    edges, nodes = eap(model, pairs), eap(model, pairs, level="node")
    summed = edges.groupby("sender").sum().sel(sender=nodes.node.values)
    np.testing.assert_allclose(summed, nodes, atol=1e-5 * float(np.abs(edges).max()))


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_scores_are_the_slope_of_the_exact_run(tmp_path, processing):
    """Where clean and corrupted lie close together, cutting an edge costs what EAP says; here on RMSNorm and RoPE."""
    from transformers import AutoModelForCausalLM

    path = save_llama(tmp_path)
    prompts = handset.induction_prompts(1, length=6)
    pairs = PromptPairs(load_model(path), **prompts, check=False)
    hf = AutoModelForCausalLM.from_pretrained(path)
    table = hf.get_input_embeddings().weight.data
    clean, corrupted = (tokens[pairs.differs].item() for tokens in (pairs.clean_tokens, pairs.corrupted_tokens))
    table[corrupted] = table[clean] + 0.01 * (table[corrupted] - table[clean])
    hf.save_pretrained(path)
    model = load_model(path, processing=processing)
    pairs = PromptPairs(model, **prompts, check=False)
    scores = eap(model, pairs)[0]
    strong = scores.edge.values[np.argsort(-np.abs(scores.values))][:25].tolist()
    whole = Circuit.full(Graph.of(model))
    curve = faithfulness_curve(model, pairs, [whole, *(whole.without(edge) for edge in strong)])
    lost = (curve.raw.values[:, :1] - curve.raw.values[:, 1:])[0]
    np.testing.assert_allclose(lost, scores.sel(edge=strong), atol=0.05 * float(np.abs(scores).max()))


def test_grouped_attention_is_refused(tmp_path):
    model = load_model(save_llama(tmp_path, n_kv_heads=2))
    with pytest.raises(CannotDecompose, match="grouped-query"):
        Graph.of(model)


def test_parallel_blocks_are_refused(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(handset.VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    handset.build_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    with pytest.raises(CannotDecompose, match="parallel"):
        Graph.of(model)


def test_a_model_that_computes_otherwise_is_refused(directory):
    model = load_model(directory)
    pairs = PromptPairs(model, **handset.induction_prompts(2, length=6), check=False)
    model.blocks[1].attn.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    with pytest.raises(CannotDecompose, match="layer 1"):
        eap(model, pairs)


# ----------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: eap(m, p, level="head"), "level"),
        (lambda m, p: eap(m, p, at="middle"), "at="),
        (lambda m, p: eap(m, p, metric="nonsense"), "metric"),
        (lambda m, p: eap(m, p, batch_size=0), "batch_size"),
        (lambda m, p: eap_ig(m, p, steps=0), "steps"),
        (lambda m, p: eap_ig(m, p, rule="simpson"), "rule"),
        (lambda m, p: eap_ig(m, p, variant="weights"), "variant"),
        (lambda m, p: eap(m, p, metric=lambda pairs: lambda logits: logits.argmax(-1)[:, -1].float()), "no gradient"),
        (lambda m, p: Circuit(Graph.of(m), ("embed -> nowhere",)), "no edge"),
        (lambda m, p: Circuit.from_nodes(Graph.of(m), ["L9H9"]), "no node"),
        (lambda m, p: Circuit.from_scores(eap(m, p), 10**6), "edges"),
        (lambda m, p: Circuit.from_scores(eap(m, p), 3, by="size"), "by="),
        (lambda m, p: Circuit.from_scores(eap(m, p).drop_attrs(), 3), "no scores"),
        (lambda m, p: Circuit.full(Graph.of(m)).faithfulness(m, p, ablation="zero"), "ablation"),
        (lambda m, p: Circuit.full(Graph.of(m)).faithfulness(m, p[:1], ablation="mean"), "only one"),
        (lambda m, p: Circuit.full(Graph.of(m)).faithfulness(m, p, batch_size=0), "batch_size"),
        (lambda m, p: Circuit.full(Graph(2, 2)).faithfulness(m, p), "another shape"),
        (lambda m, p: Circuit.full(Graph.of(m)).completeness(m, p, [["L7H0"]]), "not in the circuit"),
        (lambda m, p: Circuit.full(Graph.of(m)).minimality(m, p, by="layer"), "by="),
        (lambda m, p: Circuit.full(Graph.of(m)).without("L9H9"), "neither"),
        (lambda m, p: Circuit(Graph.of(m), ()).random_twin(), "empty"),
        (lambda m, p: Circuit(Graph.of(m), ()).minimality(m, p), "no node"),
        (lambda m, p: nested_circuits(eap(m, p), (0.5, 2.0)), "between 0 and 1"),
        (lambda m, p: faithfulness_curve(m, p, []), "No circuits"),
    ],
)
def test_wrong_arguments_are_refused(model, pairs, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, pairs)


def test_runs_that_do_not_differ_are_refused(model, pairs):
    same = pairs[[0, 1]]
    same.corrupted_tokens = same.clean_tokens
    with pytest.raises(NothingChanged):
        eap(model, same)


def test_no_hooks_and_no_gradients_are_left(model, pairs):
    with pytest.raises(ValueError):
        eap(model, pairs, metric=lambda pairs: lambda logits: logits.argmax(-1)[:, -1].float())
    scores = eap_ig(model, pairs, steps=2)
    Circuit.from_scores(scores, 9).faithfulness(model, pairs)
    assert not any(point.fwd_hooks for point in model.mi_hook_points.values())
    assert not models.run(model, pairs.clean_tokens).requires_grad
