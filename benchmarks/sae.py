"""Training a sparse autoencoder: our loop beside SAELens' own runner, from the same rows of tokens.

Both train a TopK SAE of one size on the same model, tokens, batch size, learning rate and number of steps, and both use
SAELens' objects. First from tokens to the trained SAE: SAELens' runner computes activations a batch at a time, ours a
buffer at a time. Then the training step alone, from activations that are there. Two sizes: the embedded model's, and
GPT-2 small's width.

The limit is a plain matrix product of the encoder's shape, in the same rounds. The dense step does six of them: one to
encode, one to decode, and four for the gradients of the encoder, the decoder, the features and the input's bias. The
fast step does one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import Row, interleaved, median_ratio, threads

from mi_utils import load_model
from mi_utils import sae as saes
from mi_utils.models import hook_name
from mi_utils.tokens import TokenSource

TITLE = "Training sparse autoencoders"
SITE, LAYER, CONTEXT = "resid_post", 1, 128
N_FEATURES, K, BATCH, N_TOKENS = 1024, 16, 4096, 131_072
NOTE = (
    "Both sides do the same number of steps on the same tokens with one seed. Largest difference: between the two "
    "dictionaries after the same steps on the same batches (step alone). Share of the limit: the matrix product that "
    "the fast step cannot do without, at the rate of the same product alone, by our time for the whole step; for "
    "SAELens' step of six such products see its time."
)


def _rows(model: Any) -> list[list[int]]:
    """Corpus documents one after the other, each behind its BOS, cut into full contexts: what SAELens' runner reads."""
    stream: list[int] = []
    rows: list[list[int]] = []
    bos = model.tokenizer.bos_token_id
    for _, row in TokenSource(model).rows():
        stream += row
        while len(stream) >= CONTEXT - 1:
            rows.append([bos, *stream[: CONTEXT - 1]])
            stream = stream[CONTEXT - 1 :]
        if len(rows) * (CONTEXT - 1) > 1.3 * N_TOKENS:
            return rows
    raise AssertionError


def _saelens_runner(model: Any, rows: list[list[int]]) -> Callable[[], None]:
    """SAELens' own runner, as its documentation sets it up, with the bridge and the rows given to it."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    dataset = Dataset.from_dict({"input_ids": rows})

    def train() -> None:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            config = LanguageModelSAERunnerConfig(
                sae=TopKTrainingSAEConfig(d_in=128, d_sae=N_FEATURES, k=K),  # unscaled, which spares it a pass
                model_name="smallworld", hook_name=hook_name(SITE, LAYER), dataset_path="rows", streaming=False,
                is_dataset_tokenized=True, context_size=CONTEXT, training_tokens=N_TOKENS, lr=1e-3,
                train_batch_size_tokens=BATCH, store_batch_size_prompts=32, n_batches_in_buffer=64,
                device="cpu", dtype="float32", output_path=folder,
                checkpoint_path=None, logger=LoggingConfig(log_to_wandb=False), verbose=False,
            )  # fmt: skip
            LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=model).run()

    return train


def _from_tokens(rounds: int) -> Row:
    model = load_model("smallworld")
    rows = _rows(model)

    def ours() -> None:
        saes.train_sae(
            model, site=SITE, layer=LAYER, n_features=N_FEATURES, k=K, batch_size=BATCH, n_tokens=N_TOKENS,
            tokens=rows, buffer_tokens=80_000, monitor_every=N_TOKENS, progress=False,
        )  # fmt: skip

    seconds = interleaved({"ours": ours, "theirs": _saelens_runner(model, rows)}, rounds)
    return Row(
        work=f"TopK SAE on smallworld, 128 → {N_FEATURES}, {N_TOKENS:,} tokens, from tokens to the trained SAE",
        peer="`LanguageModelSAETrainingRunner`", threads=torch.get_num_threads(),
        ours=statistics.median(seconds["ours"]), theirs=statistics.median(seconds["theirs"]),
        ratio=median_ratio(seconds["theirs"], seconds["ours"]), bar=1.0, note=NOTE,
    )  # fmt: skip


def _step(d_in: int, n_features: int, k: int, batch: int, rounds: int, n_steps: int = 4) -> Row:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, d_in, generator=generator) for _ in range(n_steps)]
    settings = {
        "architecture": "topk", "n_features": n_features, "k": k, "n_tokens": 100 * batch, "batch_size": batch,
        "seed": 0, "learning_rate": 1e-3, "sparsity": None, "widths": None,
    }  # fmt: skip
    trainers = {}
    for name, fast in (("ours", True), ("theirs", False)):
        trainers[name] = saes._trainer(saes._training_sae(settings, d_in, "cpu", {}), iter(()), settings, "cpu", fast)

    def steps(name: str) -> Callable[[], None]:
        def go() -> None:
            for x in batches:
                trainers[name].step(x)
                trainers[name].n_training_steps += 1

        return go

    for name in trainers:  # the same steps from the same start, before anything is timed
        steps(name)()
    difference = float((trainers["ours"].sae.W_dec - trainers["theirs"].sae.W_dec).detach().abs().max())
    weight = torch.randn(d_in, n_features, generator=generator)

    def multiply() -> None:
        for x in batches:
            x @ weight

    seconds = interleaved({"ours": steps("ours"), "theirs": steps("theirs"), "limit": multiply}, rounds)
    return Row(
        work=f"one TopK step, {d_in} → {n_features}, k = {k}, batch {batch} (times of {n_steps})",
        peer="`SAETrainer.step`", threads=torch.get_num_threads(), ours=statistics.median(seconds["ours"]),
        theirs=statistics.median(seconds["theirs"]), ratio=median_ratio(seconds["theirs"], seconds["ours"]), bar=1.0,
        difference=difference, bound=6.0, limit=median_ratio(seconds["limit"], seconds["ours"]), note=NOTE,
    )  # fmt: skip


def main(rounds: int = 5) -> list[Row]:
    """The table's rows, on one thread."""
    with threads(1):
        return [
            _from_tokens(max(3, rounds // 2)),
            _step(128, 1024, 16, 4096, rounds),
            _step(768, 8192, 32, 1024, rounds),
        ]
