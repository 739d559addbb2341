"""Models past what TransformerLens holds: the same experiments on any Hugging Face causal model, through nnsight.

The only door to nnsight. ``load_large_model`` takes a hub name, a folder, an embedded name or a model in memory,
spreads it over devices (``device_map``), holds it in half precision or in 8 bits, or leaves it on NDIF's machines
(``remote=True``). ``logit_lens``, ``patch_sweep``, ``direct_logit_attribution`` and ``steer`` take the same arguments
and return the same labelled results as their namesakes for TransformerLens models, which are faster where a model fits.

Weights are run as they were saved ("raw"): nothing is folded or centred, and no copy is made. What an experiment
computes on activations it computes where the model is; numbers come back, not activations. The functions that travel
there stand in the section "beside the model"; they know PyTorch and nothing of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_utils import engine, models
from mi_utils.compute import ModelShape, available_memory, format_bytes, pick_device, pick_dtype
from mi_utils.models import ModelInfo, ModelNotFound, WrongNumbers
from mi_utils.prompts import PromptPairs
from mi_utils.results import NothingChanged, check_gap, check_mode, labelled, numpy

if TYPE_CHECKING:
    import xarray as xr

    from mi_utils.probing import Direction

    Pairs = PromptPairs | Sequence[PromptPairs]

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
STREAM = ("resid_pre", "resid_post", "attn_out", "mlp_out")  # sites as wide as the residual stream
METRICS = ("logit_diff", "log_prob")
BY = ("component", "head", "layer")
REMOTE_TOKENS = 4096  # in one pass on a machine whose memory is not known


class OutOfMemory(RuntimeError):
    """The model, or a pass over it, is larger than the memory there is."""


class RemoteFailed(RuntimeError):
    """A job on NDIF's machines could not be sent, or failed there."""


# ------------------------------------------------------------------------------------------------------ the modules


@dataclass(frozen=True)
class Modules:
    """Where a model keeps what experiments read and change. Paths are module names; those of a block, below the block.

    Attributes:
        blocks: the list of blocks.
        projection: the attention's output matrix; what goes into it is z, all heads side by side.
        attn_out, mlp_out: the modules whose output is added to the stream: the attention and the MLP themselves, or
            the normalisation behind them (Gemma 2 and 3, OLMo 2).
        norm, unembed: the last normalisation and the unembedding.
        positions: the embedding of positions; None where they are not added to the stream (rotary models).
        normed: whether a normalisation stands between what heads write and the stream.
        softcap: logits are c · tanh(logits / c); 0 where they are not.
    """

    blocks: str
    projection: str
    attn_out: str
    mlp_out: str
    norm: str
    unembed: str
    positions: str | None
    normed: bool
    softcap: float
    n_layers: int
    n_heads: int

    @classmethod
    def find(cls, hf_model: Any) -> Modules:
        """Look for the parts under the names that Hugging Face's models use.

        Raises:
            NotImplementedError: a part that goes by no known name; says which.
        """
        text = hf_model.config.get_text_config()
        shape = ModelShape.from_config(hf_model.config, n_parameters=0)
        lists = [
            name
            for name, module in hf_model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == shape.n_layers
        ]
        kind = type(hf_model).__name__

        def one_of(module: Any, names: Sequence[str], what: str) -> str:
            found = next((name for name in names if hasattr(module, name)), None)
            if found is None:
                there = ", ".join(name for name, _ in module.named_children())
                raise NotImplementedError(
                    f"{kind} has no {what} under a name known here ({', '.join(names)}); it has {there}. Models of "
                    "the GPT-2, GPT-NeoX, Llama, Mistral, Gemma, Qwen, Phi, OLMo and Falcon kinds are known; for "
                    "another add its names to Modules.find in mi_utils/large.py."
                )
            return found

        if not lists:
            raise NotImplementedError(f"{kind} has no list of {shape.n_layers} blocks: no decoder-only transformer.")
        blocks = min(lists, key=len)
        block = hf_model.get_submodule(blocks)[0]
        around = blocks.rpartition(".")[0]
        body = hf_model.get_submodule(around)
        attention = one_of(block, ("attn", "self_attn", "attention", "self_attention"), "attention")
        out = one_of(getattr(block, attention), ("c_proj", "o_proj", "dense", "out_proj"), "output matrix of attention")
        mlp = one_of(block, ("mlp", "feed_forward"), "MLP")
        normed = hasattr(block, "post_feedforward_layernorm")
        norm = one_of(body, ("ln_f", "norm", "final_layer_norm", "final_layernorm"), "last normalisation")
        head = hf_model.get_output_embeddings()
        return cls(
            blocks=blocks,
            projection=f"{attention}.{out}",
            attn_out="post_attention_layernorm" if normed else attention,
            mlp_out="post_feedforward_layernorm" if normed else mlp,
            norm=f"{around}.{norm}",
            unembed=next(name for name, module in hf_model.named_modules() if module is head),
            positions=f"{around}.wpe" if hasattr(body, "wpe") else None,
            normed=normed,
            softcap=float(getattr(text, "final_logit_softcapping", None) or 0.0),
            n_layers=shape.n_layers,
            n_heads=shape.n_heads,
        )


@dataclass(eq=False)
class LargeModel:
    """A Hugging Face model under nnsight. Made by :func:`load_large_model`.

    Attributes:
        nn: nnsight's model, to trace by hand: ``with model.nn.trace("…"):``.
        tokenizer: with BOS.
        mi: what was loaded and how, as results record it.
        modules: where its parts are.
        remote: False, True (NDIF), "local" (a rehearsal of it here) or the address of another server.
    """

    nn: Any
    tokenizer: Any
    mi: ModelInfo
    modules: Modules
    remote: bool | str = False

    def __call__(self, tokens: Int[Tensor, "prompt pos"], use_cache: bool = False) -> Float[Tensor, "prompt 1 d_vocab"]:
        """Logits at the last position of prompts of one length. All that ``PromptPairs`` asks of a model."""
        return self.logits([row for row in tokens])[:, None]

    def logits(self, rows: Sequence[Int[Tensor, " pos"]]) -> Float[Tensor, "prompt d_vocab"]:
        """Logits at the last position of prompts of any lengths, run as one batch, padded on the left."""
        padded, nn, remote = Padded.of(rows, self), self.nn, self.remote
        inputs = padded.inputs()
        with _clear_errors(self), _shipped(self):
            with nn.session(remote=remote):
                kept = _nnsight().save([])
                with torch.no_grad():
                    with nn.trace(**inputs):
                        kept.append(nn.output.logits[:, -1].float())
        return kept[0]

    def prompt_logits(self, prompts: Sequence[str]) -> Float[Tensor, "prompt d_vocab"]:
        """:meth:`logits` of texts, each with one BOS in front."""
        return self.logits([models.to_tokens(self, [prompt])[0] for prompt in prompts])


# ----------------------------------------------------------------------------------------------------------- loading


