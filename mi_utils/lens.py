"""Logit lens and tuned lens: what would the model answer if it stopped after this layer?

Layer 0 is the embeddings, layer l the residual stream after l blocks, and the last layer the model's own output.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, "Eliciting Latent Predictions
from Transformers with the Tuned Lens" (arXiv:2303.08112).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.prompts import PromptPairs
from mi_utils.tokens import BATCH_TOKENS, batches_of_one_length

if TYPE_CHECKING:
    import xarray as xr

    Rows = Sequence[Int[Tensor, " pos"]]

# --------------------------------------------------------------------------------------------------- the tuned lens


@dataclass(frozen=True)
class TunedLens:
    """An affine translator for each layer: ``h + h @ weight[layer] + bias[layer]`` is what the unembedding reads.

    With zeros it is the logit lens. The last layer has no translator: there the lens is the model.

    Attributes:
        weight, bias: for the layers 0 … n_layers - 1 (before each block), float32.
        about: model, processing and seed it was trained on, and how.
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    about: dict[str, Any]

    @classmethod
    def identity(cls, model: Any) -> TunedLens:
        """The lens before training, which is the logit lens."""
        about = models.info(model)
        n_layers, d_model = about.shape.n_layers, models.W_U(model).shape[0]
        weight = torch.zeros(n_layers, d_model, d_model, device=about.device)
        bias = torch.zeros(n_layers, d_model, device=about.device)
        return cls(weight, bias, _about(model))

    def translate(self, stream: Float[Tensor, "... d_model"], layer: int) -> Float[Tensor, "... d_model"]:
        """The stream of a layer in the terms of the last layer, for :func:`models.unembed`.

        Raises:
            ValueError: a layer that the lens has not.
        """
        n_layers = len(self.weight)
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer={layer}: this lens has layers 0 to {n_layers}.")
        if layer == n_layers:
            return stream
        wide = stream.float()
        return (wide + wide @ self.weight[layer] + self.bias[layer]).to(stream.dtype)

    def check_model(self, model: Any) -> None:
        """Refuse a model that the lens was not trained on: other weights speak another language.

        Raises:
            ValueError: name, processing, size or (of random weights) seed differ.
        """
        here = _about(model)
        if wrong := [f"{key} {self.about.get(key)!r}, not {here[key]!r}" for key in here
                     if self.about.get(key) != here[key]]:  # fmt: skip
            raise ValueError(
                f"This tuned lens was trained on another model: {'; '.join(wrong)}. Train one for this model."
            )

    def save(self, path: str | Path) -> Path:
        """Write the lens as a safetensors file; what it was trained on goes into the file's metadata."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        save_file(tensors, path, metadata={"tuned_lens": json.dumps(self.about)})
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any) -> TunedLens:
        """Read a saved lens for a model.

        Raises:
            ValueError: the file holds no tuned lens, or that of another model.
        """
        from safetensors import safe_open

        with safe_open(path, "pt", device=models.info(model).device) as file:
            about = (file.metadata() or {}).get("tuned_lens")
            if about is None:
                raise ValueError(f"{path} holds no tuned lens. TunedLens.save writes one.")
            lens = cls(file.get_tensor("weight"), file.get_tensor("bias"), json.loads(about))
        lens.check_model(model)
        return lens


def _about(model: Any) -> dict[str, Any]:
    info = models.info(model)
    return {
        "model": info.name,
        "processing": info.processing,
        "n_layers": info.shape.n_layers,
        "weights_seed": info.seed if info.random_weights else None,
    }


def train_tuned_lens(
    model: Any,
    rows: Rows,
    *,
    steps: int = 250,
    batch_size: int = 256,
    learning_rate: float = 5e-3,
    seed: int = 0,
    shuffle_targets: bool = False,
    progress: bool = True,
) -> TunedLens:
    """Train an affine translator for each layer, from the identity, to minimise KL(model ‖ lens).

    The model stays as it is. Adam, with a learning rate that falls linearly to nothing. The embedded model takes well
    under a minute on one core; the cost is that of (n_layers + 1) × 3 unembeddings of ``steps × batch_size`` tokens.
    The streams of all rows are held in memory: tokens × (n_layers + 1) × d_model numbers.

    Args:
        rows: from ``token_rows``. Keep some back to judge the lens on (:func:`lens_quality`).
        batch_size: tokens in one step.
        shuffle_targets: the control. Each token gets the final distribution of another one, so all that can be
            learned is how common each answer is. What a real lens gains over this one is about the token.

    What it does not show: a translator is trained to predict the output, so it may find what the model would only
    use later, or never; it is a probe with the model's output as label.

    Raises:
        ValueError: no rows, or numbers below 1.
        RuntimeError: the loss of a layer rose or is not a number: the learning rate is too high.

    Source: Belrose et al. 2023 (arXiv:2303.08112), section 3.
    """
    if min(steps, batch_size) < 1 or learning_rate <= 0:
        raise ValueError(f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}: all must be above 0.")
    if not len(rows):
        raise ValueError("No rows to train on: token_rows(model) makes some.")
    from tqdm import tqdm

    streams = torch.cat([stream.flatten(1, 2) for _, stream in _row_streams(model, rows)], dim=1)
    start = TunedLens.identity(model)
    lens = TunedLens(start.weight.requires_grad_(), start.bias.requires_grad_(), start.about)
    optimiser = torch.optim.Adam([lens.weight, lens.bias], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    n_layers, n_tokens = len(lens.weight), streams.shape[1]
    losses = np.empty((steps, n_layers))
    bar = tqdm(range(steps), desc="tuned lens", unit="step", disable=not progress, leave=False, delay=5)
    for step in bar:
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        chosen = torch.randint(n_tokens, (batch_size,), generator=generator).to(streams.device)
        final = models.unembed(model, streams[-1, chosen]).float().log_softmax(-1)
        if shuffle_targets:
            final = final[torch.randperm(batch_size, generator=generator).to(final.device)]
        for layer in range(n_layers):  # one at a time: only one layer's logits are held
            loss = _kl(final, _read(model, streams[layer, chosen], layer, lens).log_softmax(-1)).mean()
            loss.backward()
            losses[step, layer] = loss.item()
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix(kl=f"{losses[step].mean():.3f}", refresh=False)
    ends = max(1, steps // 10)
    before, after = losses[:ends].mean(0), losses[-ends:].mean(0)
    if not (after <= before + 1e-3).all():
        raise RuntimeError(
            f"KL by layer went from {before.round(3).tolist()} to {after.round(3).tolist()}: the learning rate "
            f"{learning_rate} is too high for this model. Try a tenth of it."
        )
    about = start.about | {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "shuffled_targets": shuffle_targets, "n_tokens": n_tokens,
    }  # fmt: skip
    return TunedLens(lens.weight.detach(), lens.bias.detach(), about)


# ----------------------------------------------------------------------------------------------------------- reading


def logit_lens(
    model: Any, pairs: PromptPairs, *, on: str = "clean", batch_size: int = 32, tuned: TunedLens | None = None
) -> xr.Dataset:
    """Read the residual stream after every layer with the model's own final LayerNorm and unembedding.

    Args:
        on: "clean" or "corrupted" prompts.
        batch_size: prompts at a time; one layer's logits ``[prompt, pos, d_vocab]`` are held in memory.
        tuned: a tuned lens to read with instead.

    Returns:
        Variables over (prompt, layer, pos); layer 0 is the embeddings, layer l the stream after l blocks, so the
        last is the model's own output. ``log_prob`` of the correct answer (nats), ``logit_diff`` between the two
        answers, ``rank`` of the correct answer (0 = first), ``kl`` from the model's output to the lens (nats).

    What it does not show: early layers need not write in the basis that the unembedding reads. A lens that sees
    nothing does not prove that nothing is there.

    Raises:
        ValueError: ``on`` is neither "clean" nor "corrupted", or the tuned lens belongs to another model.
        RuntimeError: the last layer of the lens is not the model's own output (an architecture whose last step
            this lens does not know).
    """
    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: read the lens on 'clean' or 'corrupted' prompts.")
    import xarray as xr

    pairs.check_model(model)
    _check_tuned(model, tuned)
    tokens = pairs.clean_tokens if on == "clean" else pairs.corrupted_tokens
    n_layers = models.info(model).shape.n_layers
    size = (len(pairs), n_layers + 1, tokens.shape[1])
    values = {name: np.empty(size) for name in ("log_prob", "logit_diff", "rank", "kl")}

    correct, incorrect = (torch.as_tensor(ids) for ids in (pairs.correct_ids, pairs.incorrect_ids))
    for rows in torch.arange(len(pairs)).split(batch_size):
        batch = tokens[rows]
        final = models.run(model, batch).float().log_softmax(-1)
        index = {
            "correct": correct[rows].to(final.device)[:, None, None].expand(*final.shape[:2], 1),
            "incorrect": incorrect[rows].to(final.device)[:, None, None].expand(*final.shape[:2], 1),
        }
        for layer, stream in enumerate(_streams(model, batch)):
            logits = _read(model, stream, layer, tuned)
            log_probs = logits.log_softmax(-1)
            right = logits.gather(-1, index["correct"])
            here = {
                "log_prob": log_probs.gather(-1, index["correct"])[..., 0],
                "logit_diff": (right - logits.gather(-1, index["incorrect"]))[..., 0],
                "rank": (logits > right).sum(-1),
                "kl": _kl(final, log_probs),
            }
            for name, value in here.items():
                values[name][rows.numpy(), layer] = value.cpu().double().numpy()
        _check_last(model, log_probs, final, stream.dtype)

    return xr.Dataset(
        {name: (("prompt", "layer", "pos"), value) for name, value in values.items()},
        coords={
            "prompt": np.arange(len(pairs)),
            "template": ("prompt", list(pairs.template)),
            "pos": np.arange(tokens.shape[1]),
            "token": ("pos", list((pairs if on == "clean" else pairs.swap()).position_labels)),
            **_layer_coords(n_layers),
        },
        attrs=_attrs(model, tuned) | {"on": on},
    )


def top_tokens(model: Any, prompt: str, k: int = 5, *, tuned: TunedLens | None = None) -> xr.Dataset:
    """The likeliest next tokens by layer and position, for one prompt.

    Returns:
        Over (layer, pos, rank): ``top_token``, the token as text, and ``probability``, which is that of the lens.

    Raises:
        ValueError: as :func:`models.to_tokens`; ``k`` below 1; the tuned lens belongs to another model.
    """
    import xarray as xr

    if k < 1:
        raise ValueError(f"k={k}: ask for at least one token.")
    tokens = models.to_tokens(model, [prompt])
    _check_tuned(model, tuned)
    found = [
        _read(model, stream, layer, tuned)[0].softmax(-1).topk(k)
        for layer, stream in enumerate(_streams(model, tokens))
    ]
    ids = torch.stack([each.indices for each in found]).cpu()
    texts = np.array(models.token_strings(model, ids.flatten())).reshape(ids.shape)
    shown = ["BOS", *(text.strip() or repr(text) for text in models.token_strings(model, tokens[0, 1:]))]
    return xr.Dataset(
        {
            "top_token": (("layer", "pos", "rank"), texts),
            "probability": (("layer", "pos", "rank"), torch.stack([each.values for each in found]).cpu().numpy()),
        },
        coords={
            "pos": np.arange(len(shown)),
            "token": ("pos", [f"{place} {text}" for place, text in enumerate(shown)]),
            "rank": np.arange(k),
            **_layer_coords(models.info(model).shape.n_layers),
        },
        attrs=_attrs(model, tuned) | {"prompt": prompt},
    )


def lens_quality(model: Any, rows: Rows, *, tuned: TunedLens | None = None) -> xr.Dataset:
    """How far a lens is from the model's own output, on rows that a tuned lens was not trained on.

    Returns:
        ``kl`` over (prompt, layer): KL(model ‖ lens), mean over a row's positions, nats. ``agreement`` over (prompt,
        layer): share of positions where lens and model have the same first token. ``bias`` over (layer,): KL from
        the model's marginal distribution to the lens's, both averaged over all tokens first, nats. A lens without
        bias says each token as often as the model does, and can still be wrong every time. ``prompt`` counts rows.

    Raises:
        ValueError: no rows, or the tuned lens belongs to another model.

    Source: Belrose et al. 2023 (arXiv:2303.08112), section 2, for the bias.
    """
    import xarray as xr

    if not len(rows):
        raise ValueError("No rows to judge the lens on: token_rows(model) makes some.")
    _check_tuned(model, tuned)
    n_layers = models.info(model).shape.n_layers
    kl, agreement = np.empty((len(rows), n_layers + 1)), np.empty((len(rows), n_layers + 1))
    marginal: list[Any] = [0.0] * (n_layers + 1)
    for chosen, streams in _row_streams(model, rows):
        final = models.unembed(model, streams[-1]).float().log_softmax(-1)
        for layer, stream in enumerate(streams):
            log_probs = _read(model, stream, layer, tuned).log_softmax(-1)
            kl[chosen, layer] = _kl(final, log_probs).mean(-1).cpu()
            agreement[chosen, layer] = (log_probs.argmax(-1) == final.argmax(-1)).float().mean(-1).cpu()
            marginal[layer] = marginal[layer] + log_probs.double().exp().sum((0, 1)).cpu()
    shares = torch.stack(marginal)
    shares = shares / shares.sum(-1, keepdim=True)
    bias = (shares[-1] * (shares[-1].log() - shares.log())).nan_to_num(0.0).sum(-1)  # a share of 0 counts nothing
    return xr.Dataset(
        {
            "kl": (("prompt", "layer"), kl),
            "agreement": (("prompt", "layer"), agreement),
            "bias": (("layer",), bias.numpy()),
        },
        coords={"prompt": np.arange(len(rows)), **_layer_coords(n_layers)},
        attrs=_attrs(model, tuned) | {"n_tokens": int(sum(map(len, rows)))},
    )


# ----------------------------------------------------------------------------------------------------------- details


def _check_tuned(model: Any, tuned: TunedLens | None) -> None:
    if tuned is not None:
        tuned.check_model(model)


def _read(model: Any, stream: Tensor, layer: int, tuned: TunedLens | None) -> Float[Tensor, "... d_vocab"]:
    """Logits of a lens, float32."""
    return models.unembed(model, stream if tuned is None else tuned.translate(stream, layer)).float()


def _streams(model: Any, tokens: Int[Tensor, "prompt pos"]) -> list[Float[Tensor, "prompt pos d_model"]]:
    """The residual stream before each block, and after the last."""
    last = models.info(model).shape.n_layers - 1
    before = models.cache(model, tokens, ["resid_pre"])
    after = models.cache(model, tokens, ["resid_post"], layers=[last])
    return [*(before["resid_pre", layer] for layer in range(last + 1)), after["resid_post", last]]


def _row_streams(model: Any, rows: Rows) -> Iterator[tuple[list[int], Float[Tensor, "layer row pos d_model"]]]:
    """Rows of one length at a time, so that nothing is padded; with the numbers of the rows."""
    for chosen, tokens in batches_of_one_length(rows, BATCH_TOKENS):
        yield chosen, torch.stack(_streams(model, tokens))


def _kl(p: Float[Tensor, "... d_vocab"], q: Float[Tensor, "... d_vocab"]) -> Float[Tensor, ...]:
    """KL(p ‖ q) of log-probabilities, nats."""
    return (p.exp() * (p - q)).sum(-1)


def _check_last(model: Any, lens: Tensor, final: Tensor, dtype: torch.dtype) -> None:
    apart = float((lens - final).abs().max())
    if not apart <= (1e-3 if dtype == torch.float32 else 0.2):  # so put, NaN does not pass
        raise RuntimeError(
            f"The last layer of the lens is {apart:.2g} nats away from the model's own output. "
            f"{models.info(model).name} does something after its last block that the lens leaves out."
        )


def _layer_coords(n_layers: int) -> dict[str, Any]:
    labels = [*(f"before L{layer}" if layer else "embeddings" for layer in range(n_layers)), "output"]
    return {"layer": np.arange(n_layers + 1), "layer_label": ("layer", labels)}


def _attrs(model: Any, tuned: TunedLens | None) -> dict[str, Any]:
    info = models.info(model)
    lens = "logit lens" if tuned is None else "tuned lens"
    return {"model": info.name, "processing": info.processing, "seed": info.seed, "lens": lens}
