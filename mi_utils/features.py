"""Features of a sparse autoencoder on many tokens: when they are active, what they write, what changing them does.

The dictionary is anything with the attributes of :class:`Dictionary`; ``load_sae`` returns one.

Sources: Bricken et al. 2023, "Towards Monosemanticity", for top and quantile examples, densities and logit effects;
Templeton et al. 2024, "Scaling Monosemanticity", for steering.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import models, probing
from mi_utils.probing import Direction, random_direction
from mi_utils.prompts import PromptPairs

if TYPE_CHECKING:
    import xarray as xr

TIES = "of equal activations the earlier token"
OCTAVES, PARTS = (-10, 10), 4  # the histogram: powers of two from 2**-10 to 2**10, each cut into four equal parts
N_BINS = (OCTAVES[1] - OCTAVES[0]) * PARTS + 2  # and one below, one above
SAVE_EVERY = 30.0  # seconds
FORMAT = 3  # of the file in which a search is kept


class Dictionary(Protocol):
    """What is asked of a sparse autoencoder: where it reads, how it encodes, and what each feature writes.

    ``directions`` [feature, d_model] are in activation units: a feature of activation a adds ``a * directions[i]`` to
    the reconstruction. ``encode`` goes from [..., d_model] to [..., feature], none negative.
    """

    site: str
    layer: int
    n_features: int
    d_model: int
    directions: Float[Tensor, "feature d_model"]

    def encode(self, activations: Float[Tensor, "... d_model"]) -> Float[Tensor, "... feature"]: ...


def check_dictionary(model: Any, sae: Dictionary) -> None:
    """Refuse a dictionary that cannot belong to this model. One that can say so itself (``check_model``) is asked.

    Raises:
        ValueError: unknown site or layer, or another width than the model's stream.
    """
    if hasattr(sae, "check_model"):
        sae.check_model(model)
    info = models.info(model)
    models.hook_name(sae.site, sae.layer)
    if not 0 <= sae.layer < info.shape.n_layers:
        raise ValueError(
            f"The dictionary reads layer {sae.layer}; {info.name} has {info.shape.n_layers}, counted from 0."
        )
    d_model = models.W_U(model).shape[0]
    if sae.site in probing.STREAM_SITES and sae.d_model != d_model:
        raise ValueError(f"The dictionary is {sae.d_model} wide, {sae.site} of {info.name} {d_model}: not its model.")


def feature_activations(
    model: Any, sae: Dictionary, tokens: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos feature"]:
    """Activation of every feature at every position. BOS is in there; it is not like other tokens.

    Raises:
        ValueError: the model's own activations are no numbers.
    """
    with torch.no_grad():
        kept = models.cache(model, tokens, [sae.site], layers=[sae.layer])[sae.site, sae.layer]
        if not torch.isfinite(kept.sum(dtype=torch.float32)):
            raise ValueError(
                f"{sae.site} of layer {sae.layer} holds values that are no numbers on these tokens: it overflows in "
                f"{models.info(model).dtype}. Try another dtype."
            )
        return sae.encode(kept.flatten(2))  # heads side by side


# --------------------------------------------------------------------------------------------------------- the stream


def feature_search(
    model: Any,
    sae: Dictionary,
    batches: Iterable[Int[Tensor, "row pos"]],
    *,
    n_tokens: int | None = None,
    top: int = 20,
    draws: int = 40,
    window: tuple[int, int] = (16, 8),
    seed: int = 0,
    save: str | Path | None = None,
    save_every: float = SAVE_EVERY,
    progress: bool = True,
) -> xr.Dataset:
    """Examples, histogram and density of every feature, in one pass over a stream of tokens.

    Memory does not grow with the number of tokens: for each feature the ``top`` strongest examples are kept, and
    ``draws`` examples drawn evenly from all tokens on which it is active. Every token has a random number that
    depends on its place in the stream and the seed alone, and the tokens with the smallest are the draws. So the
    result is what one would get by storing everything. Of equal activations the earlier token is the stronger one.

    A token counts unless it is BOS, EOS or padding.

    Args:
        batches: rows of tokens, BOS first; ``token_batches`` makes them from rows of any length. An endless
            stream will do.
        n_tokens: the stream ends with the batch that reaches so many counted tokens; by default at its own end.
        window: how many tokens before and after an example to keep beside it.
        save: file in which the search is kept. A search that was cut short goes on from there: give the same stream
            from its beginning; what has been counted is skipped, not run.
        save_every: seconds between two writings of the file.

    Returns:
        A dataset over ``feature`` with

        * ``histogram`` (feature, bin), counts; ``bin`` is the lower edge, in activation units;
        * ``active``, on how many tokens, and ``density``, the same as a share;
        * ``top_activation``, ``top_token`` (feature, rank), the strongest first; ``top_token`` is the token's place
          in the stream, -1 where there are fewer examples (activation NaN);
        * ``top_context`` (feature, rank, offset), token ids around it, -1 beyond the row's ends and on padding, and
          ``top_around``, the feature's activation on each of them;
        * ``sample_activation`` and so on (feature, draw, …), the drawn examples, the strongest first.

    Raises:
        ValueError: a dictionary of another model, no tokens, a row without BOS, a file that holds another search, or a
            stream that does not begin as it did.
    """
    check_dictionary(model, sae)
    before, after = window
    if top < 1 or draws < 1 or min(before, after) < 0:
        raise ValueError(f"top={top}, draws={draws}, window={window}: keep at least one example, and no negative room.")
    search = _Search(model, sae, top, draws, window, seed)
    path = None if save is None else Path(save)
    fingerprint = search.fingerprint(model)
    if path is not None and path.exists():
        search.restore(path, fingerprint)
        if n_tokens is not None and search.before_last >= n_tokens:
            raise ValueError(f"{path} already holds {search.counted} tokens: more than n_tokens={n_tokens} would give.")
    bos, excluded = models.bos(model), _special_ids(model)
    skip, crc, written, number = search.batches, 0, search.batches, -1
    last = time.monotonic()
    with _bar(n_tokens, batches, progress) as bar:
        for number, tokens in enumerate(batches):
            tokens = torch.as_tensor(tokens)
            if tokens.ndim != 2 or not tokens.numel():
                raise ValueError(f"A batch is [row, pos], not of shape {tuple(tokens.shape)}.")
            if (tokens[:, 0] != bos).any():
                raise ValueError(f"A row does not begin with BOS ({bos}): without it, activations are different ones.")
            if number < skip:
                crc = _crc(crc, tokens)
                if number == skip - 1 and crc != search.crc:
                    raise ValueError(f"{path} was kept from another stream of tokens: it does not begin like this one.")
                bar.update(tokens.numel())
                continue
            if n_tokens is not None and search.counted >= n_tokens:
                break
            activations = feature_activations(model, sae, tokens)
            if number == skip and not torch.isfinite(activations).all():
                raise ValueError("The dictionary gives activations that are no numbers: its weights are damaged.")
            search.add(tokens, activations, _counts(tokens, excluded))
            del activations  # before the next ones are made
            search.crc = crc = _crc(crc, tokens)
            bar.update(tokens.numel())
            if path is not None and time.monotonic() - last >= save_every:
                search.write(path, fingerprint)
                last, written = time.monotonic(), search.batches
    if number + 1 < skip:
        raise ValueError(f"{path} was kept from a longer stream: {skip} batches, and this one has {number + 1}.")
    if not search.counted:
        raise ValueError("The stream holds no token that counts: give rows with more than BOS.")
    if path is not None and search.batches > written:
        search.write(path, fingerprint)
    return search.result(model)


def _bar(n_tokens: int | None, batches: Any, progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = n_tokens
    if total is None and isinstance(batches, Sequence):
        total = sum(int(np.prod(batch.shape)) for batch in batches)
    return tqdm(total=total, desc="feature search", unit="token", unit_scale=True, disable=not progress, delay=5)


def _special_ids(model: Any) -> Int[Tensor, " special"]:
    ids = {getattr(model.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return torch.tensor(sorted(each for each in ids if each is not None), dtype=torch.long)


def _counts(tokens: Int[Tensor, "row pos"], excluded: Int[Tensor, " special"]) -> Bool[np.ndarray, " token"]:
    return ~torch.isin(tokens.cpu(), excluded).flatten().numpy()


def _crc(crc: int, tokens: Int[Tensor, "row pos"]) -> int:
    shape = repr(tuple(tokens.shape)).encode()
    return zlib.crc32(np.ascontiguousarray(tokens.cpu().numpy().astype(np.int64)).data, zlib.crc32(shape, crc))


def lots(places: Int[np.ndarray, " token"], seed: int) -> Int[np.ndarray, " token"]:
    """A random number below 2**63 for each place in a stream, no two the same. (Steele et al. 2014, SplitMix64.)"""
    with np.errstate(over="ignore"):
        x = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= np.uint64(zlib.crc32(str(seed).encode()) << 20)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x.view(np.int64) ^ np.int64(np.iinfo(np.int64).min)  # in the order of the signed numbers, still one to one


def bin_edges() -> Float[np.ndarray, " bin"]:
    """Lower edge of each bin of the histogram, in activation units. The first reaches from 0, the last to infinity."""
    low, high = OCTAVES
    inside = [2.0**octave * (1 + part / PARTS) for octave in range(low, high) for part in range(PARTS)]
    return np.array([0.0, *inside, 2.0**high])


def _bins(values: Float[np.ndarray, " entry"]) -> Int[np.ndarray, " entry"]:
    # The exponent and the first two digits of a float32 are the number of its bin: exact, and no logarithm.
    return np.clip((values.view(np.int32) >> 21) - (127 + OCTAVES[0]) * PARTS + 1, 0, N_BINS - 1)


def _strongest_first(
    values: Float[np.ndarray, " entry"], places: Int[np.ndarray, " entry"]
) -> Int[np.ndarray, " entry"]:
    """Keys in the order of falling activations, of equal ones in the order of places (of each 2**32 of them)."""
    # The bits of a positive float32 are in the order of the numbers.
    return (places & 0xFFFFFFFF) - (values.view(np.int32).astype(np.int64) << 32)


class _Kept:
    """For each feature the ``k`` entries with the smallest keys, in no order. No two entries have the same key."""

    def __init__(self, n_features: int, k: int, width: int) -> None:
        self.k = k
        self.key = np.full((n_features, k), np.iinfo(np.int64).max)
        self.token = np.full((n_features, k), -1, np.int64)
        self.value = np.full((n_features, k), np.nan, np.float32)
        self.context = np.full((n_features, k, width), -1, np.int32)
        self.around = np.zeros((n_features, k, width), np.float32)
        self.slot, self.last = np.zeros(n_features, np.int64), self.key[:, 0].copy()
        self.small = np.min_scalar_type(n_features)  # numbers of 16 bits are sorted by counting

    def find_last(self, features: Int[np.ndarray, " feature"]) -> None:
        """Where the last of these features' entries stands, and its key. An empty slot comes after all."""
        self.slot[features] = slot = self.key[features].argmax(1)
        self.last[features] = self.key[features, slot]

    def offer(self, entries: _Entries, keys: np.ndarray) -> None:
        # Most entries of a long stream end here: they come after the last one kept.
        good = np.flatnonzero(keys < self.last[entries.feature])
        if not len(good):
            return
        # By feature, and of one feature by key.
        good = good[np.argsort(keys[good])]
        good = good[np.argsort(entries.feature[good].astype(self.small), kind="stable")]
        feature = entries.feature[good]
        first = np.flatnonzero(np.diff(feature, prepend=-1))
        count = np.diff(first, append=len(good))
        # While a feature has empty slots, all at once; then one entry of each at a time takes the place of the last.
        filled = (self.token[feature[first]] >= 0).sum(1)
        slot = np.arange(len(good)) - np.repeat(first - filled, count)
        turn = np.maximum(slot - self.k + 1, 0)
        in_turn, ends = np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn))
        taken, where = [], []
        for now, (start, end) in enumerate(pairwise([0, *ends])):
            entry, into = good[in_turn[start:end]], slot[in_turn[start:end]]
            if now:
                entry = entry[keys[entry] < self.last[entries.feature[entry]]]
                into = self.slot[entries.feature[entry]]
                if not len(entry):
                    break
            touched = entries.feature[entry]
            self.key[touched, into] = keys[entry]
            self.token[touched, into] = entries.token[entry]
            self.value[touched, into] = entries.value[entry]
            self.find_last(touched if now else np.unique(touched))
            taken.append(entry)
            where.append(touched * self.k + into)
        # In the order of the stream, so that windows that lie side by side are read one after the other.
        taken, where = np.concatenate(taken), np.concatenate(where)
        order = np.argsort(taken)
        for kept, windows in zip((self.context, self.around), entries.windows(taken[order]), strict=True):
            kept.reshape(-1, kept.shape[-1])[where[order]] = windows