def load_large_model(
    model: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    remote: bool | str = False,
    seed: int = 0,
) -> LargeModel:
    """Load a causal language model for the experiments of this module.

    Args:
        model: hub name, short name ("gpt2-xl"), local folder, embedded name, "random:NAME:SEED" as in ``load_model``;
            or a model that ``transformers`` has made, with its ``tokenizer``.
        device: the best there is; for a model on one device.
        device_map: spreads the blocks over devices: "auto" over all cards and then the main memory, "balanced" evenly
            over the cards, or {module: device}. Activations are moved where they are needed.
        dtype: "float32" unless told otherwise; "bfloat16" and "float16" take half of it; "int8" a quarter (LLM.int8(),
            with the package bitsandbytes; activations are float16).
        remote: True runs every experiment on NDIF (https://ndif.us): nothing is loaded here but the configuration
            and the tokenizer, and a key is needed. "local" goes the same way, packing included, and runs here.
        seed: recorded with every result; draws the weights of "random:NAME".

    Returns:
        A model whose parts, checked where it runs here, compute what the whole computes: the stream is the sum of
        what is written to it, and normalisation and unembedding of it are the logits.

    A tokenizer without BOS (Qwen's) gets its end-of-text token in that place, as TransformerLens does.

    Raises:
        ModelNotFound: nothing of that name, or the hub cannot be reached; says how to go on.
        OutOfMemory: the weights are larger than the memory of the device.
        RemoteFailed: ``remote=True`` without a key.
        ValueError: unknown dtype or device; 8 bits without bitsandbytes; a local model and ``remote=True``.
        NotImplementedError: an architecture whose parts are not known here.
        WrongNumbers: the parts do not compute what the model computes.
    """
    if device is not None and device_map is not None:
        raise ValueError("device puts the model in one place, device_map spreads it: give one of them.")
    on_server = bool(remote) and remote != "local"
    if on_server:
        _check_key(remote)
        loaded = _load_remote(model, remote, seed)
    elif isinstance(model, str):
        loaded = _load_here(model, device, device_map, dtype, seed)
    else:
        loaded = _adopt(model, tokenizer, device, seed)
    loaded.remote = remote
    if not on_server:
        _check_parts(loaded)
    return loaded


def _load_here(name: str, device: Any, device_map: Any, dtype: Any, seed: int) -> LargeModel:
    plain, weights_seed = models.split_random(name, seed)
    path = models.resolve(plain)
    options: dict[str, Any] = {}
    chosen = pick_device(device)
    quantised = str(dtype).removeprefix("torch.") == "int8"
    if quantised:
        if weights_seed is not None:
            raise ValueError("Random weights are drawn here, and 8-bit weights are read from files: use another dtype.")
        options |= {"quantization_config": _eight_bits(), "device_map": device_map or {"": str(chosen)}}
        precision = torch.float16
    else:
        precision = pick_dtype(chosen, dtype)
        if device_map is not None:
            if weights_seed is not None:
                raise ValueError("device_map places weights read from files; random ones are drawn: leave it out.")
            options["device_map"] = device_map
    if device_map is None:
        _check_room(plain, path, "int8" if quantised else precision, chosen)
    with _clear_errors(None):
        hf_model, tokenizer = models.load_hugging_face(name, path, precision, weights_seed, **options)
        if not options:
            hf_model = hf_model.to(chosen)
    about = {"path": path, "seed": seed, "random_weights": weights_seed is not None}
    return _wrap(hf_model, tokenizer, name, "int8" if quantised else None, **about)


def _adopt(hf_model: Any, tokenizer: Any, device: Any, seed: int) -> LargeModel:
    if not hasattr(hf_model, "config") or not hasattr(hf_model, "get_output_embeddings"):
        raise ValueError(f"{type(hf_model).__name__} is neither a name nor a Hugging Face causal language model.")
    if tokenizer is None:
        raise ValueError("A model in memory comes without its tokenizer: give tokenizer= as well.")
    if device is not None:
        hf_model = hf_model.to(pick_device(device))
    path = getattr(hf_model, "name_or_path", "") or ""
    return _wrap(hf_model, tokenizer, path or type(hf_model).__name__, None, path=path, seed=seed, random_weights=False)


def _wrap(hf_model: Any, tokenizer: Any, name: str, held: str | None, **about: Any) -> LargeModel:
    """A model that is here, under nnsight."""
    hf_model = hf_model.eval()
    for parameter in hf_model.parameters():
        parameter.requires_grad_(False)
    _give_bos(tokenizer)
    first = next(hf_model.parameters())
    n_parameters = sum(parameter.numel() for parameter in hf_model.parameters())
    info = ModelInfo(
        name=name, processing="raw", device=str(hf_model.get_input_embeddings().weight.device),
        dtype=held or str(first.dtype).removeprefix("torch."),
        shape=ModelShape.from_config(hf_model.config, name=name, n_parameters=n_parameters), **about,
    )  # fmt: skip
    with models._quiet(True):
        nn = _nnsight().TransformersModel(hf_model, task="text-generation", tokenizer=tokenizer)
    return LargeModel(nn, tokenizer, info, Modules.find(hf_model))


def _load_remote(name: Any, remote: bool | str, seed: int) -> LargeModel:
    """Configuration, tokenizer and module tree of a model that stays on the server."""
    if not isinstance(name, str):
        raise ValueError("remote=True runs a model by its hub name; one in memory stays here. Use remote='local'.")
    path = name if name.startswith("random:") else models.resolve(name)
    here = Path(path).is_dir()
    if name.startswith("random:") or (here and remote is True):  # a server of one's own may have the same folder
        raise ValueError(
            f"{name!r} lies on this machine, and NDIF runs models of the hub. Give a hub name, or remote='local' to "
            "rehearse the remote run here."
        )
    if not here:
        models.check_on_hub(name, path)
    try:
        nn = _nnsight().TransformersModel(path, task="text-generation", attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"Configuration and tokenizer of {name!r} do not load: {error}") from error
    hf_model = nn._module
    _give_bos(nn.tokenizer)
    shape = ModelShape.from_config(hf_model.config, name=name)
    info = ModelInfo(
        name=name, path=path, processing="raw", device="cpu", dtype=str(hf_model.dtype).removeprefix("torch."),
        seed=seed, random_weights=False, shape=shape,
    )  # fmt: skip
    return LargeModel(nn, nn.tokenizer, info, Modules.find(hf_model))


def _give_bos(tokenizer: Any) -> None:
    if tokenizer.bos_token is None and tokenizer.eos_token is not None:
        tokenizer.bos_token = tokenizer.eos_token


