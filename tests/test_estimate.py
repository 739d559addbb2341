"""Estimates of memory against bytes that are counted while the task runs, and the command that prints them."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_level_tokenizer, save_random_gpt2
from test_patching import Bytes
from typer.testing import CliRunner

from mi_utils import __main__ as cli
from mi_utils import compute, large, models, patching, sae
from mi_utils.compute import ModelShape, known_shape
from mi_utils.estimates import TASKS, estimate
from mi_utils.prompts import PromptPairs, ioi_pairs


def counted(model, call):
    """The most bytes that a call holds at one time, beside the model."""
    own = [*torch.nn.Module.parameters(model), *torch.nn.Module.buffers(model)]
    bytes_ = Bytes()
    bytes_.alive = {tensor.untyped_storage()._cdata for tensor in own}
    with bytes_:
        call()
    return bytes_.peak


def stored(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def parameters(model):
    return stored([p for part in model.modules() for p in part._parameters.values() if p is not None])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of usual proportions: grouped attention, gated MLPs, untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_tokenizer(2000)
    bos = tokenizer.bos_token_id
    config = LlamaConfig(
        vocab_size=2000, bos_token_id=bos, eos_token_id=bos, hidden_size=128, intermediate_size=344,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=["smallworld", "llama"])
def loaded(request, llama):
    """The same model for both tools, and pairs that differ from the first word on."""
    path = llama if request.param == "llama" else "smallworld"
    theirs, ours = models.load_model(path, device="cpu"), large.load_large_model(path, device="cpu")
    if path == "smallworld":
        pairs = ioi_pairs(theirs, 48, check=False)
        first = pairs.clean_tokens.clone()
        first[:, 1:] = (first[:, 1:] + 7) % 1000  # other words throughout
        pairs.corrupted_tokens = first
    else:
        n, rest = 16, "and Mary went to the store, and the dog left the house. Then, John gave a drink to"
        columns = [f"Anna {rest}"] * n, [f"Peter {rest}"] * n, [" Mary"] * n, [" John"] * n
        pairs = PromptPairs(theirs, *columns, check=False)
    return theirs, ours, pairs


def test_weights_are_those_that_are_loaded(loaded):
    theirs, ours, _ = loaded
    shape = ours.mi.shape
    assert estimate(shape, tool="nnsight").weights == pytest.approx(parameters(ours.nn._module), rel=0.1)
    assert estimate(shape, tool="TransformerLens").weights == pytest.approx(parameters(theirs), rel=0.1)


@pytest.mark.parametrize(("batch", "seq"), [(8, 16), (2, 100)])
def test_caches_are_those_that_are_kept(loaded, batch, seq):
    theirs, ours, _ = loaded
    tokens = torch.randint(0, 300, (batch, seq), generator=torch.Generator().manual_seed(0))
    _, cache = theirs.run_with_cache(tokens)
    everything = stored([each for each in cache.values() if isinstance(each, torch.Tensor)])
    sites = stored(models.cache(theirs, tokens, list(models.SITES)).values())
    for tool, kept in (("TransformerLens", everything), ("nnsight", sites)):
        expected = estimate(ours.mi.shape, "cache", batch=batch, seq=seq, tool=tool).parts["cache"]
        assert expected == pytest.approx(kept, rel=0.1), tool


@pytest.mark.parametrize("tool", ["TransformerLens", "nnsight"])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_sweeps_take_what_is_estimated(loaded, tool, site):
    theirs, ours, pairs = loaded
    sweep, model = (patching.patch_sweep, theirs) if tool == "TransformerLens" else (large.patch_sweep, ours)
    module = theirs if tool == "TransformerLens" else ours.nn._module
    sweep(model, pairs[:2], site, ("layer", "pos"), progress=False)  # the check of the fast path is over
    peak = counted(module, lambda: sweep(model, pairs, site, ("layer", "pos"), progress=False))
    batch, seq = pairs.clean_tokens.shape
    need = estimate(ours.mi.shape, "patching", batch=batch, seq=seq, site=site, tool=tool)
    assert need.beside == pytest.approx(peak, rel=0.25)


SIZES = {"wide": (4096, 512, 4096), "large batches": (512, 4096, 8192), "large buffer": (1024, 1024, 60_000)}
TRAINED = [(kind, size) for kind in sae.ARCHITECTURES for size in SIZES if kind == "topk" or size != "large buffer"]


@pytest.mark.parametrize(("architecture", "size"), TRAINED)
def test_training_an_sae_takes_what_is_estimated(architecture, size):
    model, (n_features, batch, buffer_tokens) = models.load_model("smallworld", device="cpu"), SIZES[size]
    rows = torch.randint(0, 1000, (1000, 128), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"site": "resid_post", "n_features": n_features, "architecture": architecture}
    peak = counted(model, lambda: sae.train_sae(
        model, layer=1, batch_size=batch, buffer_tokens=buffer_tokens, n_tokens=max(buffer_tokens, 2 * batch),
        tokens=rows, progress=False, monitor_every=1000, **settings,
    ))  # fmt: skip
    need = estimate(models.info(model).shape, "sae", sae_batch=batch, buffer_tokens=buffer_tokens, **settings)
    assert need.beside == pytest.approx(peak, rel=0.25)


def test_a_large_vocabulary_takes_the_most_while_training_is_watched(tmp_path):
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = models.load_model(str(save_random_gpt2(tmp_path, vocab_size=50257, **sizes)), device="cpu")
    rows = torch.randint(0, 1000, (200, 128), generator=torch.Generator().manual_seed(0)).tolist()
    peak = counted(model, lambda: sae.train_sae(
        model, site="resid_post", layer=0, n_features=1024, batch_size=1024, buffer_tokens=8192, n_tokens=8192,
        tokens=rows, progress=False, monitor_every=1000,
    ))  # fmt: skip
    need = estimate(models.info(model).shape, "sae", n_features=1024, sae_batch=1024, buffer_tokens=8192)
    assert need.beside == pytest.approx(peak, rel=0.25)


def test_an_autoencoder_is_four_copies_of_its_weights_in_single_precision():
    shape = known_shape("gpt2-small")
    stream, inside = (
        estimate(shape, "sae", n_features=8192, site=site).parts["autoencoder and Adam"]
        for site in ("resid_post", "mlp_post")
    )
    assert stream == 16 * (2 * 8192 * 768 + 8192 + 768)
    assert inside == pytest.approx(4 * stream, rel=0.01)


# ------------------------------------------------------------------------------------------------------------- sizes


def test_parameters_of_well_known_models_are_the_published_ones():
    published = {
        "gpt2-small": 124_439_808, "gpt2-xl": 1_557_611_200, "pythia-70m": 70_426_624, "pythia-12b": 11_846_072_320,
        "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192, "llama-3.1-405b": 405_853_388_800,
        "mistral-7b": 7_241_732_096, "gemma-2-27b": 27_227_128_320, "qwen2.5-72b": 72_706_203_648,
        "qwen3-8b": 8_190_735_360,
    }  # fmt: skip
    assert {name: known_shape(name).n_parameters for name in published} == published


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-2b", "qwen3-0.6b", "mistral-nemo-12b"])
def test_sizes_in_the_table_add_up_to_their_parameters(name):
    """By hand: embeddings, and of each block the matrices and two norms (four in Qwen 3: queries and keys too)."""
    shape = known_shape(name)
    width, kv_width = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    attention = shape.d_model * (2 * width + 2 * kv_width)
    block = attention + 3 * shape.d_model * shape.d_mlp + 2 * shape.d_model
    block += 2 * shape.d_head if name.startswith("qwen3") else 0
    embeddings = shape.d_vocab * shape.d_model * (1 if shape.tied_embeddings else 2)
    assert shape.n_layers * block + embeddings + shape.d_model == shape.n_parameters


def test_half_precision_and_eight_bits_are_smaller():
    shape = known_shape("llama-3.1-8b")
    single, half, eight = (estimate(shape, dtype=dtype).weights for dtype in ("float32", "bfloat16", "int8"))
    assert single == 2 * half and half / 2 < eight < 0.6 * half
    assert eight == shape.n_parameters + 2 * 128256 * 4096  # embedding and unembedding stay in 16 bits


def test_a_larger_job_needs_more():
    shape = known_shape("pythia-1b")
    for task in ("forward", "cache", "patching"):
        small, big = (estimate(shape, task, batch=batch) for batch in (8, 64))
        assert small.weights == big.weights and small.beside < big.beside
    assert estimate(shape, "sae", n_features=1000).beside < estimate(shape, "sae", n_features=9000).beside


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"task": "train"}, "patching"), ({"dtype": "int4"}, "int8"), ({"seq": 5000}, "1024")],
)
def test_estimates_of_nonsense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        estimate(known_shape("gpt2-small"), **settings)


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200, raising=False)

    def call(*arguments):
        result = CliRunner().invoke(cli.app, ["estimate", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, " ".join(result.output.split())

    return call


def test_the_command_shows_every_task_and_what_fits(command, monkeypatch):
    monkeypatch.setattr(compute, "available_memory", lambda device: 40 * 2**30)
    status, output = command("llama-3.1-8b", "--batch", "16", "--dtype", "bfloat16")
    assert status == 0 and "8,030,261,248" in output and "nnsight" in output and "15.0 GiB" in output
    assert all(task in output for task in TASKS) and "does not fit" not in output
    status, output = command("llama-3.1-8b", "--task", "patching")
    assert status == 0 and output.count("fits") == 1
    status, output = command("llama-3.1-70b")
    assert status == 0 and "does not fit" in output and "device_map" in output and "NDIF" in output


def test_the_command_reads_embedded_models_and_folders(command, llama):
    status, output = command("smallworld", "--seq", "16")
    assert status == 0 and "1,017,984" in output
    for name in (llama, f"random:{llama}"):
        status, output = command(name)
        assert status == 0 and "4 layers" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "HF_HUB_OFFLINE"),
        (["gpt2-small", "--task", "train"], "patching"),
        (["gpt2-small", "--dtype", "int4"], "int8"),
        (["gpt2-small", "--seq", "5000"], "1024"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_clear_error(command, arguments, words):
    status, output = command(*arguments)
    assert status == 2 and words in output and "Traceback" not in output


def test_shapes_from_a_configuration_know_the_stepwise_gelu():
    from transformers import GPT2Config, GPTNeoXConfig

    assert ModelShape.from_config(GPT2Config(), n_parameters=1).stepwise_gelu
    assert not ModelShape.from_config(GPTNeoXConfig(), n_parameters=1).stepwise_gelu
