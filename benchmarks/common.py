"""What every benchmark needs: a model in GPT-2 small's shapes, fair timing, and a row of the table.

Ours and the peer's run on the same work in one process, in turns, so that a noisy machine slows both. What counts is
the ratio. Beside the times stands the rate of a plain matrix product, measured in the same rounds: it says how close
a call comes to what this machine can do at all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORDS = 50256  # and BOS: GPT-2's vocabulary
N_TOKENS = 15  # of the prompts, BOS included


@dataclass(frozen=True)
class Row:
    """One line of the table. ``limit``: the time of our FLOPs at the run's matmul rate, as a share of ours."""

    work: str
    peer: str
    threads: int
    ours: float  # seconds
    theirs: float  # seconds
    ratio: float  # their time / our time, median over the rounds
    bar: float | None = None  # the ratio to reach, where one was set
    difference: float | None = None  # largest absolute difference between the two results
    bound: float | None = None  # the peer's FLOPs / ours
    limit: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------------------- models


def word(number: int) -> str:
    """The text of a token, with its leading space."""
    return f" w{number}"


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"Ġw{number}": number for number in range(WORDS)} | {"<|endoftext|>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special, eos_token=special, unk_token=special)


def gpt2_small_shaped(device: str = "cpu", dtype: str = "float32", seed: int = 0) -> tuple[Any, Any]:
    """(our model, the Hugging Face model) with the same random weights, in GPT-2 small's shapes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from mi_utils import load_model

    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(bos_token_id=WORDS, eos_token_id=WORDS, attn_implementation="eager")
    hf_model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if "attn" in name else 0.04  # attention that looks somewhere, a stream that does not explode
            parameter.copy_(scale * noise + 1 if "ln_" in name and name.endswith("weight") else scale * noise)
    with tempfile.TemporaryDirectory(prefix="gpt2-small-shaped-") as directory:
        hf_model.save_pretrained(directory)
        _tokenizer().save_pretrained(directory)
        model = load_model(directory, device=device, dtype=dtype)
    return model, hf_model.to(device, getattr(torch, dtype)).requires_grad_(False)


def hooked_transformer(hf_model: Any) -> Any:
    """The same weights as TransformerLens's HookedTransformer, folded and centred as ours are: the peer's own model."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    about = hf_model.config
    config = HookedTransformerConfig(
        n_layers=about.n_layer, d_model=about.n_embd, n_heads=about.n_head, d_head=about.n_embd // about.n_head,
        n_ctx=about.n_positions, d_vocab=about.vocab_size, act_fn="gelu_new", eps=about.layer_norm_epsilon,
        normalization_type="LNPre", device=str(hf_model.device), dtype=hf_model.dtype,
    )  # fmt: skip
    model = HookedTransformer(config, move_to_device=True)
    state = convert_gpt2_weights(hf_model, config)
    model.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True, center_unembed=True)
    return model.eval().requires_grad_(False)


def prompt_pairs(model: Any, n: int, differ: tuple[int, ...], n_tokens: int = N_TOKENS, seed: int = 0) -> Any:
    """Pairs of random words; the corrupted prompt has other tokens at the positions ``differ`` (0 is BOS)."""
    from mi_utils import PromptPairs

    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(WORDS, (n, n_tokens - 1), generator=generator)
    corrupted = clean.clone()
    for position in differ:
        corrupted[:, position - 1] = (clean[:, position - 1] + 1 + position) % WORDS
    answers = torch.randint(WORDS // 2, (n,), generator=generator)
    return PromptPairs(
        model,
        clean=["".join(word(int(token)) for token in row) for row in clean],
        corrupted=["".join(word(int(token)) for token in row) for row in corrupted],
        correct=[word(int(answer)) for answer in answers],
        incorrect=[word(int(answer) + WORDS // 2) for answer in answers],
        check=False,
    )


# ------------------------------------------------------------------------------------------------------------- timing


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads for the time of a benchmark."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, rows: int = 1024) -> Callable[[], float]:
    """A function that multiplies matrices of GPT-2 small's MLP; ``.flops`` by its time is the machine's rate."""
    a, b = torch.randn(rows, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(8):
            a @ b

    multiply.flops = 8 * 2 * rows * 768 * 3072  # type: ignore[attr-defined]
    return multiply


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each function in each round; in a round each runs once, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the rounds of their time by ours."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


# -------------------------------------------------------------------------------------------------------------- table


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| work | peer | threads | theirs | ours | ratio | bar | FLOP ratio | share of limit | largest difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"**{row.ratio:.{1 if row.ratio >= 2 else 2}f}×**"
        cells = (
            row.work, row.peer, row.threads, _seconds(row.theirs), _seconds(row.ours), ratio,
            "" if row.bar is None else f"{row.bar:g}×", "" if row.bound is None else f"{row.bound:.1f}×",
            "" if row.limit is None else f"{row.limit:.2f}", "" if row.difference is None else f"{row.difference:.1g}",
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


RESULTS = Path(__file__).with_name("RESULTS.md")