def _eight_bits() -> Any:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "8-bit weights need the package bitsandbytes, which is not installed: `pip install bitsandbytes` (made for "
            "NVIDIA cards). Or take dtype='bfloat16' (half of float32), device_map='auto' (several "
            "cards and the main memory), or remote=True (NDIF)."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _check_room(name: str, path: str, dtype: torch.dtype | str, device: torch.device) -> None:
    """Refuse weights that cannot fit before minutes are spent on reading them."""
    from transformers import AutoConfig

    from mi_utils.compute import known_shape

    shape = known_shape(name)
    if shape is None:
        try:
            shape = ModelShape.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
        except (OSError, ValueError):  # not here yet, or of unknown make: loading says what is wrong
            return
    size = 1 if dtype == "int8" else dtype.itemsize
    needed, free = shape.n_parameters * size, available_memory(device)
    if needed > free:
        raise OutOfMemory(
            f"The weights of {name} take {format_bytes(needed)} in {str(dtype).removeprefix('torch.')}, and {device} "
            f"has {format_bytes(free)} free. {_SMALLER}"
        )


_SMALLER = (
    "How to go on: dtype='bfloat16' halves float32 and dtype='int8' halves it again; device_map='auto' uses all cards "
    "and then the main memory; a smaller batch_size shrinks a pass; remote=True runs the model on NDIF. "
    "`python -m mi_utils estimate MODEL --dtype … --task …` says beforehand what fits."
)


def _check_key(remote: bool | str) -> None:
    from nnsight import CONFIG

    if remote is True and not CONFIG.API.APIKEY:
        raise RemoteFailed(
            "NDIF asks for a key, and none is set. How to go on: make an account at https://login.ndif.us, then set "
            "the environment variable NDIF_API_KEY before Python starts (on Colab: a secret of that name). "
            "remote='local' rehearses the run here without a key."
        )


def _check_parts(model: LargeModel) -> None:
    """Two padded prompts, once whole and once by parts.

    Raises:
        WrongNumbers: they differ.
    """
    bos = model.tokenizer.bos_token_id
    ids = [token % model.mi.shape.d_vocab for token in range(11, 17)]
    start = [] if bos is None else [bos]
    rows = [torch.tensor([*start, *ids]), torch.tensor([*start, *ids[:3]])]
    inputs = Padded.of(rows, model).inputs()
    nn, modules = model.nn, asdict(model.modules)
    with _clear_errors(model):
        with torch.no_grad():
            with nn.trace(**inputs):
                kept = _nnsight().save([])
                written = read(nn, modules, "resid_pre", 0)
                heads = 0.0
                for layer in range(modules["n_layers"]):
                    z = read(nn, modules, "z", layer)
                    attn = read(nn, modules, "attn_out", layer)
                    mlp = read(nn, modules, "mlp_out", layer)
                    written = written.to(attn.device) + attn + mlp.to(attn.device)
                    if not modules["normed"]:
                        project = nn.get(f"{modules['blocks']}.{layer}.{modules['projection']}")
                        heads = max(heads, float((project(z) - attn).abs().max() / attn.abs().max().clamp(min=1e-6)))
                stream = read(nn, modules, "resid_post", modules["n_layers"] - 1)
                mask = inputs["attention_mask"].to(stream.device)[..., None]
                # pads stand for nothing
                apart = ((written.to(stream.device) - stream) * mask).abs().max() / (stream * mask).abs().max()
                logits = nn.output.logits.float()
                lens = unembed(nn, modules, stream).float()
                here = mask.to(logits.device)
                kept.append((float(apart), heads, float(((lens - logits) * here).abs().max() / logits.abs().max())))
    (stream_apart, heads_apart, logits_apart) = kept[0]
    allowed = 1e-4 if model.mi.dtype == "float32" else 0.05
    wrong = {
        "what is written to the stream": stream_apart, "what the heads' z gives": heads_apart,
        "the unembedded stream": logits_apart,
    }  # fmt: skip
    if bad := {what: apart for what, apart in wrong.items() if not apart <= allowed}:
        what, apart = next(iter(bad.items()))
        raise WrongNumbers(
            f"{model.mi.name}: {what} is {apart:.2g} (relative) away from what the model itself computes. Its "
            "architecture has a step that mi_utils/large.py does not know (a scale, a second normalisation): trace it "
            "by hand with nnsight, or add the step to Modules."
        )


# ----------------------------------------------------------------------------------------------------------- running


def _nnsight() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise ImportError(
            f"nnsight does not import ({error}). Install the pinned versions: pip install -r requirements.txt."
        ) from error
    return nnsight


@contextmanager
def _shipped(model: LargeModel) -> Iterator[None]:
    """For the time of a remote job, functions of this module travel as source: the server has not installed it."""
    from cloudpickle import register_pickle_by_value, unregister_pickle_by_value

    if not model.remote:
        yield
        return
    import sys

    here = sys.modules[__name__]
    register_pickle_by_value(here)
    try:
        yield
    finally:
        unregister_pickle_by_value(here)


@contextmanager
def _clear_errors(model: LargeModel | None) -> Iterator[None]:
    """Memory that runs out and a server that does not answer, told in words with the next step."""
    remote = model is not None and bool(model.remote) and model.remote != "local"
    try:
        yield
    except (OutOfMemory, RemoteFailed, NothingChanged, ValueError, WrongNumbers):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if type(error).__name__ == "OutOfOrderError":
            raise WrongNumbers(
                f"The model computes its parts in another order than mi_utils/large.py reads them ({error}): block by "
                "block the heads' z, the attention, the MLP. Trace it by hand with nnsight."
            ) from error
        if _is_out_of_memory(error):
            name = "the model" if model is None else model.mi.name
            raise OutOfMemory(f"Memory ran out with {name} ({text.splitlines()[0][:200]}). {_SMALLER}") from error
        if remote:
            raise RemoteFailed(f"{text[:500]}\n{_remote_advice(text)}") from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _remote_advice(text: str) -> str:
    """The next step after a failure of a remote job."""
    low = text.lower()
    if any(word in low for word in ("401", "403", "api key", "unauthorized", "forbidden")):
        return "The key was refused: check NDIF_API_KEY at https://login.ndif.us, and whether it may run this model."
    if any(word in low for word in ("not deployed", "not running", "no deployment", "not found", "404")):
        return (
            "NDIF does not run this model now. `nnsight.ndif_status()` and https://nnsight.net/status list those it "
            "does; others can be asked for there."
        )
    connection = ("connect", "resolve", "offline", "timed out", "timeout", "refused", "unreachable", "ssl", "network")
    if any(word in low for word in connection):
        return (
            "The server was not reached. Check the network (and HF_HUB_OFFLINE, which also stops the hub being asked "
            "for the model's full name), then run the same call again; remote='local' rehearses it here."
        )
    return "The job failed on the server. Try a smaller batch_size, and the same call with remote='local'."


@dataclass(frozen=True)
class Padded:
    """Prompts of any lengths as one batch, padded on the left, so that the last token stands last in every row.

    Positions are counted from the first real token of each row. Pads are masked: a row gets the logits that it gets
    alone.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]

    @classmethod
    def of(cls, rows: Sequence[Int[Tensor, " pos"]], model: LargeModel) -> Padded:
        """Rows of tokens, BOS included."""
        tokenizer = model.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        longest = max(len(row) for row in rows)
        tokens = torch.full((len(rows), longest), pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            tokens[number, longest - len(row) :] = row.cpu()
            mask[number, longest - len(row) :] = True
        return cls(tokens, mask)

    def __getitem__(self, rows: Any) -> Padded:
        return Padded(self.tokens[rows], self.mask[rows])

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self, *, last: bool = False) -> dict[str, Any]:
        """Arguments of a forward pass; ``last`` leaves out the logits of all positions but the last."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask.long(),
            "position_ids": (self.mask.long().cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        } | ({"logits_to_keep": 1} if last else {})