@dataclass(frozen=True)
class _Entries:
    """The active features of one batch: an entry for each pair of token and feature."""

    feature: Int[np.ndarray, " entry"]
    place: Int[np.ndarray, " entry"]  # in the batch
    token: Int[np.ndarray, " entry"]  # in the stream
    value: Float[np.ndarray, " entry"]
    tokens: Int[Tensor, "row pos"]
    activations: Float[Tensor, "row pos feature"]
    counts: Bool[np.ndarray, " token"]
    offsets: Int[np.ndarray, " offset"]

    @cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Windows of tokens, and of which of them count, from each place of the padded rows [place, offset]."""
        rows, counts = self.tokens.numpy(), self.counts.reshape(self.tokens.shape)
        length, room = rows.shape[1], ((0, 0), (-self.offsets[0], self.offsets[-1]))
        # Behind a row's last token that counts there is padding.
        inside = np.arange(length) < (length - counts[:, ::-1].argmax(1))[:, None]

        def windows(values: np.ndarray, beyond: int) -> np.ndarray:
            padded = np.pad(values, room, constant_values=beyond).ravel()
            return np.lib.stride_tricks.sliding_window_view(padded, len(self.offsets))

        return windows(np.where(inside, rows, -1), -1), windows(counts, False)

    def windows(self, chosen: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and activations of the feature, around some of the entries [n, offset]."""
        length, n_features = self.activations.shape[1:]
        row, pos = np.divmod(self.place[chosen], length)
        start = row * (length + len(self.offsets) - 1) + pos
        where = (self.place[chosen] * n_features + self.feature[chosen])[:, None] + self.offsets * n_features
        where = torch.from_numpy(where).clamp_(0, self.activations.numel() - 1)
        found = self.activations.take(where.to(self.activations.device)).float().cpu().numpy()
        tokens, counts = self._padded
        return tokens[start], np.where(counts[start], found, 0)


