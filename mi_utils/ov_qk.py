"""What a head's weights say: the OV circuit (what it writes for what it reads) and the QK circuit (what it looks for).

A head has two products of its four matrices. ``W_V W_O`` [d_model, d_model] says what is written where something was
read; ``W_Q W_Kᵀ`` says how well a query and a key match. Both have rank d_head at most, so they are kept as two thin
factors, and whatever is asked of them is asked of the factors: nothing here is d_vocab × d_vocab, and norms and
eigenvalues come from d_head × d_head products.

Weights are read as the normalised stream meets them: the LayerNorm's weight, its centring and its bias are folded in,
whatever the model's processing. What remains of LayerNorm is a division by the stream's scale, which depends on the
prompt. It is left out where nothing is said: it stretches a circuit's rows and does not turn them.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models

if TYPE_CHECKING:
    import xarray as xr

Ids = Sequence[int] | Int[Tensor, " token"] | np.ndarray
EMBEDDINGS = ("direct", "effective")
COMPOSITIONS = ("q", "k", "v")
PARTS = ("component", "head", "moved")


class NotInTheWeights(ValueError):
    """The attention scores of this model are not a product that its weights alone give."""


# ------------------------------------------------------------------------------------------------------------ factors


def read_weights(
    model: Any, layer: int, which: str
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    """Weight and bias with: a head's "q", "k" or "v" = (stream / scale) @ weight + bias, in float32.

    The scale is the LayerNorm's: the root of the (centred) stream's mean square plus epsilon. A head's keys and
    values come with a copy for each head where heads share them.

    Raises:
        ValueError: neither q, k nor v; a layer that the model has not.
    """
    readers = {"q": models.W_Q, "k": models.W_K, "v": models.W_V}
    if which not in readers:
        raise ValueError(f"Heads read q, k and v, not {which!r}.")
    check_index("layer", layer, models.info(model).shape.n_layers)
    norm = models.attention_norm(model, layer)
    stored = readers[which](model, layer).float()
    bias = models.attention_bias(model, layer, which).float() + norm.bias.float() @ stored
    weight = norm.weight.float()[:, None] * stored
    return (weight - weight.mean(1, keepdim=True) if norm.centred else weight), bias


def ov_factors(
    model: Any, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
    """W_V and W_O of a layer's heads: a head adds ``(stream / scale) @ W_V @ W_O`` for each position that it attends
    to, times its attention (and a constant, from biases)."""
    return read_weights(model, layer, "v")[0], models.W_O(model, layer).float()


def qk_factors(
    model: Any, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_model d_head"]]:
    """W_Q, divided by sqrt(d_head), and W_K of a layer's heads: the score of a query and a key is
    ``(x_query / scale) @ W_Q @ W_K.T @ (x_key / scale)``, and terms from biases.

    Raises:
        NotInTheWeights: rotary or ALiBi positions, or normalised queries and keys.
    """
    if not models.scores_are_bilinear(model):
        raise NotInTheWeights(
            f"{models.info(model).name} turns queries and keys by their positions (rotary), biases scores by distance, "
            "or normalises queries and keys: W_Q W_Kᵀ alone is not what its heads score with, and numbers read off it "
            "would be about another model. Look at patterns (attention_patterns, head_scores), or at a model with "
            "learned position embeddings. The OV circuit is not affected."
        )
    q, k = read_weights(model, layer, "q")[0], read_weights(model, layer, "k")[0]
    return q * models.attention_scale(model, layer), k


def token_vectors(model: Any, tokens: Ids | None = None, embedding: str = "direct") -> Float[Tensor, "token d_model"]:
    """What stands in the stream for a token before any head has read: a row a token, all tokens by default.

    Args:
        embedding: "direct" is W_E; "effective" adds what the first MLP writes for it, as later layers find it. The
            first layer's attention is left out of both.

    Raises:
        ValueError: unknown embedding, or a token that the vocabulary has not.
    """
    if embedding not in EMBEDDINGS:
        raise ValueError(f"Unknown embedding {embedding!r}: use {' or '.join(EMBEDDINGS)}.")
    vectors = models.W_E(model)
    if tokens is not None:
        vectors = vectors[_ids(tokens, len(vectors)).to(vectors.device)]
    if embedding == "effective":
        vectors = torch.cat([part + models.mlp(model, 0, part[None])[0] for part in vectors.split(4096)])
    return vectors.float()


def _unembedding(model: Any, tokens: Ids | None = None) -> Float[Tensor, "d_model token"]:
    """Read through the last LayerNorm's weight and centring; its scale is left out."""
    norm, w_u = models.final_norm(model), models.W_U(model)
    if tokens is not None:
        w_u = w_u[:, _ids(tokens, w_u.shape[1]).to(w_u.device)]
    read = norm.weight.float()[:, None] * w_u.float()
    return read - read.mean(0, keepdim=True) if norm.centred else read