@dataclass(frozen=True)
class _Batch:
    """All prompts of an experiment, of one length or of several."""

    parts: tuple[PromptPairs, ...]
    clean: Padded
    corrupted: Padded
    columns: Int[Tensor, "prompt two"]  # correct and incorrect answer

    @classmethod
    def of(cls, model: LargeModel, pairs: Pairs) -> _Batch:
        parts = (pairs,) if isinstance(pairs, PromptPairs) else tuple(pairs)
        if not parts or not all(isinstance(part, PromptPairs) for part in parts):
            raise ValueError("Give PromptPairs, or a list of PromptPairs (one for each length of prompts).")
        for part in parts:
            part.check_model(model)
        clean, corrupted = (
            Padded.of([row for part in parts for row in getattr(part, f"{which}_tokens")], model)
            for which in ("clean", "corrupted")
        )
        answers = [(part.correct_ids.cpu(), part.incorrect_ids.cpu()) for part in parts]
        return cls(parts, clean, corrupted, torch.cat([torch.stack(pair, dim=1) for pair in answers]))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def padded(self) -> bool:
        return not bool(self.clean.mask.all())

    @property
    def template(self) -> list[str]:
        return [label for part in self.parts for label in part.template]

    def pos_coords(self) -> dict[str, Any]:
        """Positions from BOS at 0; of a padded batch from the end, the last token at -1."""
        length = self.clean.tokens.shape[1]
        if len(self.parts) == 1:
            return {"pos": np.arange(length), "token": ("pos", list(self.parts[0].position_labels))}
        pos = np.arange(-length, 0)
        labels = []
        for place in pos:
            texts = {part.position_labels[place].split(" ", 1)[1] for part in self.parts
                     if part.clean_tokens.shape[1] >= -place}  # fmt: skip
            labels.append(f"{place} {texts.pop() if len(texts) == 1 else '…'}")
        return {"pos": pos, "token": ("pos", labels)}

    def blank(self, values: np.ndarray, axis: int) -> np.ndarray:
        """NaN where a prompt has no such position. ``values`` has the prompt first."""
        if self.padded:
            shape = [len(self), *[1] * (values.ndim - 1)]
            shape[axis] = self.clean.mask.shape[1]
            values = np.where(self.clean.mask.numpy().reshape(shape), values, np.nan)
        return values


# ------------------------------------------------------------------- beside the model: these functions travel to it


def place(modules: dict, site: str, layer: int) -> tuple[str, str]:
    """Path of the module whose input or output a site is."""
    block = f"{modules['blocks']}.{layer}"
    if site in ("resid_pre", "resid_post"):
        return block, "input" if site == "resid_pre" else "output"
    part = {"z": "projection"}.get(site, site)
    return f"{block}.{modules[part]}", "input" if site == "z" else "output"


def read(nn: Any, modules: dict, site: str, layer: int) -> Tensor:
    """An activation [prompt, pos, feature], inside a trace. In the order in which the model computes them."""
    path, end = place(modules, site, layer)
    envoy = nn.get(path)
    value = envoy.input if end == "input" else envoy.output
    # A copy: Falcon adds the attention's output to the MLP's in place.
    return (value[0] if isinstance(value, tuple) else value).clone()


def write(nn: Any, modules: dict, site: str, layer: int, new: Tensor) -> None:
    """Put another activation in its place, inside a trace."""
    path, end = place(modules, site, layer)
    envoy = nn.get(path)
    if end == "input":
        envoy.input = new
        return
    old = envoy.output
    envoy.output = (new, *old[1:]) if isinstance(old, tuple) else new


def unembed(nn: Any, modules: dict, stream: Tensor) -> Tensor:
    """Logits, if this were the stream after the last block."""
    norm, head = nn.get(modules["norm"]), nn.get(modules["unembed"])
    logits = head(norm(stream.to(getattr(norm, "weight", head.weight).device)))  # OLMo's norm has no weight
    cap = modules["softcap"]
    return cap * torch.tanh(logits / cap) if cap else logits


def answer(logits: Tensor, columns: Tensor) -> Tensor:
    """[row, 3]: logits of the correct and the incorrect answer, and log of the sum of all exponentials."""
    logits = logits.float()
    return torch.cat([logits.gather(-1, columns.to(logits.device)), logits.logsumexp(-1, keepdim=True)], dim=-1)


def lens_values(logits: Tensor, final: Tensor, columns: Tensor) -> Tensor:
    """[4, prompt, pos]: log-probability of the correct answer, logit difference, rank, KL(final ‖ lens)."""
    columns = columns.to(logits.device)[:, None].expand(*logits.shape[:2], 2)
    right, wrong = logits.gather(-1, columns).unbind(-1)
    log_probs = logits.log_softmax(-1)
    final = final.to(logits.device)
    return torch.stack(
        [
            right - logits.logsumexp(-1),
            right - wrong,
            (logits > right[..., None]).sum(-1).to(logits.dtype),
            (final.exp() * (final - log_probs)).sum(-1),
        ]
    )


