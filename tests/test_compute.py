"""Device, precision, memory and tool choice; sizes against published numbers and PyTorch's own count."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from mi_utils import compute
from mi_utils.compute import ModelShape, choose_tool, estimate_memory, known_shape, pick_device, pick_dtype


def test_device_is_what_there_is_unless_another_is_asked_for():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type != "mps"


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "no such device"])
def test_a_device_that_is_not_there_is_refused_with_a_cure(device):
    with pytest.raises(ValueError, match="cpu"):
        pick_device(device)


def test_mps_is_refused_where_it_is_not():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ValueError, match="cpu"):
        pick_device("mps")


def test_precision_by_name_or_type():
    cpu = torch.device("cpu")
    assert pick_dtype(cpu) == torch.float32
    assert pick_dtype(cpu, "bfloat16") == pick_dtype(cpu, torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="float32"):
        pick_dtype(cpu, "int8")


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_bfloat16_only_where_the_card_has_it(monkeypatch, capability, refused):
    # PyTorch says that bfloat16 is supported on both
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    if refused:
        with pytest.raises(ValueError, match="float16"):
            pick_dtype(torch.device("cuda"), "bfloat16")
    else:
        assert pick_dtype(torch.device("cuda"), "bfloat16") == torch.bfloat16


def test_shapes_in_the_table_have_the_parameters_of_the_architecture():
    from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    configs = {
        "gpt2-small": GPT2Config(),
        "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
        "pythia-70m": GPTNeoXConfig(
            hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
            max_position_embeddings=2048, tie_word_embeddings=False,
        ),
        "llama-3.1-8b": LlamaConfig(
            intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
        "gemma-2-2b": Gemma2Config(),
        "qwen2.5-0.5b": Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    for name, config in configs.items():
        assert ModelShape.from_config(config, name=name) == known_shape(name)


def test_shapes_by_short_name_and_hub_id():
    assert known_shape("gpt2-small").n_parameters == known_shape("openai-community/gpt2").n_parameters == 124_439_808
    assert known_shape("EleutherAI/pythia-12b").n_layers == 36
    assert known_shape("smallworld") is None and known_shape("no/such-model") is None


def test_weights_of_gpt2_small_are_half_a_gibibyte():
    estimate = estimate_memory(known_shape("gpt2-small"))
    assert estimate.weights == 124_439_808 * 4
    assert "weights" in estimate.table() and "474.7 MiB" in estimate.table() and "total" in estimate.table()


def test_weights_and_copies_are_what_the_folded_model_holds(tiny):
    """Counted in storage, not in parameters: some are views of others."""
    from mi_utils import models

    parameters = [p for module in tiny.modules() for p in module._parameters.values() if p is not None]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    estimate = estimate_memory(models.info(tiny).shape)
    assert sum(storages.values()) == pytest.approx(estimate.weights + estimate.folded_copies, rel=0.05)


def test_memory_grows_with_what_is_kept():
    shape = known_shape("gpt2-small")
    totals = [estimate_memory(shape, batch=8, seq=256, task=task).total for task in ("forward", "patching", "cache")]
    assert totals == sorted(totals) and len(set(totals)) == 3
    single, half = (estimate_memory(shape, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.weights * 2 == single.weights
    assert estimate_memory(shape, batch=2, task="cache").cache == 2 * estimate_memory(shape, task="cache").cache


def test_a_cache_of_everything_is_not_underestimated(tiny, tiny_dir):
    from mi_utils import models

    shape = models.info(tiny).shape
    tokens = models.to_tokens(tiny, ["When Mary and John went to the store, John gave a drink to"] * 3)
    cached = models.cache(tiny, tokens, list(models.SITES))
    kept = sum(value.numel() * value.element_size() for value in cached.values())
    estimate = estimate_memory(shape, batch=3, seq=tokens.shape[1], task="cache")
    assert kept <= estimate.cache <= 4 * kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"dtype": "int8"}, "float32"), ({"task": "train"}, "patching"), ({"seq": 1025}, "1024"), ({"batch": 0}, "batch")],
)
def test_estimates_of_nonsense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        estimate_memory(known_shape("gpt2-small"), **settings)


@pytest.mark.parametrize(
    ("n_parameters", "tool"),
    [(1_000_000, "TransformerLens"), (1_557_611_200, "TransformerLens"), (8_030_261_248, "nnsight"), (70e9, "NDIF")],
)
def test_tool_by_size(n_parameters, tool):
    choice = choose_tool(n_parameters)
    assert tool in choice.tool and choice.reason


def test_tool_for_a_shape():
    assert choose_tool(known_shape("pythia-6.9b")) == choose_tool(6_857_302_016)


def test_memory_of_this_machine_is_plausible():
    assert 2**26 < compute.available_memory(torch.device("cpu")) < 2**45


def test_environment_is_plain_data_with_the_versions():
    import json

    found = compute.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "device", "cpu_count", "commit", "mi_utils"} <= set(found)


def test_the_commit_is_that_of_the_repository_one_works_in(tmp_path, monkeypatch):
    import subprocess

    package = compute.environment()["mi_utils"]
    monkeypatch.chdir(tmp_path)
    assert compute.environment()["commit"] is None

    def git(*arguments):
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.md").write_text("a question")
    git("add", "-A")
    git("commit", "-q", "-m", "begin")
    monkeypatch.chdir(tmp_path / "notes")
    found = compute.environment()
    assert found["commit"] == git("rev-parse", "HEAD") and found["mi_utils"] == package
    (tmp_path / "notes" / "plan.md").write_text("another")
    assert compute.environment()["commit"].endswith("+")


def test_seeding_repeats_every_generator():
    draws = []
    for _ in range(2):
        compute.seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, mi_utils; heavy = {'torch', 'transformers', 'transformer_lens', 'xarray', 'scipy'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_leads_somewhere():
    import mi_utils

    for name in mi_utils.__all__:
        assert getattr(mi_utils, name) is not None
    assert set(mi_utils.__all__) <= set(dir(mi_utils))
    with pytest.raises(AttributeError, match="load_model"):
        mi_utils.no_such_name  # noqa: B018