def _normalised(vectors: Float[Tensor, "... d_model"], norm: models.Norm) -> Float[Tensor, "... d_model"]:
    """Divided by the scale that LayerNorm would find if the stream held this and nothing else."""
    centred = vectors - vectors.mean(-1, keepdim=True) if norm.centred else vectors
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()


# ---------------------------------------------------------------------------------------------------------------- OV


def ov_circuit(
    model: Any, layer: int, head: int, tokens: Ids, outputs: Ids | None = None, *, embedding: str = "direct"
) -> xr.DataArray:
    """What a head adds to the logits of ``outputs`` where it attends to each of ``tokens``: W_E W_V W_O W_U.

    Args:
        tokens: ids of what is read (rows).
        outputs: ids of what is written (columns); ``tokens`` by default.
        embedding: see :func:`token_vectors`.

    Returns:
        Dims (source, output), in logits before the last LayerNorm's scale, so compare entries and not sizes with
        logits. Coordinates ``source_token``, ``output_token``. Adding a constant to a row changes no prediction.

    What it does not show: where the head attends, and what it reads there beside the token (positions, what earlier
    layers wrote).

    Raises:
        ValueError: a layer, head or token that is not there.
    """
    import xarray as xr

    info = models.info(model)
    check_index("head", head, info.shape.n_heads)
    w_v, w_o = (factor[head] for factor in ov_factors(model, layer))
    outputs = tokens if outputs is None else outputs
    read = _normalised(token_vectors(model, tokens, embedding), models.attention_norm(model, layer))
    values = (read @ w_v) @ (w_o @ _unembedding(model, outputs))
    names = [models.token_strings(model, _ids(ids, info.shape.d_vocab)) for ids in (tokens, outputs)]
    return xr.DataArray(
        values.cpu().numpy(),
        dims=("source", "output"),
        coords={
            "source": np.arange(len(names[0])), "output": np.arange(len(names[1])),
            "source_token": ("source", names[0]), "output_token": ("output", names[1]),
        },
        attrs=_attrs(model, embedding=embedding, heads=[f"L{layer}H{head}"], units="logits, unscaled"),
        name="OV circuit",
    )  # fmt: skip


def copying_scores(model: Any, *, tokens: Ids | None = None, embedding: str = "direct") -> xr.DataArray:
    """How far each head raises the logit of what it reads: sum of the eigenvalues of W_E W_V W_O W_U, over the sum of
    their absolute values (Elhage et al. 2021).

    The d_vocab × d_vocab matrix is never made. It has rank d_head, and its non-zero eigenvalues are those of the
    d_head × d_head product taken in the other order, W_O (W_U W_E) W_V; what stands in brackets is made once for all
    heads.

    Args:
        tokens: restrict reading and writing to these (names, say); all by default.
        embedding: see :func:`token_vectors`. Where embeddings are tied, or the first MLP rewrites them, "effective"
            is closer to what later layers read.

    Returns:
        Dims (layer, head): 1 where all eigenvalues are positive (copying), -1 where all are negative (anti-copying),
        near 0 where the head does neither; 0 where its OV matrix is zero.

    What it does not show: whether the head is ever used so. It is a statement about weights, scale-free: a head that
    writes next to nothing can have any score. Eigenvectors can overlap, so it is not exact for single tokens either.

    Raises:
        ValueError: unknown embedding, or a token that the vocabulary has not.
    """
    gram = _unembedding(model, tokens) @ token_vectors(model, tokens, embedding)
    scores = []
    for layer in range(models.info(model).shape.n_layers):
        w_v, w_o = ov_factors(model, layer)
        scores.append(_positivity(w_o, gram, w_v))
    return _per_head(model, scores, "copying", embedding=embedding)


