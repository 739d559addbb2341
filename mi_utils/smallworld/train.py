"""Train the small world's model: `python -m mi_utils.smallworld.train --seed 0`. Resumes where it was stopped.

Two stages. First only repeated random tokens, with periods that grow as they are mastered, so that induction forms: a
matter of attention alone, so the MLPs are left out and wake as zeros. Rows are short or whole by turns; with short ones
only, the heads learn to look back at the positions they know and at no others. Then the corpus, with some repeated
sequences kept. The loss of a repeated sequence counts its repeats alone: its first period is noise that nothing can
predict.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mi_utils.smallworld.corpus import documents

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
CHECKPOINTS = [200, 500, 600, 700, 800, 1000, 2000]  # of seed 0, along the forming of induction


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of; two runs of one recipe, seed and device type see the same batches."""

    seed: int = 0
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_ctx: int = 128
    steps: int = 8_000  # of `batch_tokens` each, both stages together
    batch_tokens: int = 2048
    warmup: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    init_std: float = 0.088
    decay: float = 0.4  # share of the steps, the last ones, over which the learning rate falls to nothing
    position_scale: float = 0.2  # of the sinusoids that the learned position embeddings start from
    position_base: float = 100.0  # ratio of their longest to their shortest period
    mastery: float = 0.7  # running accuracy on the repeats that lets the period grow
    induction_accuracy: float = 0.97  # at the longest period; reaching it ends the first stage
    induction_steps: int = 3000  # and so does this many steps
    induction_share: float = 0.2  # of the second stage's steps
    packed_share: float = 0.3  # of the corpus steps: whole rows of documents, as language models are usually trained
    corpus_documents: int = 200_000


