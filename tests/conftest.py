"""Models to test on, without a network: a tiny one, a hub cache with GPT-2 small's shapes, and the embedded one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

# Read when the libraries are imported, so set before any of them is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

BOS = "<|endoftext|>"
LINES = (
    "When Mary and John went to the store, John gave a drink to Mary.",
    "Then, Anna and Peter were at the garden. Peter handed the key to Anna.",
    "The cat sat on the mat because it was warm, and the dog left the house.",
)


def byte_level_tokenizer(vocab_size: int | None = None, words: Sequence[str] = ()):
    """Byte-level BPE in which the words of ``LINES`` and ``words`` are whole; padded to ``vocab_size``, BOS last, as in
    GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def fresh(model) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    trained = fresh(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for piece in (form for word in words for form in (word, "\u0120" + word)):  # as byte-level BPE writes a space
        vocabulary.setdefault(piece, len(vocabulary))
    for number in range(len(vocabulary), (vocab_size or len(vocabulary) + 1) - 1):
        vocabulary[f"unused{number}"] = number
    vocabulary[BOS] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = fresh(models.BPE(vocabulary, merges, ignore_merges=bool(words)))
    tokenizer.add_special_tokens([BOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS)


def save_random_gpt2(
    directory: Path, seed: int = 0, half: bool = False, vocab_size: int | None = None, words: Sequence[str] = (),
    **sizes,
) -> Path:  # fmt: skip
    """A GPT-2 with random weights and its tokenizer as an ordinary Hugging Face directory."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_level_tokenizer(vocab_size, words)
    bos = tokenizer.bos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=bos, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    (model.half() if half else model).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """Two layers, d_model 32, four heads; large random weights, so that prompts give different answers."""
    directory = tmp_path_factory.mktemp("tiny")
    return save_random_gpt2(directory, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)


@pytest.fixture(scope="session")
def tiny(tiny_dir):
    """The model of ``tiny_dir``, loaded."""
    from mi_utils.models import load_model

    return load_model(str(tiny_dir))


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> str:
    """Random weights in the shapes of the hand-set model."""
    import handset

    return str(handset.save_random(tmp_path_factory.mktemp("random")))


@pytest.fixture(scope="session")
def architectures(tmp_path_factory):
    """Small random models of other kinds: grouped-query attention with rotary positions, RMSNorm and gated MLPs, and
    rotary positions with attention and MLP in parallel."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    from mi_utils.models import load_model

    tokenizer = byte_level_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.bos_token_id,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    kinds = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)),
    }
    loaded = {}
    for name, build in kinds.items():
        directory = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        loaded[name] = load_model(str(directory))
    return loaded


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The model set by hand, and prompts that need both its heads."""
    import handset

    from mi_utils.models import load_model
    from mi_utils.prompts import PromptPairs

    model = load_model(str(handset.save_handset(tmp_path_factory.mktemp("handset"))))
    return model, PromptPairs(model, **handset.induction_prompts(6))


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory) -> Path:
    """$HF_HOME with GPT-2 small in its exact shapes, under both of its hub ids, as a download would have left it."""
    from mi_utils.smallworld import lexicon

    home = tmp_path_factory.mktemp("hf_home")
    commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    first, second = (home / "hub" / f"models--{name}" for name in ("gpt2", "openai-community--gpt2"))
    for repository in (first, second):
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
    words = [*lexicon.words(), *(form for forms in lexicon.VERB_FORMS for form in forms)]  # as in GPT-2's own
    snapshot = save_random_gpt2(first / "snapshots" / commit, half=True, vocab_size=50257, words=words)
    for file in snapshot.iterdir():
        (second / "snapshots" / commit / file.name).symlink_to(file)
    return home


@pytest.fixture(scope="session")
def model():
    """The embedded model, where it has been trained."""
    from mi_utils.models import embedded_names, load_model

    if "smallworld" not in embedded_names():
        pytest.skip("smallworld has not been trained yet: make train")
    return load_model("smallworld")


# ------------------------------------------------------------------------------------------------------------- order

# Files that take minutes, the longest first. Begun last, they would keep one worker busy while the other has nothing.
LONGEST = (
    "test_mutations.py", "test_mutations_later.py", "test_exercises.py", "test_notebooks.py", "test_untrained_gpt2.py",
    "test_project.py", "test_sae.py", "test_site.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Longest files first. (The workers' own order, by number of tests, is switched off in the Makefile.)"""
    last = len(LONGEST)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else last)


# ---------------------------------------------------------------------------------------------------------- summary


def pytest_terminal_summary(terminalreporter):
    """What took how long, and the table of `test_mutations.py`."""
    reports = [
        report
        for outcome in ("passed", "failed", "xfailed", "xpassed")
        for report in terminalreporter.getreports(outcome)
    ]
    _what_took_how_long(terminalreporter, [*reports, *terminalreporter.getreports("")])
    _planted_faults(terminalreporter, reports)


def _what_took_how_long(terminalreporter, reports, shortest: float = 5.0) -> None:
    """Seconds of each test file, fixtures included; files that are done sooner are summed."""
    seconds: dict[str, float] = {}
    for report in reports:
        name = report.nodeid.split("::")[0]
        seconds[name] = seconds.get(name, 0.0) + report.duration
    if sum(seconds.values()) < 60:
        return
    terminalreporter.section("what took how long")
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        if took >= shortest:
            terminalreporter.write_line(f"{took:7.0f} s  {name}")
    rest = [took for took in seconds.values() if took < shortest]
    terminalreporter.write_line(f"{sum(rest):7.0f} s  {len(rest)} other files")
    terminalreporter.write_line(f"{sum(seconds.values()):7.0f} s  in all, over all workers")


def _planted_faults(terminalreporter, reports) -> None:
    """What each planted fault turned red in each notebook."""
    rows = {
        report.nodeid.split("[")[-1].rstrip("]"): found
        for report in reports
        for name, found in report.user_properties
        if name == "mutations"
    }
    if not rows:
        return
    from mutations import FAULTS

    terminalreporter.section("planted faults: what turned red")
    for name, found in sorted(rows.items()):
        terminalreporter.write_line(name)
        for fault in (fault.name for fault in FAULTS if fault.name in found):
            terminalreporter.write_line(f"    {fault:36s}{found[fault] or 'SURVIVES'}")
    n, caught = sum(map(len, rows.values())), sum(bool(red) for found in rows.values() for red in found.values())
    terminalreporter.write_line(f"{caught} of {n} faults turned a notebook red")
