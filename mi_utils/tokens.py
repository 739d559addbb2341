"""Rows of tokens, BOS first: where they come from, how they become batches, and a model's activations on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models

BATCH_TOKENS = 4096  # in one forward pass
SAMPLE_SEED, TRAINING_SEED = 10_000, 20_000  # of corpus documents: not those that the models were trained with


# ------------------------------------------------------------------------------------------------------------- sources


def token_rows(
    model: Any, n_tokens: int = 24_000, *, seed: int = 0, texts: Sequence[str] | None = None
) -> list[Int[Tensor, " pos"]]:
    """Rows of tokens to train a lens on or to judge with, no two the same, in random order: BOS and a text each.

    Args:
        n_tokens: at least so many in all, as far as there is text.
        seed: draws the rows and their order.
        texts: the text to use, an item a row, cut at the context's length. Without it an embedded model gets
            documents of the corpus it was trained on, and any other model its own samples.

    Raises:
        ValueError: too little text for two rows, a BOS written in a text, or a tokenizer without BOS.
    """
    info = models.info(model)
    if texts is None:
        embedded = Path(info.path) in models.EMBEDDED.values()
        source = _corpus_rows(model, seed) if embedded else _sampled_rows(model, seed)
    else:
        source = (_row(model, text) for text in texts)
    kept: dict[tuple[int, ...], None] = {}
    total = 0
    for row in source:
        row = tuple(row[: info.shape.n_ctx])
        if len(row) > 1 and row not in kept:
            kept[row] = None
            total += len(row)
        if total >= n_tokens and len(kept) > 1:
            break
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} different rows: give at least two texts, to train on one and test on another.")
    rows = list(kept)
    order = np.random.default_rng(seed).permutation(len(rows))
    return [torch.tensor(rows[i], device=info.device) for i in order]


def _corpus_rows(model: Any, seed: int) -> Iterator[tuple[int, ...]]:
    from mi_utils.smallworld.corpus import documents

    for document in documents(SAMPLE_SEED + seed):
        yield _row(model, document.text)


def _row(model: Any, text: str) -> tuple[int, ...]:
    """BOS and the text's tokens."""
    bos, ids = models.bos(model), model.tokenizer.encode(text, add_special_tokens=False)
    if bos in ids:
        raise ValueError(f"BOS would stand twice in {text[:40]!r}: it is put in front. Take it out of the text.")
    return bos, *ids


def _sampled_rows(model: Any, seed: int, length: int = 48, batch: int = 32) -> Iterator[tuple[int, ...]]:
    """What the model itself says after BOS, at temperature 1. Endless; repeats are possible."""
    device = models.info(model).device
    generator = torch.Generator().manual_seed(seed)
    bos = models.bos(model)
    while True:
        tokens = torch.full((batch, 1), bos, device=device)
        for _ in range(min(length, models.info(model).shape.n_ctx) - 1):
            odds = models.run(model, tokens)[:, -1].float().softmax(-1).cpu()
            odds[:, bos] = 0  # another text would begin
            tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=generator).to(device)], dim=1)
        yield from map(tuple, tokens.tolist())


class TokenSource:
    """Rows of tokens in an order that never changes, so that a killed training run finds its place again.

    Attributes:
        name: for the passport.
    """

    def __init__(self, model: Any, tokens: Any = None, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        if tokens is None:
            self.name, self._items = f"smallworld corpus, documents({TRAINING_SEED + seed})", self._documents
        elif isinstance(tokens, str | Path):
            folder = Path(tokens).expanduser()
            if not folder.is_dir():
                raise ValueError(
                    f"tokens={str(tokens)!r} is no local folder. Give a folder with text, JSON or parquet files or a "
                    "dataset saved by `save_to_disk`; or load a dataset with datasets.load_dataset and give that."
                )
            self._data, self.name = _open_folder(folder), f"folder {folder.name}"
            self._items = self._dataset
        elif hasattr(tokens, "column_names") or hasattr(tokens, "features"):
            self._data = tokens["train"] if "train" in getattr(tokens, "keys", dict)() else tokens
            about = getattr(self._data, "info", None)
            self.name = f"dataset {getattr(about, 'dataset_name', None) or 'given as an object'}"
            self._items = self._dataset
        else:
            tokens = list(tokens)
            if any(isinstance(row, str) for row in tokens):
                raise ValueError("Texts are no rows of tokens: give datasets.Dataset.from_dict({'text': texts}).")
            rows = [[int(token) for token in row] for row in tokens]
            self.name, self._items = f"{len(rows)} given rows", lambda start: islice(rows, start, None)

    def rows(self, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(number of the item, row): BOS and tokens, at most the context's length. An item that is longer goes on in
        further rows, each behind a BOS of its own. Items before ``start`` are skipped without being tokenised."""
        for number, item in enumerate(self._items(start), start=start):
            ids = self.model.tokenizer.encode(item, add_special_tokens=False) if isinstance(item, str) else list(item)
            for row in cut_rows(self.model, [ids]):
                yield number, row

    def _documents(self, start: int) -> Iterator[str]:
        from mi_utils.smallworld.corpus import documents

        return (document.text for document in islice(documents(TRAINING_SEED + self.seed), start, None))

    def _dataset(self, start: int) -> Iterator[Any]:
        data = self._data.skip(start) if hasattr(self._data, "skip") else islice(self._data, start, None)
        for item in data:
            column = next((name for name in ("input_ids", "tokens", "text") if name in item), None)
            if column is None:
                raise ValueError(
                    f"The dataset has the columns {', '.join(item)}: one of input_ids, tokens or text is needed. "
                    "Rename yours with dataset.rename_column."
                )
            yield item[column]


def _open_folder(folder: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    if (folder / "state.json").is_file():
        return load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(str(folder))["train"]
    return load_dataset(str(folder), split="train")


def cut_rows(model: Any, items: Iterable[Sequence[int]]) -> Iterator[list[int]]:
    """Each item as rows of at most the context's length, each behind a BOS of its own.

    Raises:
        ValueError: a tokenizer without BOS.
    """
    bos, longest = models.bos(model), models.info(model).shape.n_ctx
    for ids in items:
        ids = list(ids[1:]) if len(ids) and ids[0] == bos else list(ids)
        for start in range(0, len(ids), longest - 1):
            yield [bos, *ids[start : start + longest - 1]]


# ------------------------------------------------------------------------------------------------------------- batches


def batches_of_one_length(
    rows: Sequence[Sequence[int] | Int[Tensor, " pos"]], batch_tokens: int
) -> Iterator[tuple[list[int], Int[Tensor, "row pos"]]]:
    """(numbers, tokens) of rows of one length, about so many tokens at a time, so that nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for length, numbers in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            yield chosen, torch.stack([torch.as_tensor(rows[number]) for number in chosen])


def token_batches(
    rows: Iterable[Sequence[int] | Int[Tensor, " pos"]], bos: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Int[Tensor, "row pos"]]:
    """Rows of tokens as batches, in their order. Shorter rows are filled up with BOS at their end, where causal
    attention keeps it from what stands before; ``feature_search`` does not count it."""
    batch: list[list[int]] = []
    for row in rows:
        row = [int(token) for token in row]
        if batch and max(len(row), *map(len, batch)) * (len(batch) + 1) > batch_tokens:
            yield _padded(batch, bos)
            batch = []
        batch.append(row)
    if batch:
        yield _padded(batch, bos)


def _padded(rows: Sequence[Sequence[int]], bos: int) -> Int[Tensor, "row pos"]:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[bos] * (longest - len(row))] for row in rows])


