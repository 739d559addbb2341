"""Feature search over 1 M tokens and 2,048 features, beside the model and the encoder alone.

The peer's work is the least that any search has to do: activations of one layer, encoded, and thrown away. Both run
batch by batch in turns, on the same batch. The encoder is as cheap as they come (one product and a threshold), with 16
features active on a token, so that what the search adds shows as much as it can.

Memory: the most that was resident in the second quarter of the stream and in the last. What a search keeps does not
grow; what else moves is the allocator, which holds on to some of the batches' activations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from common import Row, threads

from mi_utils import load_model
from mi_utils.features import feature_activations, feature_search
from mi_utils.tokens import token_batches

TITLE = "Feature search"
N_TOKENS, N_FEATURES, L0 = 1_000_000, 2048, 16


class Encoder:
    """Drawn directions, each with the threshold that the same share of tokens reaches."""

    site, layer = "resid_post", 1

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.d_model, self.n_features = 128, N_FEATURES
        drawn = torch.randn(N_FEATURES, self.d_model, generator=torch.Generator().manual_seed(0))
        self.directions = drawn / drawn.norm(dim=-1, keepdim=True)
        self.weights, self.bias = self.directions.T.contiguous(), torch.zeros(N_FEATURES)
        active = feature_activations(model, self, tokens).flatten(0, 1)
        self.bias = active.topk(len(active) * L0 // N_FEATURES, dim=0).values[-1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """One product, one subtraction, one comparison."""
        return torch.addmm(-self.bias, x.flatten(0, -2), self.weights).relu_().unflatten(0, x.shape[:-1])


def _stream(model: Any, n_tokens: int) -> Iterator[torch.Tensor]:
    """Documents of the corpus, each a row, with others of about its length."""
    from mi_utils.smallworld.corpus import documents

    bos, texts, done = model.tokenizer.bos_token_id, (document.text for document in documents(40_000)), 0
    while done < n_tokens:
        rows = sorted(([bos, *ids] for ids in model.tokenizer(list(islice(texts, 4096)))["input_ids"]), key=len)
        for batch in token_batches(rows, bos):
            yield batch
            done += int((batch != bos).sum())
            if done >= n_tokens:
                return


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def search(n_tokens: int = N_TOKENS) -> Row:
    """One pass, in which the peer's work stands between the batches that the search asks for."""
    model = load_model("smallworld", device="cpu")
    batches = list(_stream(model, n_tokens))  # made beforehand: the corpus's own caches grow
    first = torch.cat([batch[:, :16] for batch in batches[:30] if batch.shape[1] >= 16])
    sae = Encoder(model, first)
    seconds, resident = {"ours": 0.0, "theirs": 0.0}, [0, 0, 0, 0, 0]
    largest, active, counted = torch.zeros(N_FEATURES), 0.0, 0

    def turns() -> Iterator[torch.Tensor]:
        nonlocal largest, active, counted
        for batch in batches:
            start = time.perf_counter()
            found = feature_activations(model, sae, batch)
            between = time.perf_counter()
            seconds["theirs"] += between - start
            counts = batch != model.tokenizer.bos_token_id
            found *= counts[..., None]
            largest = torch.maximum(largest, found.flatten(0, 1).amax(0))
            active, counted = active + int(found.count_nonzero()), counted + int(counts.sum())
            start = time.perf_counter()
            del found
            seconds["theirs"] += time.perf_counter() - start
            quarter = 4 * counted // n_tokens
            resident[quarter] = max(resident[quarter], _resident())
            start = time.perf_counter()
            yield batch
            seconds["ours"] += time.perf_counter() - start

    result = feature_search(model, sae, turns(), progress=False)
    strongest = torch.from_numpy(result["top_activation"].values[:, 0]).nan_to_num(0)
    second, fourth = (resident[quarter] / 2**20 for quarter in (1, 3))
    return Row(
        work=f"top, drawn examples, histograms: {result.attrs['n_tokens']:,} tokens, {N_FEATURES:,} features, embedded "
        f"model, layer {sae.layer}",
        peer="model and encoder alone", threads=torch.get_num_threads(), ours=seconds["ours"],
        theirs=seconds["theirs"], ratio=seconds["theirs"] / seconds["ours"], bar=0.9,
        difference=float((strongest - largest).abs().max()),
        note=f"Feature search: a ratio of 1 would be a search that costs nothing; {active / counted:.0f} features "
        f"active on a token. Most memory resident: {second:.0f} MB in the second quarter of the stream, {fourth:.0f} "
        "MB in the last.",
    )  # fmt: skip


def main() -> list[Row]:
    """The table's rows: one thread."""
    with threads(1):
        return [search()]