def put(
    activation: Tensor, source: Tensor, rows: Tensor, prompts: Tensor, where: Tensor, n_heads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation with ``source`` of other prompts in some rows and places; elements changed, and by how much.

    ``where`` is [row, pos, head] (one head where the site has none).
    """
    rows, prompts, where = (each.to(activation.device) for each in (rows, prompts, where))
    shape = activation.shape
    activation = activation.clone()
    view = activation.unflatten(-1, (n_heads, -1)) if n_heads else activation.unsqueeze(2)
    before, given = view[rows], source.to(view.device).reshape(len(source), *view.shape[1:])[prompts]
    after = torch.where(where[..., None], given, before)
    view[rows] = after
    change = (after.float() - before.float()).abs().flatten(1)
    return view.reshape(shape), (change > 0).sum(1).cpu(), change.sum(1).cpu()


def pick(inputs: dict, rows: Tensor) -> dict:
    """Some rows of a batch's inputs."""
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def places(mask: Tensor, pos: Tensor | None, head: Tensor | None, n_heads: int | None) -> Tensor:
    """[row, pos, head]: where each row is edited. Real tokens only, and of a row's own position or head if given."""
    where = mask[..., None].repeat(1, 1, n_heads or 1)
    if pos is not None:
        where = where & (torch.arange(mask.shape[1]) == pos[:, None])[..., None]
    if head is not None:
        where = where & (torch.arange(n_heads) == head[:, None])[:, None]
    return where


def frozen_norm(nn: Any, modules: dict, stream: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of norm(x) = weight · (x - mean x, if centred) / scale + bias at this stream: weight / scale [prompt, d_model],
    bias, and whether it is centred. Which of the kinds of normalisation it is, is found by trying."""
    norm = nn.get(modules["norm"])
    weight = getattr(norm, "weight", None)
    weight = torch.ones_like(stream[0]) if weight is None else weight  # OLMo's has none
    if weight.device.type == "meta":
        raise RuntimeError("The last normalisation's weights are offloaded: keep it on a device in device_map.")
    x = stream.to(weight.device)
    expected, x = norm(x).double(), x.double()
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias
    epsilon = next((float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-6)
    best = None
    for centred in (False, True):
        for offset in (0.0, 1.0):  # Gemma stores the weight as its difference from 1
            y = x - x.mean(-1, keepdim=True) if centred else x
            scale = (y.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
            gain = (weight.double() + offset) / scale
            apart = float((y * gain + bias.double() - expected).abs().max())
            if best is None or apart < best[0]:
                best = (apart, gain, centred)
    return best[1], bias.double(), best[2]


def answer_direction(nn: Any, modules: dict, stream: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Direction [prompt, d_model] and constant [prompt]: logit difference = stream · direction + constant, with the
    last normalisation held at what it is for this stream."""
    gain, bias, centred = frozen_norm(nn, modules, stream)
    head = nn.get(modules["unembed"])
    if head.weight.device.type == "meta":
        raise RuntimeError("The unembedding's weights are offloaded: keep it on a device in device_map.")
    columns = columns.to(head.weight.device)
    weight = head.weight[columns].double()
    difference = (weight[:, 0] - weight[:, 1]).to(gain.device)
    direction = difference * gain
    if centred:
        direction = direction - direction.mean(-1, keepdim=True)
    constant = difference @ bias
    own = getattr(head, "bias", None)
    if own is not None:
        own = own[columns].double().to(gain.device)
        constant = constant + own[:, 0] - own[:, 1]
    return direction, constant


def heads_along(nn: Any, modules: dict, layer: int, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """[head, prompt] what each head writes along the direction, and [prompt] what the output's bias does.

    By running the output matrix on one head at a time, so that it may be stored in any way (transposed, 8 bits)."""
    block = f"{modules['blocks']}.{layer}"
    project, n = nn.get(f"{block}.{modules['projection']}"), modules["n_heads"]
    single = torch.zeros(n + 1, *z.shape, dtype=z.dtype, device=z.device).unflatten(-1, (n, -1))
    for head in range(n):
        single[head, :, head] = z.unflatten(-1, (n, -1))[:, head]
    written = project(single.flatten(-2)).double()
    along = (written.to(direction.device) * direction).sum(-1)
    return along[:-1] - along[-1:], along[-1]


# --------------------------------------------------------------------------------------------------- the experiments


def logit_lens(model: LargeModel, pairs: Pairs, *, on: str = "clean", batch_size: int = 16) -> xr.Dataset:
    """As :func:`mi_utils.lens.logit_lens`: read the stream after every layer with the model's own last steps.

    Args:
        pairs: or a list of them, of different lengths: they are padded on the left, ``pos`` counts from the end
            (-1 the last token), and values are NaN where a prompt has no such position.
        batch_size: prompts at a time.

    Returns:
        ``log_prob``, ``logit_diff``, ``rank`` and ``kl`` over (prompt, layer, pos).

    Raises:
        ValueError: ``on`` is neither "clean" nor "corrupted", or pairs of another tokenizer.
        RuntimeError: the last layer of the lens is not the model's own output.
        OutOfMemory, RemoteFailed: with the next step.
    """
    import xarray as xr

    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: read the lens on 'clean' or 'corrupted' prompts.")
    batch = _Batch.of(model, pairs)
    prompts: Padded = getattr(batch, on)
    nn, modules, remote, columns = model.nn, asdict(model.modules), model.remote, batch.columns
    jobs = [(prompts[rows].inputs(), columns[rows]) for rows in torch.arange(len(batch)).split(batch_size)]
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                for inputs, wanted in jobs:
                    with nn.trace(**inputs):
                        streams = [read(nn, modules, "resid_pre", layer) for layer in range(modules["n_layers"])]
                        streams.append(read(nn, modules, "resid_post", modules["n_layers"] - 1))
                        final = nn.output.logits.float().log_softmax(-1)
                        values = []
                        for stream in streams:
                            lens = unembed(nn, modules, stream).float()
                            values.append(lens_values(lens, final, wanted).cpu())
                        last = lens[:, -1].log_softmax(-1) - final[:, -1].to(lens.device)
                        kept.append((torch.stack(values, dim=2), float(last.abs().max())))
    apart = float(np.max([each for _, each in kept]))
    if not apart <= (1e-3 if model.mi.dtype == "float32" else 0.2):  # so put, NaN does not pass
        raise RuntimeError(
            f"The last layer of the lens is {apart:.2g} nats away from the model's own output. {model.mi.name} does "
            "something after its last block that the lens leaves out."
        )
    found = numpy(torch.cat([values for values, _ in kept], dim=1))
    n_layers = model.modules.n_layers
    labels = [*(f"before L{layer}" if layer else "embeddings" for layer in range(n_layers)), "output"]
    return xr.Dataset(
        {
            name: (("prompt", "layer", "pos"), batch.blank(value, 2))
            for name, value in zip(("log_prob", "logit_diff", "rank", "kl"), found, strict=True)
        },
        coords={
            "prompt": np.arange(len(batch)), "template": ("prompt", batch.template), **batch.pos_coords(),
            "layer": np.arange(n_layers + 1), "layer_label": ("layer", labels),
        },
        attrs=_attrs(model) | {"lens": "logit lens", "on": on},
    )  # fmt: skip


def patch_sweep(
    model: LargeModel,
    pairs: Pairs,
    site: str,
    over: Sequence[str],
    *,
    mode: str = "denoising",
    metric: str = "logit_diff",
    batch_size: int | None = None,
    progress: bool = True,
) -> xr.DataArray:
    """As :func:`mi_utils.patching.patch_sweep`: patch one place at a time and measure how far the answer moves.

    Each cell is a whole run of the model with one place changed, many of them in a pass; cells that the change of
    tokens cannot reach are left out. What is put in stays where the model is.

    Args:
        pairs: or a list of them, as in :func:`logit_lens`.
        site: resid_pre, resid_post, attn_out, mlp_out or z.
        over: of "layer", "pos" and (z) "head"; on the others everything is patched at once.
        batch_size: patched prompts in one pass; by default what the device's free memory holds.

    Returns:
        Dims prompt, then ``over``: 0 the corrupted run, 1 the clean run; coordinates and receipt as there.

    Raises:
        ValueError: a wrong argument, or a metric that is the same on both runs.
        NothingChanged: there is nothing to patch, or patching left everything as it was.
        OutOfMemory, RemoteFailed: with the next step.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    _check_site(site, over)
    check_mode(mode)
    _check_metric(metric)
    batch = _Batch.of(model, pairs)
    base, other = (batch.corrupted, batch.clean) if mode == "denoising" else (batch.clean, batch.corrupted)
    info, n_heads = model.mi, model.modules.n_heads if site == "z" else None
    limits = _limits(model, base, site, batch_size)
    differs = (base.tokens != other.tokens).cumsum(1).bool() & base.mask
    units = n_heads if n_heads and "head" in over else 1
    changed = differs[:, None, :, None].expand(-1, info.shape.n_layers, -1, units).numpy().copy()
    if site == "resid_pre":  # in layer 0 it has seen one token only
        changed[:, 0] = ((base.tokens != other.tokens) & base.mask)[..., None].numpy()
    plan = engine.plan_cells(changed, over, site, info.shape, limits, whole=True, dtype=_float_name(info.dtype))
    if not plan.n_rows:
        raise NothingChanged(f"What is to be put in at {site} is what stands there already: there is nothing to patch.")
    base_answer, other_answer = _answers(model, base, batch.columns), _answers(model, other, batch.columns)
    values = [_metric(each, metric) for each in (base_answer, other_answer)]
    clean, corrupted = values[::-1] if mode == "denoising" else values
    gap = check_gap(clean, corrupted, metric)

    effect = np.broadcast_to(((values[0] - corrupted) / gap).reshape(-1, *[1] * len(over)), plan.shape).copy()
    elements, change = np.zeros(plan.shape, dtype=int), np.zeros(plan.shape)
    with _progress(plan.n_rows, f"patching {site}", progress) as bar:
        for block in range(0, len(batch), limits.prompts):
            chunks = [each for each in plan.passes if block <= each.rows[0, 0] < block + limits.prompts]
            rows = slice(block, block + limits.prompts)
            found = _patched(model, base[rows], other[rows], batch.columns[rows], chunks, block, site, over, bar)
            for chunk, (answers, touched, moved) in zip(chunks, found, strict=True):
                cells, prompts = tuple(chunk.rows.T), chunk.rows[:, 0]
                effect[cells] = (_metric(answers, metric) - corrupted[prompts]) / gap[prompts]
                elements[cells], change[cells] = touched.numpy(), moved.double().numpy()
    if not elements.any():
        raise NothingChanged(f"No patch at {site} changed any activation: the interventions never took place.")
    coords: dict[str, Any] = {axis: np.arange(size) for axis, size in zip(over, plan.shape[1:], strict=True)}
    if "pos" in over:
        coords |= batch.pos_coords()
        effect = batch.blank(effect, 1 + over.index("pos"))
    dims = ("prompt", *over)
    return _labelled(
        effect, dims, model, batch, coords, clean, corrupted, name="effect", site=site, mode=mode, replace="other",
        metric=metric, skipped_cells=plan.skipped, n_passes=plan.n_passes, elements_changed=int(elements.sum()),
        mean_change=float(change.sum() / elements.sum()),
    ).assign_coords(n_changed=(dims, elements), mean_change=(dims, change / np.maximum(elements, 1)))  # fmt: skip


def _patched(
    model: LargeModel, base: Padded, other: Padded, columns: Tensor, chunks: Sequence[engine.Pass], first: int,
    site: str, over: tuple[str, ...], bar: Any,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Answers [row, 3], elements changed [row] and sum of changes [row] of every pass, in one session."""
    nn, modules, remote = model.nn, asdict(model.modules), model.remote
    n_layers, n_heads = modules["n_layers"], modules["n_heads"] if site == "z" else None
    source_inputs, base_inputs = other.inputs(last=True), base.inputs(last=True)
    jobs = []  # index vectors only: what they pick is picked where the model is
    for chunk in chunks:
        prompts = torch.from_numpy(chunk.rows[:, 0] - first)
        edits = {}
        for layer in range(int(chunk.layers[0]), n_layers):
            rows = np.flatnonzero(chunk.layers == layer if "layer" in over else chunk.layers <= layer)
            if len(rows):
                at = {axis: torch.from_numpy(chunk.rows[rows, 1 + over.index(axis)]) for axis in over}
                edits[layer] = (torch.from_numpy(rows), at.get("pos"), at.get("head"))
        jobs.append((prompts, edits))
    layers = sorted({layer for _, edits in jobs for layer in edits})
    update = bar.update if not remote else None  # a bar does not travel
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                source: dict = {}
                with nn.trace(**source_inputs):
                    for layer in layers:
                        source[layer] = read(nn, modules, site, layer)
                for prompts, edits in jobs:
                    inputs = pick(base_inputs, prompts)
                    n_rows = len(prompts)
                    with nn.trace(**inputs):
                        elements, change = torch.zeros(n_rows, dtype=torch.long), torch.zeros(n_rows)
                        for layer, (rows, pos, head) in edits.items():
                            where = places(inputs["attention_mask"][rows].bool(), pos, head, n_heads)
                            new, touched, moved = put(
                                read(nn, modules, site, layer), source[layer], rows, prompts[rows], where, n_heads
                            )
                            write(nn, modules, site, layer, new)
                            elements[rows] += touched
                            change[rows] += moved
                        kept.append((answer(nn.output.logits[:, -1], columns[prompts]).cpu(), elements, change))
                    if update is not None:
                        update(n_rows)
    return list(kept)


def direct_logit_attribution(
    model: LargeModel, pairs: Pairs, by: str = "component", *, on: str = "clean", batch_size: int = 32
) -> xr.DataArray:
    """As :func:`mi_utils.attribution.direct_logit_attribution`: the logit difference by who wrote it into the stream.

    Args:
        pairs: or a list of them, as in :func:`logit_lens`.
        by: "component" (embeddings, attention and MLP of each layer), "head" or "layer".

    Returns:
        Dims (prompt, component), in logits; sums over ``component`` to the logit difference.

    Raises:
        ValueError: unknown ``by`` or ``on``.
        RuntimeError: the parts do not sum to the logit difference (a soft cap on the logits, say), or, by head, a
            normalisation stands between heads and stream (Gemma 2 and 3).
        OutOfMemory, RemoteFailed: with the next step.
    """
    import xarray as xr

    if by not in BY:
        raise ValueError(f"Unknown by={by!r}: use one of {', '.join(BY)}. By neuron or position: load_model's models.")
    if on not in ("clean", "corrupted"):
        raise ValueError(f"on={on!r}: attribute on 'clean' or 'corrupted' prompts.")
    if by == "head" and model.modules.normed:
        raise RuntimeError(
            f"{model.mi.name} normalises what its heads write together before adding it to the stream: no head writes "
            "anything of its own there. Use by='component'."
        )
    batch = _Batch.of(model, pairs)
    prompts: Padded = getattr(batch, on)
    nn, modules, remote = model.nn, asdict(model.modules), model.remote
    jobs = [
        (prompts[rows].inputs(last=True), batch.columns[rows]) for rows in torch.arange(len(batch)).split(batch_size)
    ]
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                for inputs, wanted in jobs:
                    with nn.trace(**inputs):
                        positions = None
                        if modules["positions"]:
                            positions = nn.get(modules["positions"]).output[:, -1]
                        start = read(nn, modules, "resid_pre", 0)[:, -1]
                        if positions is not None:
                            positions = positions.expand_as(start).to(start.device)
                        written = []
                        for layer in range(modules["n_layers"]):
                            z = read(nn, modules, "z", layer)[:, -1]
                            attn = read(nn, modules, "attn_out", layer)[:, -1]
                            written.append((z, attn, read(nn, modules, "mlp_out", layer)[:, -1]))
                        stream = read(nn, modules, "resid_post", modules["n_layers"] - 1)[:, -1]
                        total = answer(nn.output.logits[:, -1], wanted)
                        direction, constant = answer_direction(nn, modules, stream, wanted)
                        parts = {"bias": constant.cpu()}
                        ends = {"embed": start.double()}
                        if positions is not None and by != "layer":
                            ends = {"embed": start.double() - positions.double(), "pos_embed": positions.double()}
                        for layer, (z, attn, mlp) in enumerate(written):
                            if by == "head":
                                heads, bias = heads_along(nn, modules, layer, z, direction)
                                for head in range(modules["n_heads"]):
                                    parts[f"L{layer}H{head}"] = heads[head].cpu()
                                parts[f"attn bias L{layer}"] = bias.cpu()
                            elif by == "component":
                                ends[f"attn L{layer}"] = attn.double()
                            if by == "layer":
                                ends[f"L{layer}"] = attn.double() + mlp.double().to(attn.device)
                            else:
                                ends[f"mlp L{layer}"] = mlp.double()
                        for name, vector in ends.items():
                            parts[name] = (vector.to(direction.device) * direction).sum(-1).cpu()
                        kept.append((parts, (total[:, 0] - total[:, 1]).cpu()))
    labels = _component_labels(model, by)
    values = np.stack([numpy(torch.cat([parts[name] for parts, _ in kept])) for name, _, _ in labels], axis=1)
    total = numpy(torch.cat([each for _, each in kept]))
    apart, largest = np.abs(values.sum(1) - total).max(), np.maximum(1.0, np.abs(values).max())
    if not apart <= (1e-3 if model.mi.dtype == "float32" else 0.05) * largest:  # so put, NaN does not pass
        raise RuntimeError(
            f"The parts sum to something {apart:.2g} away from the logit difference of {model.mi.name}: its logits are "
            "not a linear function of the stream once the last normalisation is frozen (a soft cap, say)."
        )
    return xr.DataArray(
        values,
        dims=("prompt", "component"),
        coords={
            "prompt": np.arange(len(batch)), "template": ("prompt", batch.template), "logit_diff": ("prompt", total),
            "component": [name for name, _, _ in labels], "kind": ("component", [kind for _, kind, _ in labels]),
            "layer": ("component", [layer for _, _, layer in labels]),
        },
        attrs=_attrs(model) | {
            "on": on, "by": by, "metric": "logit_diff", "mean_logit_diff": float(total.mean()), "units": "logits",
        },
        name="attribution",
    )  # fmt: skip


def activations(model: LargeModel, pairs: Pairs, site: str = "resid_post", *, pos: int = -1) -> xr.DataArray:
    """Activations of both runs at one position counted from the end, in the form of :func:`probing.activations`.

    Returns:
        Dims (layer, example, feature): the clean prompts, labelled "clean", then the corrupted ones. For
        :func:`probing.difference_in_means`.

    Raises:
        ValueError: unknown site, or a position that a prompt has not.
    """
    import xarray as xr

    _check_site(site, ())
    batch = _Batch.of(model, pairs)
    shortest = int(batch.clean.mask.sum(1).min())
    if not -shortest <= pos < 0:
        raise ValueError(f"pos={pos}: counted from the end, from -{shortest} (the shortest prompt's first) to -1.")
    nn, modules, remote = model.nn, asdict(model.modules), model.remote
    jobs = [each[rows].inputs(last=True) for each in (batch.clean, batch.corrupted)
            for rows in torch.arange(len(batch)).split(32)]  # fmt: skip
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                for inputs in jobs:
                    with nn.trace(**inputs):
                        values = []
                        for layer in range(modules["n_layers"]):
                            values.append(read(nn, modules, site, layer)[:, pos].float().cpu())
                        kept.append(torch.stack(values))
    texts = [[text for part in batch.parts for text in getattr(part, which)] for which in ("clean", "corrupted")]
    return xr.DataArray(
        torch.cat(list(kept), dim=1).numpy(),
        dims=("layer", "example", "feature"),
        coords={
            "layer": np.arange(model.modules.n_layers),
            "label": ("example", np.repeat(["clean", "corrupted"], len(batch))),
            "text": ("example", [text for each in texts for text in each]),
            "pos": ("example", [pos] * 2 * len(batch)),
        },
        attrs=_attrs(model) | {"site": site, "groups": []},
        name="activation",
    )


def steer(
    model: LargeModel,
    pairs: Pairs,
    directions: Mapping[str, Direction],
    scales: Sequence[float],
    *,
    pos: int | Sequence[int] = -1,
    metric: str = "logit_diff",
    batch_size: int = 64,
) -> xr.DataArray:
    """As :func:`mi_utils.probing.steer`: add multiples of a direction in the clean run, and watch the answer.

    Args:
        pairs: or a list of them, as in :func:`logit_lens`.
        pos: where; of a list of pairs, counted from the end.

    Returns:
        Over (direction, scale, prompt) the metric under steering; coordinates and receipt as there.

    Raises:
        ValueError: no directions or scales, a site that is not as wide as the stream, a position outside the prompts.
        NothingChanged: every scale is 0, or a step that changes no activation.
        OutOfMemory, RemoteFailed: with the next step.
    """
    import xarray as xr

    batch = _Batch.of(model, pairs)
    scales, positions = [float(scale) for scale in scales], _positions(batch, pos)
    _check_metric(metric)
    _check_directions(model, directions)
    if not scales:
        raise ValueError("Give at least one scale.")
    if not any(scales):
        raise NothingChanged("Every scale is 0: nothing would be added. Give scales such as [-1, 0, 1].")
    clean, corrupted = (
        _metric(_answers(model, each, batch.columns), metric) for each in (batch.clean, batch.corrupted)
    )
    keys = [(name, scale) for name in directions for scale in scales]
    jobs = [
        (batch.clean[rows].inputs(last=True), batch.columns[rows], directions[name].site, directions[name].layer,
         scale * directions[name].vector)
        for name, scale in keys if scale for rows in torch.arange(len(batch)).split(batch_size)
    ]  # fmt: skip
    nn, modules, remote = model.nn, asdict(model.modules), model.remote
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                for inputs, wanted, site, layer, added in jobs:
                    with nn.trace(**inputs):
                        before = read(nn, modules, site, layer)
                        after = before.clone()
                        after[:, positions] += added.to(before.device, before.dtype)
                        write(nn, modules, site, layer, after)
                        moved = (after - before).float().abs()
                        kept.append(
                            (answer(nn.output.logits[:, -1], wanted).cpu(), int((moved > 0).sum()), float(moved.sum()))
                        )
    runs = iter(kept)
    values, changed, total = [], 0, 0.0
    for name, scale in keys:
        if not scale:
            values.append(clean)
            continue
        parts = [next(runs) for _ in torch.arange(len(batch)).split(batch_size)]
        if not sum(elements for _, elements, _ in parts):
            where = f"{directions[name].site} of layer {directions[name].layer}"
            raise NothingChanged(
                f"steering along {name!r} at {where} changed no activation: the step is too small for its precision."
            )
        values.append(np.concatenate([_metric(answers, metric) for answers, _, _ in parts]))
        changed += sum(elements for _, elements, _ in parts)
        total += sum(moved for _, _, moved in parts)
    return xr.DataArray(
        np.stack(values).reshape(len(directions), len(scales), len(batch)),
        dims=("direction", "scale", "prompt"),
        coords={
            "direction": list(directions),
            **{name: ("direction", [getattr(each, name) for each in directions.values()])
               for name in ("kind", "site", "layer")},
            "scale": scales, "prompt": np.arange(len(batch)), "template": ("prompt", batch.template),
            "clean": ("prompt", clean), "corrupted": ("prompt", corrupted),
        },
        attrs=_attrs(model) | {
            "metric": metric, "mode": "steering", "positions": positions, "elements_changed": changed,
            "mean_change": total / max(changed, 1),
        },
        name="steering",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- details


def _answers(model: LargeModel, prompts: Padded, columns: Tensor, batch_size: int = 64) -> Float[Tensor, "prompt 3"]:
    """See :func:`answer`, of unpatched runs."""
    nn, remote = model.nn, model.remote
    jobs = [(prompts[rows].inputs(last=True), columns[rows]) for rows in torch.arange(len(prompts)).split(batch_size)]
    with _clear_errors(model), _shipped(model):
        with nn.session(remote=remote):
            kept = _nnsight().save([])
            with torch.no_grad():
                for inputs, wanted in jobs:
                    with nn.trace(**inputs):
                        kept.append(answer(nn.output.logits[:, -1], wanted).cpu())
    return torch.cat(list(kept))


def _metric(answers: Float[Tensor, "row 3"], metric: str) -> Float[np.ndarray, " row"]:
    correct, incorrect, total = numpy(answers).T
    return correct - incorrect if metric == "logit_diff" else correct - total


def _check_metric(metric: Any) -> None:
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}: there are {', '.join(METRICS)}.")


def _check_site(site: str, over: tuple[str, ...]) -> None:
    if site not in SITES:
        raise ValueError(f"Unknown site {site!r}: on large models the sites are {', '.join(SITES)}.")
    if unknown := [axis for axis in over if axis not in ("layer", "pos", "head")]:
        raise ValueError(f"Cannot patch over {unknown}: the axes are layer, pos, head.")
    if len(set(over)) < len(over):
        raise ValueError(f"An axis stands twice in over={over}.")
    if "head" in over and site != "z":
        raise ValueError(f"{site} has no heads to go over; z has.")


def _check_directions(model: LargeModel, directions: Mapping[str, Direction]) -> None:
    if not directions:
        raise ValueError("No directions given: nothing to do.")
    for name, direction in directions.items():
        if direction.site not in STREAM:
            raise ValueError(f"Direction {name!r} is at {direction.site}; directions are added at {', '.join(STREAM)}.")
        if not 0 <= direction.layer < model.modules.n_layers:
            raise ValueError(f"Direction {name!r} is of layer {direction.layer}; there are {model.modules.n_layers}.")
        if not direction.vector.norm() > 0:
            raise NothingChanged(f"Direction {name!r} is zero (or not a number): nothing would be changed.")
        if len(direction.vector) != model.mi.shape.d_model:
            raise ValueError(
                f"Direction {name!r} has {len(direction.vector)} dimensions, the stream {model.mi.shape.d_model}."
            )


def _positions(batch: _Batch, pos: int | Sequence[int]) -> list[int]:
    """Columns of the padded batch."""
    length, shortest = batch.clean.tokens.shape[1], int(batch.clean.mask.sum(1).min())
    wanted = [pos] if isinstance(pos, int) else list(pos)
    if batch.padded and any(place >= 0 for place in wanted):
        raise ValueError(f"pos={pos}: prompts of several lengths are counted from the end: use -1, -2 …")
    if not wanted or any(not -shortest <= place < length for place in wanted):
        raise ValueError(f"pos={pos}: the prompts have positions 0 to {shortest - 1} (or -1 for the last).")
    return sorted({place % length for place in wanted})


def _limits(model: LargeModel, prompts: Padded, site: str, batch_size: int | None) -> engine.Limits:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    shape, size = model.mi.shape, prompts.tokens.shape
    if model.remote and model.remote != "local":
        return engine.Limits(REMOTE_TOKENS, len(prompts), batch_size, 0.0)
    return engine.limits_for(
        shape, *size, torch.device(model.mi.device), _float_name(model.mi.dtype), site, batch_size
    )  # fmt: skip


def _float_name(dtype: str) -> str:
    return "float16" if dtype == "int8" else dtype


def _component_labels(model: LargeModel, by: str) -> list[tuple[str, str, int]]:
    """Name, kind and layer of each component, in the order of the computation."""
    labels = [("embed", "embed", -1)]
    if model.modules.positions and by != "layer":
        labels.append(("pos_embed", "embed", -1))
    for layer in range(model.modules.n_layers):
        if by == "layer":
            labels.append((f"L{layer}", "layer", layer))
            continue
        if by == "head":
            labels += [(f"L{layer}H{head}", "head", layer) for head in range(model.modules.n_heads)]
            labels.append((f"attn bias L{layer}", "bias", layer))
        else:
            labels.append((f"attn L{layer}", "attn", layer))
        labels.append((f"mlp L{layer}", "mlp", layer))
    return [*labels, ("bias", "bias", -1)]


def _attrs(model: LargeModel) -> dict[str, Any]:
    return {"model": model.mi.name, "processing": model.mi.processing, "seed": model.mi.seed}


def _labelled(
    values: np.ndarray, dims: tuple[str, ...], model: LargeModel, batch: _Batch, coords: dict[str, Any],
    clean: np.ndarray, corrupted: np.ndarray, **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    if len(batch.parts) == 1:
        return labelled(values, dims, model, batch.parts[0], coords, clean, corrupted, **attrs)
    import xarray as xr

    name = attrs.pop("name")
    coords = coords | {
        "prompt": np.arange(len(batch)), "template": ("prompt", batch.template), "clean": ("prompt", clean),
        "corrupted": ("prompt", corrupted),
    }  # fmt: skip
    means = {"mean_clean": float(clean.mean()), "mean_corrupted": float(corrupted.mean())}
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs | _attrs(model) | means, name=name)


def _progress(total: int, title: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="cell", disable=not progress, leave=False, delay=5)