# --------------------------------------------------------------------------------------------------------- activations


def row_activations(model: Any, rows: Sequence[Sequence[int]], site: str, layer: int) -> Float[Tensor, "token d_model"]:
    """Activations of a site at every token but BOS, row after row, heads laid side by side.

    Rows of one length run together, so that nothing is padded.

    Raises:
        ValueError: no rows, or as ``models.cache``.
    """
    bos = models.bos(model)
    kept: list[Tensor | None] = [None] * len(rows)
    for chosen, tokens in batches_of_one_length(rows, BATCH_TOKENS):
        values = models.cache(model, tokens, [site], [layer])[site, layer].flatten(2)
        for i, row, value in zip(chosen, tokens, values, strict=True):
            kept[i] = value[row.to(value.device) != bos]
    if not rows:
        raise ValueError("No rows of tokens.")
    return torch.cat(kept)


class ActivationBuffer:
    """Batches of shuffled activations, a buffer at a time: computed once, then dealt out from memory.

    The order depends on the seed and the buffer's number alone, so a run that is resumed at (buffer, batch) sees the
    batches that it would have seen. An epoch over the source follows on another, in a new order.
    """

    def __init__(
        self, model: Any, source: TokenSource, site: str, layer: int, *, batch_size: int, buffer_tokens: int,
        seed: int, first_item: int = 0, passes: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.source, self.site, self.layer = model, source, site, layer
        self.batch_size, self.seed, self.passes = batch_size, seed, passes
        self.buffer_tokens = max(buffer_tokens, batch_size)
        self.first_item, self.item, self.number, self.batch, self.epoch = first_item, first_item, 0, 0, 0
        self.values: Tensor | None = None
        self._end = first_item

    def state(self) -> dict[str, int]:
        """Where the next batch comes from."""
        return {"item": self.item, "number": self.number, "batch": self.batch, "epoch": self.epoch}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.item, self.number, self.batch, self.epoch = (state[key] for key in ("item", "number", "batch", "epoch"))
        self.values = None

    def fill(self) -> Float[Tensor, "token d_model"]:
        """The buffer that the next batch comes from, in the order of the rows."""
        if self.values is None:
            rows, total, end, bos = [], 0, self.item, models.bos(self.model)
            for number, row in self.source.rows(self.item):
                if total >= self.buffer_tokens and number >= end:
                    break
                rows.append(row)
                total, end = total + sum(token != bos for token in row), number + 1
            if total < self.batch_size and self.item > self.first_item:  # the source is at its end
                self.item, self.epoch = self.first_item, self.epoch + 1
                return self.fill()
            if total < self.batch_size:
                raise ValueError(
                    f"{self.source.name} holds {total} tokens, less than one batch of {self.batch_size}. Give more "
                    "text, or a smaller batch_size."
                )
            self.values, self._end = row_activations(self.model, rows, self.site, self.layer), end
        return self.values

    def __iter__(self) -> ActivationBuffer:
        return self

    def __next__(self) -> Float[Tensor, "batch d_model"]:
        values = self.fill()
        per_pass = len(values) // self.batch_size
        if self.batch >= per_pass * self.passes:
            self.item, self.number, self.batch, self.values = self._end, self.number + 1, 0, None
            return next(self)
        this_pass, place = divmod(self.batch, per_pass)
        if place == 0 or getattr(self, "_order_of", None) != (self.number, this_pass):
            generator = torch.Generator().manual_seed(hash((self.seed, self.number, this_pass)) % 2**62)
            self._order = torch.randperm(len(values), generator=generator).to(values.device)
            self._order_of = (self.number, this_pass)
        self.batch += 1
        return values[self._order[place * self.batch_size : (place + 1) * self.batch_size]]