class Block(nn.Module):
    """One pre-LayerNorm block, as in GPT-2."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Float[Tensor, "row pos d_model"], mlp: bool = True) -> Float[Tensor, "row pos d_model"]:
        n_rows, length, d_model = x.shape
        heads = self.qkv(self.ln_1(x)).float().view(n_rows, length, 3, self.n_heads, d_model // self.n_heads)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 attention has a slow backward on the CPU
            z = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(z.transpose(1, 2).reshape(n_rows, length, d_model))
        if not mlp:
            return x
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class TrainingModel(nn.Module):
    """GPT-2 with tied embeddings, written for speed on a CPU; `to_hugging_face` gives the model that is shipped."""

    def __init__(self, recipe: Recipe, d_vocab: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.embed, self.positions = nn.Embedding(d_vocab, recipe.d_model), nn.Embedding(recipe.n_ctx, recipe.d_model)
        self.blocks = nn.ModuleList(Block(recipe.d_model, recipe.n_heads) for _ in range(recipe.n_layers))
        self.ln_final = nn.LayerNorm(recipe.d_model)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        recipe = self.recipe
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=recipe.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        positions = torch.arange(recipe.n_ctx)[:, None]
        frequencies = recipe.position_base ** -(torch.arange(0, recipe.d_model, 2) / recipe.d_model)
        self.positions.weight[:, 0::2] = torch.sin(positions * frequencies) * recipe.position_scale
        self.positions.weight[:, 1::2] = torch.cos(positions * frequencies) * recipe.position_scale
        for block in self.blocks:
            block.out.weight /= math.sqrt(2 * recipe.n_layers)
            block.down.weight.zero_()
            query, key, _ = block.qkv.weight.chunk(3)
            key.copy_(query)  # equal tokens and near positions attend to one another from the first step

    def forward(
        self, tokens: Int[Tensor, "row pos"], wanted: Bool[Tensor, "row pos"], mlps: bool = True
    ) -> Float[Tensor, "wanted d_vocab"]:
        """Logits at the wanted positions only: the unembedding is a large part of so small a model."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mlps)
        return F.linear(self.ln_final(x)[wanted], self.embed.weight)

    def to_hugging_face(self, bos: int) -> GPT2LMHeadModel:
        """The same function as a `transformers` GPT-2: its Conv1D weights are the transposes of ours."""
        from transformers import GPT2Config, GPT2LMHeadModel

        recipe = self.recipe
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=self.embed.num_embeddings,
                n_positions=recipe.n_ctx,
                n_embd=recipe.d_model,
                n_layer=recipe.n_layers,
                n_head=recipe.n_heads,
                bos_token_id=bos,
                eos_token_id=bos,
            )
        )
        state = {"wte.weight": self.embed.weight, "wpe.weight": self.positions.weight}
        pairs = {"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc"}
        for name, parameter in self.blocks.named_parameters():
            layer, ours, kind = name.split(".")
            theirs = (pairs | {"down": "mlp.c_proj"})[ours]
            state[f"h.{layer}.{theirs}.{kind}"] = parameter.T if parameter.dim() == 2 else parameter
        state |= {"ln_f.weight": self.ln_final.weight, "ln_f.bias": self.ln_final.bias}
        model.transformer.load_state_dict(
            {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
        )
        return model.eval()


Batch = tuple[Int[np.ndarray, "row pos"], Bool[np.ndarray, "row pos"]]


def repeated_tokens(rng: np.random.Generator, n_rows: int, length: int, longest: int, d_vocab: int, bos: int) -> Batch:
    """Rows of BOS and a random sequence repeated, each row with its own period from 2 to `longest`, and where a token
    is a repeat (from the second period's second token on: the first of a period is due only once the period is known).
    """
    tokens = np.full((n_rows, length), bos, dtype=np.int64)
    repeats = np.zeros((n_rows, length), dtype=bool)
    for row in range(n_rows):
        period = int(rng.integers(2, longest + 1))
        sequence = rng.choice(np.delete(np.arange(d_vocab), bos), period)
        tokens[row, 1:] = np.resize(sequence, length - 1)
        repeats[row, 2 + period :] = True
    return tokens, repeats


class CorpusBatches:
    """Tokenised documents, given out packed into whole rows or one to a row beside others of its length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.recipe, self.bos = recipe, int(tokenizer.bos_token_id)
        texts = [document.text for document in islice(documents(recipe.seed), recipe.corpus_documents)]
        self.ids = [np.array([self.bos, *ids]) for ids in tokenizer(texts)["input_ids"]]
        self.by_length = np.argsort([len(ids) for ids in self.ids], kind="stable")

    def packed(self, rng: np.random.Generator) -> Batch:
        recipe = self.recipe
        n_rows, row_length = recipe.batch_tokens // recipe.n_ctx, recipe.n_ctx
        stream: list[np.ndarray] = []
        while sum(map(len, stream)) < n_rows * row_length * 1.5:
            stream += [self.ids[i] for i in rng.integers(len(self.ids), size=64)]
        rows, row = [], np.array([], dtype=np.int64)
        for ids in stream:  # a row begins with a document: its tail is dropped, not carried over
            row = np.concatenate([row, ids])
            if len(row) >= row_length:
                rows.append(row[:row_length])
                row = np.array([], dtype=np.int64)
        tokens = np.stack(rows[:n_rows])
        return tokens, tokens != self.bos  # where a document ends is not to be predicted

    def single(self, rng: np.random.Generator) -> Batch:
        start = int(rng.integers(len(self.ids)))
        length = min(len(self.ids[self.by_length[start]]), self.recipe.n_ctx)
        n_rows = max(self.recipe.batch_tokens // length, 8)
        low = max(0, min(start - 4 * n_rows, len(self.ids) - 8 * n_rows))
        chosen = self.by_length[low + rng.choice(min(8 * n_rows, len(self.ids)), n_rows, replace=False)]
        longest = min(max(len(self.ids[i]) for i in chosen), self.recipe.n_ctx)
        tokens = np.full((n_rows, longest), self.bos, dtype=np.int64)
        for row, i in enumerate(chosen):
            ids = self.ids[i][:longest]
            tokens[row, : len(ids)] = ids
        return tokens, tokens != self.bos


def save(model: TrainingModel, tokenizer: PreTrainedTokenizerFast, folder: Path, half: bool = False) -> None:
    """Write an ordinary Hugging Face directory; `half` stores float16, enough for the checkpoints along the way."""
    exported = model.to_hugging_face(int(tokenizer.bos_token_id))
    (exported.half() if half else exported).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # save_pretrained writes weights that only their owner can read


class Trainer:
    """The state of a run: model, optimiser, curriculum and random numbers, all saved so that it can be resumed."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, device: str = "cpu") -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.tokenizer, self.device = recipe, tokenizer, device
        self.model = TrainingModel(recipe, len(tokenizer)).to(device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.rng = np.random.default_rng(recipe.seed)
        self.step, self.period, self.accuracy, self.second_stage = 0, 3, 0.0, None
        self.corpus: CorpusBatches | None = None

    def state(self) -> dict[str, object]:
        return {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": self.rng.bit_generator.state,
            "progress": (self.step, self.period, self.accuracy, self.second_stage),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a saved state; raises ValueError when it was saved under another recipe."""
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                "the saved training state has another recipe: remove it, or train with the recipe it names"
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rng.bit_generator.state = state["rng"]
        self.step, self.period, self.accuracy, self.second_stage = state["progress"]

    def _repeated(self) -> Batch:
        length = int(self.rng.choice([self.recipe.n_ctx // 4, self.recipe.n_ctx]))
        length = min(max(length, 2 * self.period + 2), self.recipe.n_ctx)
        bos = int(self.tokenizer.bos_token_id)
        rows = self.recipe.batch_tokens // length
        return repeated_tokens(self.rng, rows, length, self.period, len(self.tokenizer), bos)

    def _batch(self) -> tuple[str, Batch]:
        if self.second_stage is None or self.rng.random() < self.recipe.induction_share:
            return "induction", self._repeated()
        if self.corpus is None:
            self.corpus = CorpusBatches(self.tokenizer, self.recipe)
        if self.rng.random() < self.recipe.packed_share:
            return "corpus", self.corpus.packed(self.rng)
        return "corpus", self.corpus.single(self.rng)

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear fall to nothing."""
        left = (self.recipe.steps - self.step) / (self.recipe.decay * self.recipe.steps)
        return self.recipe.learning_rate * min(1.0, (self.step + 1) / self.recipe.warmup, left)

    def advance(self) -> tuple[str, float, float]:
        """One step; returns the kind of batch, its loss in nats a token and its next-token accuracy."""
        kind, (tokens, wanted) = self._batch()
        x = torch.from_numpy(tokens).to(self.device)
        y = torch.from_numpy(wanted).to(self.device)[:, 1:]
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(x[:, :-1], y, mlps=self.second_stage is not None).float()
        answers = x[:, 1:][y]
        loss = F.cross_entropy(logits, answers)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        accuracy = (logits.argmax(-1) == answers).float().mean().item()
        self.step += 1
        if kind == "induction":
            self._grow(accuracy)
        return kind, loss.item(), accuracy

    def _grow(self, accuracy: float) -> None:
        recipe, longest = self.recipe, self.recipe.n_ctx // 2 - 1
        self.accuracy = 0.9 * self.accuracy + 0.1 * accuracy
        if self.accuracy > recipe.mastery and self.period < longest:
            self.period, self.accuracy = min(longest, max(self.period + 1, int(self.period * 1.25))), 0.0
        mastered = self.period == longest and self.accuracy > recipe.induction_accuracy
        if self.second_stage is None and (mastered or self.step >= recipe.induction_steps):
            self.second_stage = self.step


def train(
    recipe: Recipe,
    folder: Path,
    device: str = "cpu",
    checkpoints: Sequence[int] = (),
    every: int = 500,
) -> TrainingModel:
    """Train to the last step, with the state saved in `build/` every `every` steps, and write the model to `folder`."""
    from tqdm import tqdm

    from mi_utils.models import write_canary
    from mi_utils.smallworld.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    trainer = Trainer(recipe, tokenizer, device)
    state_file = Path("build/train") / f"{folder.name}.pt"
    state_file.parent.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        trainer.restore(torch.load(state_file, weights_only=False))
    averages: dict[str, tuple[float, float]] = {}
    bar = tqdm(total=recipe.steps, initial=trainer.step, desc=folder.name, mininterval=5)
    started = time.time()
    while trainer.step < recipe.steps:
        kind, loss, accuracy = trainer.advance()
        old = averages.get(kind, (loss, accuracy))
        averages[kind] = (0.98 * old[0] + 0.02 * loss, 0.98 * old[1] + 0.02 * accuracy)
        bar.update()
        if trainer.step in checkpoints:
            save(trainer.model, tokenizer, folder.with_name(f"{folder.name}-step{trainer.step:06d}"), half=True)
        if trainer.step % every == 0 or trainer.step == recipe.steps:
            shown = " ".join(f"{name} {a:.3f} nats {b:.3f} right" for name, (a, b) in sorted(averages.items()))
            tqdm.write(
                f"{folder.name} step {trainer.step} period {trainer.period} {shown} {time.time() - started:.0f} s"
            )
            torch.save(trainer.state(), state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    save(trainer.model, tokenizer, folder)
    write_canary(folder)
    return trainer.model


def main() -> None:
    """Command line: seeds, steps, device."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="one model a seed")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=ASSETS)
    parser.add_argument("--checkpoints", type=int, nargs="*", default=CHECKPOINTS, help="steps of seed 0 to keep")
    arguments = parser.parse_args()
    for seed in arguments.seed:
        name = "smallworld" if seed == 0 else f"smallworld-seed{seed}"
        checkpoints = arguments.checkpoints if seed == 0 else ()
        train(Recipe(seed=seed, steps=arguments.steps), arguments.folder / name, arguments.device, checkpoints)


if __name__ == "__main__":
    main()