class _Search:
    """What is kept of a stream."""

    def __init__(self, model: Any, sae: Dictionary, top: int, draws: int, window: tuple[int, int], seed: int) -> None:
        self.sae, self.seed = sae, seed
        self.offsets = np.arange(-window[0], window[1] + 1)
        self.histogram = np.zeros((sae.n_features, N_BINS), np.int64)
        self.top = _Kept(sae.n_features, top, len(self.offsets))
        self.sample = _Kept(sae.n_features, draws, len(self.offsets))
        self.batches = self.seen = self.counted = self.crc = 0
        self.before_last = 0  # counted before the last batch

    def add(
        self,
        tokens: Int[Tensor, "row pos"],
        activations: Float[Tensor, "row pos feature"],
        counts: Bool[np.ndarray, " token"],
    ) -> None:
        place, feature, value = _active(activations.flatten(0, 1), counts)
        entries = _Entries(feature, place, self.seen + place, value, tokens.cpu(), activations, counts, self.offsets)
        np.add.at(self.histogram.ravel(), feature * N_BINS + _bins(value), 1)
        self.top.offer(entries, _strongest_first(value, entries.token))
        self.sample.offer(entries, lots(self.seen + np.arange(len(counts)), self.seed)[place])
        self.seen += len(counts)
        self.before_last = self.counted
        self.counted += int(counts.sum())
        self.batches += 1

    def result(self, model: Any) -> xr.Dataset:
        import xarray as xr

        active = self.histogram.sum(1)

        def variables(name: str, dim: str, kept: _Kept) -> dict[str, Any]:
            order = np.lexsort((kept.token, -np.nan_to_num(kept.value, nan=-np.inf)), axis=-1)
            parts = {part: getattr(kept, part) for part in ("token", "context", "around")} | {"activation": kept.value}
            every = np.arange(len(order))[:, None]
            return {
                f"{name}_{part}": (("feature", dim, "offset")[: values.ndim], values[every, order])
                for part, values in parts.items()
            }

        info = models.info(model)
        return xr.Dataset(
            {
                "histogram": (("feature", "bin"), self.histogram),
                "active": ("feature", active),
                "density": ("feature", active / self.counted),
                **variables("top", "rank", self.top),
                **variables("sample", "draw", self.sample),
            },
            coords={
                "feature": np.arange(self.sae.n_features), "rank": np.arange(self.top.k),
                "draw": np.arange(self.sample.k), "offset": self.offsets, "bin": bin_edges(),
            },
            attrs={
                "model": info.name, "processing": info.processing, "seed": self.seed, "site": self.sae.site,
                "layer": self.sae.layer, "n_tokens": self.counted, "ties": TIES, "excluded": "BOS, EOS and padding",
            },
        )  # fmt: skip

    # -- kept in a file

    def _arrays(self) -> dict[str, np.ndarray]:
        kept = {"top": self.top, "sample": self.sample}
        fields = ("key", "token", "value", "context", "around")
        return {"histogram": self.histogram} | {
            f"{name}_{field}": getattr(each, field) for name, each in kept.items() for field in fields
        }

    def write(self, path: Path, fingerprint: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        numbers = np.array([self.batches, self.seen, self.counted, self.before_last, self.crc])
        with beside.open("wb") as file:
            np.savez(file, feature_search=np.array(fingerprint), numbers=numbers, **self._arrays())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def restore(self, path: Path, fingerprint: str) -> None:
        try:
            with np.load(path) as saved:
                found = str(saved["feature_search"])
                arrays = {name: saved[name] for name in (*self._arrays(), "numbers")} if found == fingerprint else {}
        except Exception as error:  # whatever someone else's file makes np.load raise
            raise ValueError(f"{path} holds no feature search: {error}. Delete it, or give another path.") from error
        if found != fingerprint:
            raise ValueError(
                f"{path} holds another search (other model, dictionary, window, seed or number of examples). Give this "
                "one a path of its own, or delete the file."
            )
        for name, own in self._arrays().items():
            own[...] = arrays[name]
        for kept in (self.top, self.sample):
            kept.find_last(np.arange(len(kept.key)))
        numbers = (int(each) for each in arrays["numbers"])
        self.batches, self.seen, self.counted, self.before_last, self.crc = numbers

    def fingerprint(self, model: Any) -> str:
        """Hash of all that decides the numbers beside the stream."""
        info = models.info(model)
        about = (
            FORMAT, info.name, info.processing, info.dtype, self.sae.site, self.sae.layer, self.seed, self.top.k,
            self.sample.k, self.offsets.tolist(),
        )  # fmt: skip
        digest = hashlib.sha256(repr(about).encode())
        inner, passport = getattr(self.sae, "inner", None), getattr(self.sae, "passport", None)
        digest.update(repr(getattr(passport, "activation", "")).encode())
        own = inner.state_dict().values() if isinstance(inner, torch.nn.Module) else [self.sae.directions.detach()]
        for weights in (models.W_U(model), *own):
            digest.update(weights.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _active(
    flat: Float[Tensor, "token feature"], counts: Bool[np.ndarray, " token"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place, feature and activation of what is above zero at tokens that count, in the order of places."""
    if flat.device.type != "cpu":
        where = ((flat > 0) & torch.from_numpy(counts).to(flat.device)[:, None]).nonzero()
        values = flat[where[:, 0], where[:, 1]].float()
        return (*where.cpu().numpy().T, values.cpu().numpy())
    values = flat.float().contiguous().numpy()
    above = values > 0
    above[~counts] = False
    # Few are: packed eight to a byte, most bytes are empty and need no second look.
    packed = np.packbits(above)
    some = np.flatnonzero(packed != 0)
    inside = np.flatnonzero(np.unpackbits(packed[some]).view(bool))
    entries = some[inside >> 3] * 8 + (inside & 7)
    place = entries // flat.shape[1]
    return place, entries - place * flat.shape[1], values.ravel()[entries]


# ----------------------------------------------------------------------------------------------------------- examples


class Example(NamedTuple):
    """A token on which a feature is active, and what stands around it.

    ``share`` is the share of the feature's active tokens that are weaker: 1 for the strongest of all.
    """

    words: tuple[str, ...]
    activations: tuple[float, ...]
    at: int  # which of the words
    activation: float
    share: float
    token: int  # place in the stream


def examples(search: xr.Dataset, model: Any, feature: int, n: int = 8, *, which: str = "top") -> list[Example]:
    """Examples of a feature from :func:`feature_search`, the strongest first; none of one that was never active.

    Args:
        which: "top", the strongest; or "quantiles", one from the middle of each of ``n`` equal parts of its active
            tokens, as far as the drawn ones tell.

    Raises:
        ValueError: unknown ``which``, or a feature that is not there.
    """
    if which not in ("top", "quantiles"):
        raise ValueError(f"which={which!r}: the strongest ('top'), or spread over all active tokens ('quantiles').")
    if feature not in search["feature"].values:
        raise ValueError(f"No feature {feature}: the search has {search.sizes['feature']}, counted from 0.")
    name, dim = ("top", "rank") if which == "top" else ("sample", "draw")
    one = search.sel(feature=feature)
    there = int((one[f"{name}_token"] >= 0).sum())
    n = min(n, there)
    rows = np.arange(n) if which == "top" else ((np.arange(n) + 0.5) * there / max(n, 1)).astype(int)
    active = int(one["active"])
    found = []
    for row in rows.tolist():
        entry = one.isel({dim: row})
        context, around = entry[f"{name}_context"].values, entry[f"{name}_around"].values
        inside = context >= 0
        share = 1 - row / active if which == "top" else 1 - (row + 0.5) / there
        found.append(Example(
            words=tuple(models.token_strings(model, context[inside])),
            activations=tuple(around[inside].tolist()),
            at=int(inside[: int((search["offset"].values < 0).sum())].sum()),
            activation=float(entry[f"{name}_activation"]),
            share=float(share),
            token=int(entry[f"{name}_token"]),
        ))  # fmt: skip
    return found


def logit_effects(
    model: Any, sae: Dictionary, features: Sequence[int] | None = None, *, tokens: Sequence[str] | None = None,
    top: int = 10,
) -> xr.DataArray | xr.Dataset:  # fmt: skip
    """What a feature writes straight to the logits: its direction through the final norm and the unembedding.

    The final norm is taken as linear: it centres (where the model's does), multiplies by its weight, and does not
    divide. So the unit is logits per unit of activation, times the norm's own scale at the token, which is the same
    for all features. The mean over the vocabulary is taken off, since it moves no probability.

    Args:
        features: all by default.
        tokens: only these, each a single token of the model.
        top: without ``tokens``, how many of the most promoted and most suppressed tokens.

    Returns:
        With ``tokens`` an array over (feature, token). Without, a dataset over (feature, rank) with ``promoted``,
        ``promoted_effect``, ``suppressed`` and ``suppressed_effect``, tokens as text.

    What it does not show: the indirect effect, through later layers, which for features of early layers is most of it.

    Raises:
        ValueError: a dictionary that does not write to the stream or belongs to another model, features that are not
            there, a text that is not one token.
    """
    import xarray as xr

    check_dictionary(model, sae)
    if sae.site not in (*probing.STREAM_SITES, "resid_mid"):
        raise ValueError(f"Features at {sae.site} do not write to the stream: they have no direct effect on logits.")
    features = np.arange(sae.n_features) if features is None else np.asarray(features, dtype=int)
    if len(wrong := features[(features < 0) | (features >= sae.n_features)]):
        raise ValueError(f"No features {wrong.tolist()}: there are {sae.n_features}, counted from 0.")
    ids = None if tokens is None else torch.tensor([models.single_token(model, text) for text in tokens])
    norm, unembedding = models.final_norm(model), models.W_U(model).float()
    info = models.info(model)
    attrs = {
        "model": info.name, "processing": info.processing, "seed": info.seed, "site": sae.site, "layer": sae.layer,
        "final_norm": "linear, not divided by its scale", "units": "logits per unit of activation",
    }  # fmt: skip
    written = sae.directions.detach()[torch.as_tensor(features)].float().to(unembedding.device)
    if norm.centred:
        written = written - written.mean(-1, keepdim=True)
    written = written * norm.weight.float()
    average = unembedding.mean(-1)
    if ids is not None:
        values = written @ (unembedding[:, ids] - average[:, None])
        return xr.DataArray(
            values.double().cpu().numpy(), dims=("feature", "token"),
            coords={"feature": features, "token": list(tokens)}, attrs=attrs, name="logit effect",
        )  # fmt: skip
    parts: dict[str, list] = {"promoted": [], "promoted_effect": [], "suppressed": [], "suppressed_effect": []}
    for chunk in written.split(1024):
        effects = chunk @ unembedding - (chunk @ average)[:, None]
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * effects).topk(min(top, effects.shape[1]))
            parts[f"{name}_effect"].append(sign * best.values.double().cpu().numpy())
            parts[name].append([models.token_strings(model, row) for row in best.indices.cpu()])
    return xr.Dataset(
        {name: (("feature", "rank"), np.concatenate(rows)) for name, rows in parts.items()},
        coords={"feature": features}, attrs=attrs,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- interventions


def feature_directions(
    sae: Dictionary, feature: int, *, random: int = 8, random_features: int = 8, seed: int = 0,
    among: Sequence[int] | None = None,
) -> dict[str, Direction]:  # fmt: skip
    """A feature's direction, for ``steer`` and ``erase``, beside its controls, all of one length.

    Returns:
        By name: the feature itself; it "negated"; "random 0" … drawn evenly from all directions; "feature 7" … of
        other features. ``kind`` says which: "feature", "negated", "random", "random feature". One unit of scale is
        one unit of the feature's activation.

    Args:
        among: the features that the random ones are drawn from, such as those that are not dead.

    Raises:
        ValueError: a feature that is not there, a direction without length, or fewer other features than asked for.
    """
    if not 0 <= feature < sae.n_features:
        raise ValueError(f"No feature {feature}: there are {sae.n_features}, counted from 0.")
    directions = sae.directions.detach().float().cpu()
    vector, lengths = directions[feature], directions.norm(dim=-1)
    if not lengths[feature] > 0:
        raise ValueError(f"Feature {feature} has a direction without length: it writes nothing.")
    candidates = np.arange(sae.n_features) if among is None else np.unique(np.asarray(among, dtype=int))
    candidates = candidates[(candidates != feature) & (lengths[candidates] > 0).numpy()]
    if len(candidates) < random_features:
        raise ValueError(f"{random_features} other features asked for, and there are {len(candidates)}.")
    others = np.random.default_rng(seed).choice(candidates, random_features, replace=False)

    def direction(vector: Tensor, kind: str, number: int = feature) -> Direction:
        about = f"feature {number}"
        return Direction(vector, torch.zeros_like(vector), sae.site, sae.layer, about, f"no {about}", kind)

    own = direction(vector, "feature")
    return {
        f"feature {feature}": own,
        "negated": direction(-vector, "negated"),
        **{f"random {i}": random_direction(own, seed=1000 * seed + i) for i in range(random)},
        **{
            f"feature {i}": direction(directions[i] * lengths[feature] / lengths[i], "random feature", i)
            for i in sorted(others.tolist())
        },
    }  # fmt: skip


def steer_feature(
    model: Any, sae: Dictionary, pairs: PromptPairs, feature: int, scales: Sequence[float], *,
    pos: int | Sequence[int] = -1, metric: str = "logit_diff", random: int = 8, random_features: int = 8,
    seed: int = 0, among: Sequence[int] | None = None,
) -> xr.DataArray:  # fmt: skip
    """Add a feature's direction to the clean run, at several scales, beside its controls: dose and response.

    Args:
        scales: how many units of activation to add. What the feature reaches by itself is the measure: see
            ``top_activation``.
        pos, metric: as in ``probing.steer``.
        random, random_features, seed, among: as in :func:`feature_directions`.

    Returns:
        As ``probing.steer``: (direction, scale, prompt), with ``kind`` along direction, receipts in the attributes;
        and ``activation``, the feature's own activation on each clean prompt (the largest over ``pos``).

    Raises:
        ValueError, NothingChanged: as ``probing.steer`` and :func:`feature_directions`.
    """
    check_dictionary(model, sae)
    directions = feature_directions(
        sae, feature, random=random, random_features=random_features, seed=seed, among=among
    )
    result = probing.steer(model, pairs, directions, scales, pos=pos, metric=metric)
    return _with_activation(result, model, sae, pairs, feature)


def ablate_feature(
    model: Any, sae: Dictionary, pairs: PromptPairs, feature: int, *, pos: int | Sequence[int] | None = None,
    metric: str = "logit_diff", random: int = 8, random_features: int = 8, seed: int = 0,
    among: Sequence[int] | None = None,
) -> xr.DataArray:  # fmt: skip
    """Take what a feature writes out of the clean run: wherever it is active, its activation times its direction.

    The controls take the same amount at the same places along another direction; "negated" puts it there twice.

    Args:
        pos: at which positions; by default all but BOS.

    Returns:
        Over (direction, prompt) the metric after ablation; otherwise as :func:`steer_feature`.

    What it does not show: other features, and the part of the activation that the dictionary does not reconstruct,
    may carry the same. No loss is no proof that the feature does nothing.

    Raises:
        ValueError: as :func:`steer_feature`.
        NothingChanged: the feature is active on none of these prompts, at none of these positions.
    """
    check_dictionary(model, sae)
    directions = feature_directions(
        sae, feature, random=random, random_features=random_features, seed=seed, among=among
    )
    pos = range(1, pairs.clean_tokens.shape[1]) if pos is None else pos

    def taker(direction: Direction) -> Any:
        vector = direction.vector.to(models.info(model).device)

        def take(x: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt pos d_model"]:
            return x - sae.encode(x)[..., feature, None].mul(vector).to(x.dtype)

        return take

    edits = {(name,): taker(direction) for name, direction in directions.items()}
    result = probing.intervene(model, pairs, directions, edits, (), pos, metric, "ablating").rename("ablation")
    return _with_activation(result, model, sae, pairs, feature)


def _with_activation(
    result: xr.DataArray, model: Any, sae: Dictionary, pairs: PromptPairs, feature: int
) -> xr.DataArray:
    positions = result.attrs["positions"]
    parts = [
        feature_activations(model, sae, rows)[:, positions, feature].amax(1).float().cpu()
        for rows in pairs.clean_tokens.split(probing.BATCH)
    ]
    own = torch.cat(parts).double().numpy()
    return result.assign_coords(activation=("prompt", own)).assign_attrs(feature=feature)


def against_controls(result: xr.DataArray, sign: int = 1) -> xr.Dataset:
    """A feature's effect beside that of its controls, from :func:`steer_feature` or :func:`ablate_feature`.

    Args:
        sign: of the change that was predicted for the feature, at a positive scale: 1 or -1. The opposite is
            predicted at negative scales.

    Returns:
        Over ``scale`` where there is one: ``as_predicted``, the share of prompts whose metric changes that way;
        ``change``, the feature's mean change; for each kind of control ``random``, ``random_feature``, ``negated``
        the mean absolute change of a prompt; and ``ratio``, the feature's mean absolute change by that of random
        directions. Scale 0 is left out.

    Raises:
        ValueError: a sign that is none, or no random directions to compare with.
    """
    import xarray as xr

    if sign not in (1, -1):
        raise ValueError(f"sign={sign}: predict a rise (1) or a fall (-1).")
    kinds = result["kind"].values
    if "random" not in kinds:
        raise ValueError("No random directions to compare with: ask for some, random=8.")
    change = result - result["clean"]
    if "scale" in result.dims:
        change = change.sel(scale=change["scale"] != 0)
        sign = sign * np.sign(change["scale"])
    own = change.isel(direction=int(np.flatnonzero(kinds == "feature")[0]), drop=True)
    size = {
        str(kind).replace(" ", "_"): np.abs(change.isel(direction=kinds == kind)).mean(("direction", "prompt"))
        for kind in dict.fromkeys(kinds.tolist())
        if kind != "feature"
    }
    found = {
        "as_predicted": (own * sign > 0).mean("prompt"),
        "change": own.mean("prompt"),
        **size,
        "ratio": np.abs(own).mean("prompt") / size["random"],
    }
    return xr.Dataset({name: part.reset_coords(drop=True) for name, part in found.items()}, attrs=dict(result.attrs))