def _positivity(
    left: Float[Tensor, "head d_head d_model"], gram: Tensor, right: Float[Tensor, "head d_model d_head"]
) -> np.ndarray:
    """Sum of the product's eigenvalues over the sum of their absolute values; 0 where only rounding is left of them.

    The sum is real: complex eigenvalues come in pairs.
    """
    eigenvalues = torch.linalg.eigvals((left @ gram @ right).cpu())
    total = eigenvalues.abs().sum(-1)
    rounding = 1e-5 * (left.flatten(1).norm(dim=-1) * gram.norm() * right.flatten(1).norm(dim=-1)).cpu()
    return torch.where(total > rounding, eigenvalues.real.sum(-1) / total.clamp_min(1e-30), 0.0).numpy()


# -------------------------------------------------------------------------------------------------------- composition


def composition_scores(model: Any, kind: str, *, n_random: int = 20, seed: int = 0) -> xr.DataArray:
    """How much of what one head writes lies where a later head reads: ‖W_OV W‖ / (‖W_OV‖ ‖W‖), Frobenius norms.

    Args:
        kind: what the later head reads with: "q" (W is its W_Q W_Kᵀ), "k" (W_K W_Qᵀ) or "v" (its W_V W_O).
        n_random, seed: random matrices of the same shapes for the baseline.

    Returns:
        Dims (writer, reader), labelled "L0H1"; NaN where the reader is not in a later layer. The attributes
        ``baseline`` and ``baseline_sd`` are mean and standard deviation over pairs of random matrices. A product with
        a matrix turned at random has a squared score of 1 / d_model on average, whatever its singular values.

    What it does not show: whether the later head looks at where the earlier one wrote. Scores a little above the
    baseline are common; the MLPs and LayerNorm in between are left out.

    Raises:
        ValueError: unknown kind.
        NotInTheWeights: kinds "q" and "k" with rotary positions and the like.
    """
    import xarray as xr

    if kind not in COMPOSITIONS:
        raise ValueError(f"Unknown kind {kind!r}: heads compose by {', '.join(COMPOSITIONS)}.")
    shape = models.info(model).shape
    written = [ov_factors(model, layer) for layer in range(shape.n_layers)]
    read = [_reading(model, layer, kind) for layer in range(shape.n_layers)]
    scores = np.full((shape.n_layers, shape.n_heads, shape.n_layers, shape.n_heads), np.nan)
    for early in range(shape.n_layers):
        for late in range(early + 1, shape.n_layers):
            scores[early, :, late] = _composition(written[early], read[late]).cpu().numpy()

    generator = torch.Generator().manual_seed(seed)
    down, up = (n_random, shape.d_model, shape.d_head), (n_random, shape.d_head, shape.d_model)
    draws = [torch.randn(size, generator=generator) for size in (down, up, down, up)]
    baseline = _composition((draws[0], draws[1]), (draws[2], draws[3]))
    names = [f"L{layer}H{head}" for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    return xr.DataArray(
        scores.reshape(len(names), len(names)), dims=("writer", "reader"), coords={"writer": names, "reader": names},
        attrs=_attrs(model, kind=kind, baseline=float(baseline.mean()), baseline_sd=float(baseline.std())),
        name=f"{kind.upper()}-composition",
    )  # fmt: skip


def _reading(model: Any, layer: int, kind: str) -> tuple[Tensor, Tensor]:
    """Factors [head, d_model, d_head] and [head, d_head, d_model] of what a layer's heads do with what they read."""
    if kind == "v":
        return ov_factors(model, layer)
    q, k = qk_factors(model, layer)
    return (q, k.transpose(1, 2)) if kind == "q" else (k, q.transpose(1, 2))


def _composition(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Float[Tensor, "first second"]:
    """Scores of all pairs. An orthogonal factor changes no Frobenius norm: of A B C D only the triangles of A and D
    are needed, and all products are d_head × d_head."""
    (a, b), (c, d) = first, second
    left, right = torch.linalg.qr(a).R, torch.linalg.qr(d.transpose(1, 2)).R.transpose(1, 2)
    middle = torch.einsum("fkm,sml->fskl", b, c)
    product = (left[:, None] @ middle @ right[None]).flatten(2).norm(dim=-1)
    norms = [(triangle @ other).flatten(1).norm(dim=-1) for triangle, other in ((left, b), (c, right))]
    size = norms[0][:, None] * norms[1][None]
    return torch.where(size > 0, product / size.clamp_min(1e-30), 0.0)


# ---------------------------------------------------------------------------------------------------------------- QK


def position_pattern(model: Any, layer: int, n: int | None = None) -> xr.DataArray:
    """The attention that positions alone would give: each head's pattern over a text of average tokens.

    The stream is taken as the mean token embedding plus the position embedding, on the scale that the two have
    together for a typical token. No model is run.

    Args:
        n: number of positions; 40, or what the context holds, by default.

    Returns:
        Dims (layer, head, query, key), layer of length 1; rows over ``key`` sum to 1.

    What it does not show: for layers after the first, what earlier layers have added, positions included.

    Raises:
        ValueError: more positions than the context has.
        NotInTheWeights: see :func:`qk_factors`.
    """
    import xarray as xr

    info = models.info(model)
    n = min(40, info.shape.n_ctx) if n is None else n
    if not 1 <= n <= info.shape.n_ctx:
        raise ValueError(f"n={n} positions: {info.name} has {info.shape.n_ctx}.")
    qk_factors(model, layer)  # refuses
    tokens, positions = models.W_E(model).float(), models.W_pos(model)[:n].float()
    norm = models.attention_norm(model, layer)
    if norm.centred:
        tokens, positions = (each - each.mean(-1, keepdim=True) for each in (tokens, positions))
    stream = tokens.mean(0) + positions
    spread = (tokens - tokens.mean(0)).pow(2).mean()  # what a single token has and the average has not
    stream = stream / (stream.pow(2).mean(-1, keepdim=True) + spread + norm.epsilon).sqrt()
    (w_q, b_q), (w_k, b_k) = (read_weights(model, layer, which) for which in ("q", "k"))
    queries, keys = stream @ w_q + b_q[:, None], stream @ w_k + b_k[:, None]
    scores = queries @ keys.transpose(1, 2) * models.attention_scale(model, layer)
    hidden = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    coords = {"layer": [layer], "head": np.arange(info.shape.n_heads), "query": np.arange(n), "key": np.arange(n)}
    return xr.DataArray(
        pattern[None].cpu().numpy(), dims=tuple(coords), coords=coords, attrs=_attrs(model), name="attention"
    )


def matching_scores(
    model: Any, *, through: tuple[int, int] | None = None, tokens: Ids | None = None, embedding: str = "direct"
) -> xr.DataArray:
    """How far each head prefers keys of the query's own token: the sum of the eigenvalues of W_E W_Q W_Kᵀ W_Eᵀ over
    the sum of their absolute values. The twin of :func:`copying_scores`; from a d_head × d_head product too.

    Args:
        through: (layer, head) of an earlier head whose output the key is: W_E W_Q (W_E W_V W_O W_K)ᵀ. With a
            previous-token head, a positive score is the QK side of an induction head: it looks for places whose
            *predecessor* is the query's token. Layers up to and including this head's then have no score (NaN).
        tokens, embedding: as in :func:`copying_scores`. A head of the first layer always reads "direct" ones.

    Returns:
        Dims (layer, head), from -1 to 1; near 0 where the same token is neither sought nor avoided; 0 where the
        matrix is zero.

    What it does not show: that other parts of the score (positions, what earlier layers wrote) do not outweigh this.

    Raises:
        ValueError: a head or token that is not there.
        NotInTheWeights: see :func:`qk_factors`.
    """
    shape = models.info(model).shape
    seen = token_vectors(model, tokens, embedding)
    gram, first = seen.T @ seen, token_vectors(model, tokens)  # the first layer reads before any MLP wrote
    if through is not None:
        check_index("layer", through[0], shape.n_layers)
        check_index("head", through[1], shape.n_heads)
        w_v, w_o = (factor[through[1]] for factor in ov_factors(model, through[0]))
        read = first if through[0] == 0 else seen
        gram = w_o.T @ (w_v.T @ (read.T @ seen))  # [d_model, d_model]: (W_E W_V W_O)ᵀ W_E
    scores = []
    for layer in range(shape.n_layers):
        q, k = qk_factors(model, layer)
        if through is not None and layer <= through[0]:
            scores.append(np.full(shape.n_heads, np.nan))
        else:
            scores.append(_positivity(k.transpose(1, 2), first.T @ first if layer == 0 else gram, q))
    return _per_head(
        model, scores, "matching", embedding=embedding,
        through="none" if through is None else "L{}H{}".format(*through),
    )  # fmt: skip


def weight_scores(model: Any, *, tokens: Ids | None = None, embedding: str = "direct") -> xr.Dataset:
    """What the QK weights alone say about each head, beside what ``head_scores`` sees its pattern do.

    Returns:
        Over (layer, head): ``previous_token``, the mean attention to the position before in :func:`position_pattern`
        (0 to 1); ``duplicate_token``, the :func:`matching_scores` of tokens (-1 to 1); ``induction``, the same through
        the head with the largest ``previous_token`` (attribute ``previous_token_head``), 0 where no layer comes after.

    What it does not show: the pattern. The three are statements about the embeddings; what earlier layers wrote, and
    the size of the scores, decide what a head really looks at.

    Raises:
        NotInTheWeights: see :func:`qk_factors`.
    """
    import xarray as xr

    shape = models.info(model).shape
    previous = []
    for layer in range(shape.n_layers):
        pattern = position_pattern(model, layer).values[0]
        previous.append(np.diagonal(pattern, -1, axis1=-2, axis2=-1)[:, 1:].mean(-1))
    best = np.unravel_index(np.argmax(previous[: max(1, shape.n_layers - 1)]), (shape.n_layers, shape.n_heads))
    through = (int(best[0]), int(best[1]))
    induction = matching_scores(model, through=through, tokens=tokens, embedding=embedding).fillna(0.0)
    return xr.Dataset(
        {
            "previous_token": _per_head(model, previous, "previous_token"),
            "duplicate_token": matching_scores(model, tokens=tokens, embedding=embedding),
            "induction": induction,
        },
        attrs=_attrs(model, embedding=embedding, previous_token_head="L{}H{}".format(*through)),
    )


def score_parts(
    model: Any, tokens: Int[Tensor, "prompt pos"], layer: int, head: int, by: str = "component"
) -> xr.DataArray:
    """A head's attention scores on real prompts, by who wrote what the query and the key were read from.

    The stream is a sum (token embedding, position embedding, every earlier attention and MLP), and the score is
    linear in the query's stream and in the key's. So it is a sum over pairs of writers.

    Args:
        tokens: with BOS, as ``pairs.clean_tokens``.
        by: "component"; "head" to take earlier attention apart into heads; or "moved" to take the first layer's apart
            into the token embeddings and the position embeddings that its heads moved ("moved token", "moved
            position"), so that a key that knows its predecessor can be told from one that knows a place.

    Returns:
        Dims (prompt, query_part, key_part, query, key), in nats of log odds; sums over both parts to the score before
        the softmax. ``bias`` holds the biases of q and k. What is the same for all keys of a query (all of
        key_part "bias") changes no attention. Scores of keys that the causal mask hides are there all the same.

    What it does not show: each part's own cause; LayerNorm's scale is held at the value that this run gave it.

    Raises:
        ValueError: unknown ``by``, a layer or head that the model has not.
        NotInTheWeights: see :func:`qk_factors`.
    """
    import xarray as xr

    if by not in PARTS:
        raise ValueError(f"Unknown by={by!r}: use one of {', '.join(PARTS)}.")
    info = models.info(model)
    check_index("head", head, info.shape.n_heads)
    check_index("layer", layer, info.shape.n_layers)
    qk_factors(model, layer)  # refuses
    stream = models.cache(model, tokens, ["resid_pre"], layers=[layer])["resid_pre", layer].float()
    norm = models.attention_norm(model, layer)
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    writers = {name: written / scale for name, written in _writers(model, tokens, layer, by).items()}
    sides = []
    for which in ("q", "k"):
        weight, bias = (parameter[head] for parameter in read_weights(model, layer, which))
        parts = [written @ weight for written in writers.values()]
        sides.append(torch.stack([*parts, bias.expand_as(parts[0])], 1))
    scores = torch.einsum("pqid,pkjd->pqkij", *sides) * models.attention_scale(model, layer)
    names = [*writers, "bias"]
    positions = np.arange(tokens.shape[1])
    coords = {
        "prompt": np.arange(len(tokens)), "query_part": names, "key_part": names, "query": positions, "key": positions,
    }  # fmt: skip
    attrs = _attrs(model, heads=[f"L{layer}H{head}"], units="nats")
    return xr.DataArray(scores.cpu().numpy(), dims=tuple(coords), coords=coords, attrs=attrs, name="attention score")


def _writers(model: Any, tokens: Tensor, layer: int, by: str) -> dict[str, Float[Tensor, "prompt pos d_model"]]:
    """All that was written to the stream before a layer."""
    start = models.cache(model, tokens, ["resid_pre"], layers=[0])["resid_pre", 0].float()
    position = models.position_embedding(model, tokens).float()
    written = {"token": start - position, "position": position}
    if layer == 0:
        return written
    cached = models.cache(model, tokens, ["z" if by == "head" else "attn_out", "mlp_out"], layers=range(layer))
    if by == "moved":
        written |= _moved(model, tokens, start, written)
        written["attn bias L0"] = cached["attn_out", 0].float() - written["moved token"] - written["moved position"]
    for earlier in range(layer):
        if by == "head":
            z, w_o = cached["z", earlier].float(), models.W_O(model, earlier).float()
            for head in range(w_o.shape[0]):
                written[f"L{earlier}H{head}"] = z[:, :, head] @ w_o[head]
            written[f"attn bias L{earlier}"] = models.b_O(model, earlier).float().expand_as(start)
        elif by != "moved" or earlier > 0:
            written[f"attn L{earlier}"] = cached["attn_out", earlier].float()
        written[f"mlp L{earlier}"] = cached["mlp_out", earlier].float()
    return written


def _moved(model: Any, tokens: Tensor, start: Tensor, read: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first layer's heads wrote, by which of the embeddings they read it from; biases left out."""
    norm = models.attention_norm(model, 0)
    centred = start - start.mean(-1, keepdim=True) if norm.centred else start
    scale = (centred.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    pattern = models.cache(model, tokens, ["pattern"], layers=[0])["pattern", 0].float()
    w_v, w_o = ov_factors(model, 0)
    values = {name: torch.einsum("pkm,hmd->phkd", part / scale, w_v) for name, part in read.items()}
    return {f"moved {name}": torch.einsum("phqd,hdm->pqm", pattern @ value, w_o) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------ details


def check_index(what: str, index: int, there: int) -> None:
    if not 0 <= index < there:
        raise ValueError(f"The model has no {what} {index}: it has {there}, counted from 0.")


def _ids(tokens: Ids, d_vocab: int) -> Int[Tensor, " token"]:
    ids = torch.as_tensor(np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens), dtype=torch.long)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"Tokens are a list of ids, with at least one in it; these have the shape {tuple(ids.shape)}.")
    if ((ids < 0) | (ids >= d_vocab)).any():
        raise ValueError(
            f"Token ids outside the vocabulary of {d_vocab}: {ids[(ids < 0) | (ids >= d_vocab)].tolist()}."
        )
    return ids


def _attrs(model: Any, **more: Any) -> dict[str, Any]:
    info = models.info(model)
    return {"model": info.name, "processing": info.processing, "seed": info.seed, **more}


def _per_head(model: Any, rows: Sequence[np.ndarray], name: str, **more: Any) -> xr.DataArray:
    import xarray as xr

    values = np.stack(rows).astype(float)
    coords = {"layer": np.arange(values.shape[0]), "head": np.arange(values.shape[1])}
    return xr.DataArray(values, dims=("layer", "head"), coords=coords, attrs=_attrs(model, **more), name=name)
