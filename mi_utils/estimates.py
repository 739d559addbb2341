"""What an experiment on a model needs in memory and with which tool, from sizes alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mi_utils.compute import BYTES, ModelShape, choose_tool, estimate_memory, format_bytes, layer_at_work, site_width

if TYPE_CHECKING:
    import torch

TASKS = ("forward", "cache", "patching", "sae")
DTYPES = (*BYTES, "int8")

# What ``train_sae`` trains with unless told otherwise, and the tokens of its held-out text.
SAE_BATCH, SAE_BUFFER, SAE_EXPANSION, SAE_HELD_OUT = 4096, 250_000, 8, 2000
# Tensors [token, feature] that are alive at one time: in a training step, and in a look at the held-out text. Counted
# on SAELens' trainers (``tests/test_estimate.py``); the fast step of TopK makes few.
SAE_COPIES = {
    "topk": (2, 2.2), "batchtopk": (9, 4.7), "matryoshka": (11, 4.7), "standard": (6, 2.7), "jumprelu": (6, 2.7),
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a task, by what they are for."""

    task: str
    tool: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def weights(self) -> int:
        """What the loaded model holds."""
        return self.parts["weights"] + self.parts.get("folded copies", 0)

    @property
    def beside(self) -> int:
        """What the task adds to the loaded model."""
        return self.total - self.weights

    def table(self) -> str:
        """The parts in readable units, a line each."""
        rows = [*self.parts.items(), ("total", self.total)]
        return "\n".join(f"{name:<22} {format_bytes(size):>10}" for name, size in rows)


def estimate(
    shape: ModelShape,
    task: str = "forward",
    *,
    batch: int = 1,
    seq: int = 64,
    dtype: str = "float32",
    tool: str | None = None,
    site: str = "resid_pre",
    device: torch.device | str = "cpu",
    n_features: int | None = None,
    architecture: str = "topk",
    sae_batch: int = SAE_BATCH,
    buffer_tokens: int = SAE_BUFFER,
) -> Estimate:
    """Peak memory of a task. Weights and caches are good to 10 %, sweeps and the training of SAEs to 25 %.

    Args:
        shape: ``known_shape("gpt2-xl")`` or ``ModelShape.from_config``.
        task: "forward" (the logits of a batch); "cache" (every activation of a batch, as an unfiltered
            ``run_with_cache`` keeps them; with nnsight, which has none, the sites of this course); "patching" (a sweep
            over layers and positions of ``batch`` pairs that differ from the second token on); "sae" (``train_sae`` at
            one site).
        batch, seq: prompts, and tokens in each.
        dtype: "float32", "bfloat16", "float16"; "int8" holds weights in 8 bits, embeddings and activations in 16.
        tool: "TransformerLens" (folded weights, ``load_model``) or "nnsight" (``load_large_model``); by default the
            one for the model's size.
        site: what is patched or reconstructed.
        device: decides how much goes into one pass of a sweep ("cpu" or "cuda").
        n_features, architecture, sae_batch, buffer_tokens: of the autoencoder: 8 × d_model, and as in ``train_sae``, by
            default.

    Raises:
        ValueError: unknown task, dtype, site or architecture, or more tokens than the context holds.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: use {', '.join(TASKS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}: use {', '.join(DTYPES)}.")
    if tool is None:
        tool = "TransformerLens" if choose_tool(shape).tool == "TransformerLens" and dtype != "int8" else "nnsight"
    floats = "float16" if dtype == "int8" else dtype
    size = BYTES[floats]
    base = estimate_memory(shape, batch=batch, seq=seq, dtype=floats, task="cache" if task == "cache" else "forward")
    parts = {"weights": base.weights if dtype != "int8" else _eight_bit_weights(shape)}
    if tool == "TransformerLens":
        parts["folded copies"] = base.folded_copies
    quick = tool == "TransformerLens"
    if task == "forward":
        logits = batch * seq * shape.d_vocab * size  # when they are made, the blocks' activations are gone
        parts |= {"activations, or logits": max(layer_at_work(shape, batch, seq, size, quick), logits)}
    elif task == "cache":
        cache = base.cache if tool == "TransformerLens" else _sites(shape, batch, seq) * size
        parts |= {"cache": cache, "activations": layer_at_work(shape, batch, seq, size, quick)}
    elif task == "patching":
        parts |= _sweep(shape, tool, batch, seq, floats, site, device)
    else:
        n_features = n_features or SAE_EXPANSION * shape.d_model
        parts |= _sae(shape, size, site, n_features, architecture, sae_batch, buffer_tokens)
    return Estimate(task, tool, parts)


def _eight_bit_weights(shape: ModelShape) -> int:
    embeddings = shape.d_vocab * shape.d_model * (1 if shape.tied_embeddings else 2)
    return shape.n_parameters + embeddings


def _sites(shape: ModelShape, batch: int, seq: int) -> int:
    """Numbers in all sites of ``mi_utils.models.SITES``."""
    tokens, width, kv_width = batch * seq, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    per_token = 5 * shape.d_model + 2 * width + 2 * kv_width + shape.d_mlp
    return shape.n_layers * (tokens * per_token + batch * shape.n_heads * seq * seq)


def _sweep(
    shape: ModelShape, tool: str, batch: int, seq: int, dtype: str, site: str, device: torch.device | str
) -> dict[str, int]:
    """Over layers and positions: what is held of the unpatched runs, and the largest pass."""
    import numpy as np
    import torch

    from mi_utils import engine

    size = BYTES[dtype]
    tokens = engine.TOKENS["cpu" if torch.device(device).type == "cpu" else "cuda"]
    limits = engine.Limits(max(seq, tokens), batch, None, 0.0)
    if tool == "TransformerLens":
        changed = np.ones((batch, shape.n_layers, seq, 1), dtype=bool)
        changed[:, :, 0] = seq == 1  # BOS
        plan = engine.plan_cells(changed, ("layer", "pos"), site, shape, limits, shared=min(1, seq - 1), dtype=dtype)
        return {"the sweep's peak": plan.nbytes}
    rows = min(max(1, tokens // seq), max(1, batch * shape.n_layers * (seq - 1)))
    return {
        "activations put in": shape.n_layers * batch * seq * site_width(shape, site) * size,
        "the largest pass": layer_at_work(shape, rows, seq, size) + rows * seq * shape.d_model * size,
    }


def _sae(
    shape: ModelShape, size: int, site: str, n_features: int, architecture: str, batch: int, buffer_tokens: int
) -> dict[str, int]:
    """Weights, gradients and Adam's moments in float32; a buffer of activations, twice while its parts are joined; and
    what comes and goes beside them: a forward pass, a training step, a look at the held-out text."""
    from mi_utils.tokens import BATCH_TOKENS

    if architecture not in SAE_COPIES:
        raise ValueError(f"Unknown architecture {architecture!r}: use {', '.join(SAE_COPIES)}.")
    width, (in_step, held_out) = site_width(shape, site), SAE_COPIES[architecture]
    parameters = 2 * n_features * width + n_features + width
    seq = min(shape.n_ctx, 128)
    forward = layer_at_work(shape, max(1, BATCH_TOKENS // seq), seq, size, quick=True)
    filling = max(buffer_tokens * width * size, forward)
    step = batch * (in_step * n_features + 6 * width) * 4
    watching = SAE_HELD_OUT * max((held_out * n_features + 6 * width) * 4, 2 * shape.d_vocab * size)  # or its logits
    return {
        "autoencoder and Adam": 4 * parameters * 4,
        "buffer": buffer_tokens * (width * size + 8),
        "a step, or filling": int(max(filling, step, watching)),
    }
