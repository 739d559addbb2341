"""Loading models, running them, reading and changing their activations. The only door to TransformerLens.

Models are ``TransformerBridge`` objects. Everything that the rest of the package asks of one goes through a function
here, so that a change of the library is a change of this file.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mi_utils.compute import SHORT_NAMES, ModelShape, pick_device, pick_dtype

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    Hook = Callable[[Tensor, Any], Tensor | None]

ASSETS = Path(__file__).parent / "smallworld" / "assets"
EMBEDDED: dict[str, Path] = {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}
PROCESSING = ("folded", "raw")


class ModelNotFound(RuntimeError):
    """No model of that name here, in the hub's cache or on the hub, or the hub cannot be reached."""


class HookNeverFired(RuntimeError):
    """A hook that the forward pass never came by: whatever it was meant to change was left as it is."""


class WrongNumbers(RuntimeError):
    """The loaded model does not compute what the Hugging Face model computes."""


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded and how. Attached to the model as ``model.mi``; recorded with every result.

    ``seed`` is the caller's seed, which also drew the weights where ``random_weights`` is true. ``path`` is a directory
    or a hub id.
    """

    name: str
    path: str
    processing: str
    device: str
    dtype: str
    seed: int
    random_weights: bool
    shape: ModelShape


# -------------------------------------------------------------------------------------------------------------- names


def embedded_names() -> list[str]:
    """Names of the models that ship with this package, sorted."""
    return list(EMBEDDED)


def resolve(name: str) -> str:
    """Where a model's files are: a directory's path (embedded or local), or a hub id.

    Short names ("gpt2-small", "pythia-70m") become hub ids; what nothing here knows is taken for one. Nothing is
    opened or downloaded; the hand-set model ("handset") is written to a temporary directory.

    Raises:
        ModelNotFound: ``name`` is written as a path, and there is no such directory.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    if name == "handset":
        from mi_utils.smallworld import handset

        with _quiet(True):
            return str(handset.directory())
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path)
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"There is no directory {name!r}. {_go_on()}")
    return name if "/" in name else _transformer_lens_alias(name)


def _transformer_lens_alias(name: str) -> str:
    """The hub id behind one of TransformerLens's other short names; the name itself where it is none."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((hub_id for hub_id, aliases in MODEL_ALIASES.items() if name in aliases), name)


def split_random(name: str, seed: int) -> tuple[str, int | None]:
    """ "random:NAME:7" is (NAME, 7), "random:NAME" takes the seed given, any other name has none."""
    if not name.startswith("random:"):
        return name, None
    plain = name.removeprefix("random:")
    head, _, tail = plain.rpartition(":")
    return (head, int(tail)) if head and tail.isdigit() else (plain, seed)


def _go_on() -> str:
    embedded = ", ".join(name for name in embedded_names() if "-step" not in name) or "none (run `make train`)"
    return (
        f"How to go on: the embedded models need no network ({embedded}); or give the path of a directory with "
        "config.json, weights and tokenizer; or download once where there is a network (`hf download NAME`), copy "
        "the cache here, point HF_HOME at it and set HF_HUB_OFFLINE=1 before Python starts."
    )


# ------------------------------------------------------------------------------------------------------------ loading


def load_model(
    name_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processing: str = "folded",
    seed: int = 0,
) -> TransformerBridge:
    """Load a language model: embedded name, local directory or hub id, all by the same path.

    Args:
        name_or_path: "smallworld", "smallworld-seed1", "gpt2-small", "./a-directory", "EleutherAI/pythia-70m" …
            "handset" is the model whose weights are set by hand (see ``mi_utils.smallworld.handset``).
            "random:NAME" or "random:NAME:SEED" is the same shape and tokenizer with fresh weights: the negative
            control for any method.
        device, dtype: the best device there is and float32, unless told otherwise.
        processing: "folded" folds LayerNorm into the weights that read it and centres the weights that write to the
            stream and the unembedding, as published IOI figures assume; log-probabilities stay the same, logits
            shift by a constant. "raw" leaves the weights as they were saved.
        seed: recorded with every result; draws the weights of "random:NAME".

    Returns:
        The model in evaluation mode, parameters without gradients, with ``model.mi`` (see :class:`ModelInfo`). Its
        log-probabilities on a short prompt have been compared with the Hugging Face model's own.

    Raises:
        ModelNotFound: nothing of that name, or the hub cannot be reached; says how to go on.
        ValueError: unknown processing, device or dtype.
        WrongNumbers: the loaded model does not compute what the Hugging Face model computes.
    """
    if processing not in PROCESSING:
        raise ValueError(f"Unknown processing {processing!r}: use {' or '.join(PROCESSING)}.")
    device = pick_device(device)
    dtype = pick_dtype(device, dtype)
    name, weights_seed = split_random(name_or_path, seed)
    path = resolve(name)
    hf_model, tokenizer = load_hugging_face(name_or_path, path, dtype, weights_seed)
    hf_model = hf_model.to(device).eval()
    n_parameters = sum(parameter.numel() for parameter in hf_model.parameters())
    tokens = _probe(tokenizer, hf_model.config).to(device)
    expected = _log_probs(hf_model(tokens).logits)  # now: the bridge changes this very model

    import torch
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng():  # the bridge's new modules draw weights of their own, which are then replaced
        model = TransformerBridge.boot_transformers(
            path, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
        )
        if processing == "folded":
            model.enable_compatibility_mode(disable_warnings=True)
    model.eval()
    for parameter in _all_parameters(model):
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)  # folding computes in float32 and leaves some of it (Qwen2)
    model.mi = ModelInfo(
        name=name_or_path,
        path=path,
        processing=processing,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        random_weights=weights_seed is not None,
        shape=ModelShape.from_config(hf_model.config, name=name_or_path, n_parameters=n_parameters),
    )
    model.mi_hook_points = dict(model.hook_dict)  # building it costs as much as a small forward pass
    _quicken(model)
    _check_numbers(model, tokens, expected)
    return model


def _quicken(model: Any) -> None:
    """Compute GPT-2's activation and every LayerNorm in one or a few kernels, instead of chains of eight; let go of the
    attention patterns, of which the bridge keeps each layer's last one and which nothing reads.

    The same functions to float rounding, forwards and backwards; on small models the chains are a third of the time.
    A hook inside a LayerNorm (``hook_scale``, ``hook_normalized``) brings its chain back for the run.
    """
    import torch
    from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge, NormalizationBridge
    from transformers.activations import NewGELUActivation

    def normalise(norm: Any, stream: Tensor) -> Tensor:
        if norm.hook_scale.has_hooks() or norm.hook_normalized.has_hooks():
            return type(norm).forward(norm, stream)
        return norm.hook_out(norm.original_component(norm.hook_in(stream)))

    def process(attention: Any, output: Any) -> Any:
        processed = type(attention)._process_output(attention, output)
        vars(attention)["_pattern"] = None
        return processed

    for module in model.modules():
        if type(module) is NewGELUActivation:
            module.forward = _gelu
        elif isinstance(module, JointQKVAttentionBridge):
            vars(module)["_process_output"] = partial(process, module)
        elif type(module) is NormalizationBridge and type(module.original_component) is torch.nn.LayerNorm:
            vars(module)["forward"] = partial(normalise, module)  # setattr would hand it on to the original component


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, which is x sigmoid(2u): on a CPU the sigmoid's kernel takes a third of the tanh's time."""
    import torch

    if x.device.type != "cpu" or x.itemsize < 4:
        return torch.nn.functional.gelu(x, approximate="tanh")
    scale = math.sqrt(8 / math.pi)
    twice = torch.addcmul(x.new_tensor(scale), x, x, value=0.044715 * scale)  # 2u by x
    if torch.is_grad_enabled():
        return (twice * x).sigmoid_() * x
    return twice.mul_(x).sigmoid_().mul_(x)  # in place: the memory of a new tensor costs more than the product


def info(model: Any) -> ModelInfo:
    """What was loaded and how.

    Raises:
        TypeError: the model was not loaded by :func:`load_model`.
    """
    found = getattr(model, "mi", None)
    if not isinstance(found, ModelInfo):
        raise TypeError(
            f"{type(model).__name__} was not loaded by mi_utils: results could not say what they were measured on. "
            "Use model = load_model(name_or_path)."
        )
    return found


def load_hugging_face(
    name: str, path: str, dtype: torch.dtype, weights_seed: int | None, **options: Any
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer, on the CPU unless ``options`` of ``from_pretrained`` say otherwise.

    Fails fast where the hub is out of reach.

    Raises:
        ModelNotFound: it does not load.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = Path(path).is_dir()
    if local and not (Path(path) / "config.json").is_file():
        raise ModelNotFound(f"The directory {path} has no config.json, so it holds no model. {_go_on()}")
    cached = local or check_on_hub(name, path)
    try:
        with _quiet(cached):
            # "eager": attention as written, so that its patterns can be read and changed.
            config = AutoConfig.from_pretrained(path, local_files_only=cached)
            if weights_seed is None:
                hf_model = AutoModelForCausalLM.from_pretrained(
                    path, config=config, dtype=dtype, attn_implementation="eager", local_files_only=cached, **options
                )
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(weights_seed)
                    hf_model = AutoModelForCausalLM.from_config(
                        config, dtype=torch.float32, attn_implementation="eager"
                    ).to(dtype)
            tokenizer = _load_tokenizer(AutoTokenizer, path, cached)
    except (OSError, ValueError) as error:
        where = "directory" if local else "hub's copy"
        raise ModelNotFound(f"The {where} {path!r} does not load: {error}\n{_go_on()}") from error
    return hf_model, tokenizer


def _load_tokenizer(auto_tokenizer: Any, path: str, cached: bool) -> Any:
    # The bridge wants a tokenizer that prepends BOS, and would fetch one again if this did not.
    try:
        return auto_tokenizer.from_pretrained(path, add_bos_token=True, local_files_only=cached)
    except ValueError:  # a tokenizer without BOS
        return auto_tokenizer.from_pretrained(path, local_files_only=cached)


def check_on_hub(name: str, hub_id: str) -> bool:
    """Whether a hub model has been downloaded; where it has not, one short question whether it can be.

    Raises:
        ModelNotFound: no such model, or no answer.
    """
    cached = _in_cache(hub_id)
    if not cached:
        _ask_hub(name, hub_id)
    return cached


def _in_cache(hub_id: str) -> bool:
    """Whether configuration and weights of a hub model have been downloaded; asks nobody.

    A cached model is loaded as it lies there. Asking the hub for news first would cost minutes without a network.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    try:
        found = [isinstance(try_to_load_from_cache(hub_id, file), str) for file in ("config.json", *weights)]
    except HFValidationError as error:
        raise ModelNotFound(
            f"{hub_id!r} is no model here, and cannot be the name of one on the hub. {_go_on()}"
        ) from error
    return found[0] and any(found[1:])


def _ask_hub(name: str, hub_id: str) -> None:
    """One short question to the hub, instead of the many retries of a download.

    Raises:
        ModelNotFound: no such model, or no answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        raise ModelNotFound(
            f"Model {name!r} is neither embedded, nor a directory, nor in the hub cache ({constants.HF_HUB_CACHE}), "
            f"and HF_HUB_OFFLINE is set. {_go_on()}"
        )
    try:
        HfApi().model_info(hub_id, timeout=5)
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"There is no model {name!r}: not embedded, no directory, and not on the hub (or it is private or gated: "
            f"log in with `hf auth login`). {_go_on()}"
        ) from error
    except Exception as error:  # the hub's client lets through whatever its network library raises
        raise ModelNotFound(
            f"Model {name!r} is neither embedded, nor a directory, nor in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}). {_go_on()}"
        ) from error


@contextmanager
def _quiet(cached: bool) -> Iterator[None]:
    """No bar for reading local files, which takes a moment; downloads keep theirs."""
    from transformers.utils import logging

    if not cached or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _all_parameters(model: Any) -> Iterator[Any]:
    """Also those that the bridge made beside the Hugging Face model's, which its own ``parameters`` leaves out."""
    import torch

    return torch.nn.Module.parameters(model)


# ------------------------------------------------------------------------------------------------------------- checks

PROBE = "The cat sat on the mat because it was warm."


def _probe(tokenizer: Any, config: Any) -> Int[Tensor, "one pos"]:
    import torch

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = bos + tokenizer.encode(PROBE, add_special_tokens=False)
    longest = getattr(config, "max_position_embeddings", None) or len(ids)
    return torch.tensor([ids[:longest]])


def _log_probs(logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
    return logits.detach().float().log_softmax(-1)


def _check_numbers(model: Any, tokens: Int[Tensor, "one pos"], expected: Float[Tensor, "one pos d_vocab"]) -> None:
    found, about = _log_probs(run(model, tokens)), info(model)
    if about.dtype != "float32":  # rounding moves the unlikely tokens by whole nats: compare the likely ones
        likely = expected.topk(10).indices
        found, expected = found.gather(-1, likely), expected.gather(-1, likely)
    apart, allowed = float((found - expected).abs().max()), 1e-3 if about.dtype == "float32" else 0.5
    if not apart <= allowed:  # also when it is not a number
        raise WrongNumbers(
            f"{about.name} ({about.processing}, {about.dtype}, {about.device}) is {apart:.2g} nats away from the "
            f"Hugging Face model's own log-probabilities; at most {allowed} was expected. Try processing='raw', "
            "float32 or the CPU, and do not trust results before this is understood."
        )


CANARY = "canary.json"
CANARY_TEXT = "When Mary and John went to the store, John gave a drink to Mary. The keys to the cabinet are old."


def write_canary(directory: str | Path) -> Path:
    """Store what a model directory computes on a fixed text: float32 on the CPU, by Hugging Face's code alone.

    The file holds the 20 likeliest tokens at every position and their log-probabilities.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with _quiet(True):
        hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(CANARY_TEXT, add_special_tokens=False)]
    top = _log_probs(hf_model.eval()(torch.tensor([ids])).logits[0]).topk(20)
    record = {
        "tokens": ids,
        "likeliest": top.indices.tolist(),
        "log_probs": [[round(value, 5) for value in row] for row in top.values.tolist()],
    }
    path = directory / CANARY
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def check_canary(
    name_or_path: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> float:
    """Largest difference, in nats, between the stored log-probabilities and those on this device in this precision.

    Raises:
        FileNotFoundError: the model has no ``canary.json``.
    """
    import torch

    path = Path(resolve(name_or_path)) / CANARY
    if not path.is_file():
        raise FileNotFoundError(f"{name_or_path} has no {CANARY}: write_canary(directory) makes it from a good model.")
    record = json.loads(path.read_text(encoding="utf-8"))
    model = load_model(name_or_path, device=device, dtype=dtype)
    found = _log_probs(run(model, torch.tensor([record["tokens"]])))[0].cpu()
    stored = torch.tensor(record["log_probs"])
    return float((found.gather(-1, torch.tensor(record["likeliest"])) - stored).abs().max())


# ------------------------------------------------------------------------------------------------------------- tokens


def bos(model: Any) -> int:
    """The id of the token that stands in front of every text.

    Raises:
        ValueError: a tokenizer without BOS.
    """
    found = model.tokenizer.bos_token_id
    if found is None:
        raise ValueError(f"The tokenizer of {info(model).name} has no BOS token, but every text must begin with one.")
    return found


def to_tokens_and_characters(model: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A text as tokens with BOS in front, and the characters [start, end) of each token behind it.

    Raises:
        ValueError: a tokenizer without BOS, or one that does not tell the characters.
    """
    if not model.tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {info(model).name} does not tell which characters a token stands for.")
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [bos(model), *encoded["input_ids"]], encoded["offset_mapping"]


def to_tokens(model: Any, prompts: Sequence[str]) -> Int[Tensor, "prompt pos"]:
    """Prompts of one length as tokens, each with exactly one BOS in front, on the model's device.

    Raises:
        ValueError: no prompts, prompts of different lengths (nothing is padded: a padded prompt may get other logits
            than alone), longer than the context, a BOS written in a prompt, a tokenizer without BOS.
    """
    import torch

    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("Give a list of prompts, with at least one in it.")
    tokenizer, beginning = model.tokenizer, bos(model)
    rows = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    if doubled := [prompt for prompt, row in zip(prompts, rows, strict=True) if beginning in row]:
        raise ValueError(
            f"BOS would stand twice in {doubled[0]!r}: it is put in front of every prompt. Take "
            f"{tokenizer.bos_token!r} out of the text."
        )
    lengths = [len(row) + 1 for row in rows]
    if len(set(lengths)) > 1:
        odd = next(i for i, length in enumerate(lengths) if length != lengths[0])
        raise ValueError(
            f"Prompts of different lengths: {prompts[0]!r} is {lengths[0]} tokens, {prompts[odd]!r} (number {odd}) is "
            f"{lengths[odd]}. Positions have to mean the same in all of them: make them equally long, or take one "
            "length at a time."
        )
    if lengths[0] > info(model).shape.n_ctx:
        raise ValueError(f"Prompts of {lengths[0]} tokens: {info(model).name} has room for {info(model).shape.n_ctx}.")
    return torch.tensor([[beginning, *row] for row in rows], device=info(model).device)


def single_token(model: Any, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: it is several (or none); the message shows the pieces.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = " · ".join(repr(model.tokenizer.decode([token])) for token in ids)
        space = "" if text.startswith(" ") else " Does it lack its leading space?"
        raise ValueError(f"{text!r} is {len(ids)} tokens of {info(model).name}, not one: {pieces}.{space}")
    return ids[0]


def token_strings(model: Any, tokens: Int[Tensor, " pos"]) -> list[str]:
    """Each token as text. A byte that is no whole character shows as "\N{REPLACEMENT CHARACTER}"."""
    return [model.tokenizer.decode([int(token)]) for token in tokens]


# ------------------------------------------------------------------------------------------------------------ running

SITES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "pattern": "blocks.{}.attn.hook_pattern",
    "mlp_post": "blocks.{}.mlp.hook_post",
}

# Read by the techniques, and not patched: see ``cache``.
READ_SITES = {"attn_scores": "blocks.{}.attn.hook_attn_scores"}


def hook_name(site: str, layer: int) -> str:
    """The name of a site's hook, as :func:`run_with_hooks` takes it.

    Activations: the stream and the outputs [prompt, pos, d_model]; q, k, v, z [prompt, pos, head, d_head] (k and v
    with the heads of grouped attention); pattern [prompt, head, query, key]; mlp_post, the MLP's neurons after the
    nonlinearity [prompt, pos, d_mlp]. An edit of resid_mid reaches the MLP only, not the skip connection round it.

    Raises:
        ValueError: unknown site.
    """
    if site not in SITES:
        raise ValueError(f"Unknown site {site!r}: the sites are {', '.join(SITES)}.")
    return SITES[site].format(int(layer))


def run(model: Any, tokens: Int[Tensor, "prompt pos"], *, stop_at_layer: int | None = None) -> Tensor:
    """Logits [prompt, pos, d_vocab]; or, with ``stop_at_layer=l``, the residual stream after l blocks
    [prompt, pos, d_model] (0: the embeddings), without computing what follows.

    Raises:
        ValueError: a layer that the model has not.
    """
    about = info(model)
    tokens = tokens.to(about.device)
    if stop_at_layer is None:
        return model(tokens, use_cache=False)
    if not 0 <= stop_at_layer <= about.shape.n_layers:
        raise ValueError(f"stop_at_layer={stop_at_layer}: for {about.name}, from 0 to {about.shape.n_layers}.")
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(activation: Tensor, hook: Any) -> None:
        raise StopAtLayerException(activation)  # the bridge catches it and returns the activation

    last = stop_at_layer == about.shape.n_layers
    with _hooks(model, [("ln_final.hook_in" if last else hook_name("resid_pre", stop_at_layer), stop)]):
        return model(tokens, use_cache=False)


def cache(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    sites: Sequence[str],
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> dict[tuple[str, int], Tensor]:
    """Run the model and keep the activations asked for, and nothing else (copies, so that no larger tensor stays).

    Args:
        sites: see :func:`hook_name`; also attn_scores [prompt, head, query, key] (scaled, before the softmax).
        layers: all by default. The run ends after the last one asked for.
        positions: which to keep, negative ones counted from the end; of a pattern or scores, the query's. All by
            default.

    Returns:
        (site, layer) to activation, detached.

    Raises:
        ValueError: unknown site or layer, or a site that this architecture has not.
    """
    import torch

    n_layers = info(model).shape.n_layers
    layers = range(n_layers) if layers is None else layers
    sites = [sites] if isinstance(sites, str) else list(sites)
    if not sites or not len(layers):
        raise ValueError("Nothing to keep: name at least one site and one layer.")
    if missing := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise ValueError(f"{info(model).name} has no layers {missing}: it has {n_layers}, counted from 0.")
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int) -> Hook:
        def hook(activation: Tensor, hook: Any) -> None:
            if positions is not None:
                by_query = site in ("pattern", "attn_scores")
                activation = activation[:, :, list(positions)] if by_query else activation[:, list(positions)]
            kept[site, layer] = activation.detach().clone()

        return hook

    def name(site: str, layer: int) -> str:
        return READ_SITES[site].format(layer) if site in READ_SITES else hook_name(site, layer)

    points = [(name(site, layer), keep(site, layer)) for site in sites for layer in layers]
    with torch.no_grad(), _hooks(model, points):
        run(model, tokens, stop_at_layer=max(layers) + 1)
    return kept


def run_with_hooks(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    hooks: Sequence[tuple[str, Hook]],
    *,
    stop_at_layer: int | None = None,
) -> Tensor:
    """What :func:`run` returns, from a run in which hooks read or replace activations.

    Args:
        hooks: (name from :func:`hook_name`, function of ``(activation, hook)``). What the function returns takes the
            activation's place; None leaves it. Each is called once, and is removed afterwards, whatever happens.
        stop_at_layer: as in :func:`run`.

    Raises:
        HookNeverFired: a hook that was not called.
        ValueError: a name that the model has no hook for.
    """
    with _hooks(model, hooks):
        return run(model, tokens, stop_at_layer=stop_at_layer)


def block_arguments(model: Any, tokens: Int[Tensor, "prompt pos"]) -> list[dict[str, Any]]:
    """What the model hands to each of its blocks beside the residual stream: attention mask, rotary angles and so on.

    They depend on the prompts' length alone, and belong to a batch of any size. For :func:`run_block`.
    """
    seen: list[dict[str, Any]] = []

    def remember(block: Any, args: tuple, kwargs: dict) -> None:
        bound = signature(block.original_component.forward).bind_partial(*args, **kwargs)
        _stream, *named = bound.arguments.items()
        arguments = {name: value for name, value in named if name != "kwargs"} | bound.arguments.get("kwargs", {})
        seen.append(arguments)

    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in model.blocks]
    try:
        run(model, tokens[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def run_block(
    model: Any,
    layer: int,
    stream: Float[Tensor, "prompt pos d_model"],
    arguments: dict[str, Any],
    positions: slice = slice(None),
    past: Any = None,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> Float[Tensor, "prompt pos d_model"]:
    """One of the model's own blocks, weights as they were processed, on some of the positions.

    Args:
        arguments: of this layer, from :func:`block_arguments`.
        positions: which positions ``stream`` holds, consecutive ones.
        past: keys and values of the positions before those. Asked by ``past.update(keys, values, layer)`` for all of
            them, [prompt, head, pos, d_head] (rotated, where the model rotates them).
        hooks: see :func:`run_with_hooks`.

    Raises:
        NotImplementedError: the model hands its blocks something that cannot be cut to these positions.
    """
    block = model.blocks[layer]
    here = {name: _at_positions(name, value, positions) for name, value in arguments.items()}
    if past is not None:
        name = _past_argument(type(block.original_component))
        if name is None:
            raise NotImplementedError(f"The blocks of {info(model).name} take no cached keys and values.")
        here[name] = past
    with _hooks(model, hooks):
        output = block(stream, **here)
    return output[0] if isinstance(output, tuple) else output


@functools.cache
def _past_argument(block: type) -> str | None:
    """What a class of blocks calls the keys and values of the positions before."""
    taken = signature(block.forward).parameters
    return next((name for name in ("past_key_values", "layer_past") if name in taken), None)


def _at_positions(name: str, value: Any, positions: slice) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_at_positions(name, each, positions) for each in value)
    if not hasattr(value, "shape"):
        return value
    if name == "attention_mask" and value.ndim == 4:
        return value[:, :, positions, : positions.stop]
    if name in ("position_ids", "position_embeddings", "cache_position"):
        return value[positions] if name == "cache_position" else value[:, positions]
    raise NotImplementedError(f"{name}, which the model hands to its blocks, is unknown here.")


@contextmanager
def _hooks(model: Any, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """Hooks for the time of a run. They go straight to the hook points: by name, the bridge's compatibility mode
    calls a hook once for each of a point's names, and what is added to an activation is added twice."""
    points = [(_hook_point(model, name), name, function) for name, function in hooks]
    fired = [0] * len(points)
    model.context_level += 1
    level = model.context_level
    try:
        for number, (point, _, function) in enumerate(points):

            def counted(activation: Tensor, hook: Any, number: int = number, function: Hook = function) -> Any:
                fired[number] += 1
                return function(activation, hook)

            point.add_hook(counted, level=level)
        yield
    finally:
        for point, _, _ in points:
            point.remove_hooks(level=level)
        model.context_level -= 1
    if silent := [name for (_, name, _), count in zip(points, fired, strict=True) if not count]:
        raise HookNeverFired(
            f"{', '.join(silent)}: no such activation came by in this run, so nothing was read or changed there. The "
            "model skips this point (a switched-off feature, or a layer after the run's end)."
        )


def _hook_point(model: Any, name: str) -> Any:
    points = model.mi_hook_points if info(model) else {}
    if name not in points:
        prefix = ".".join(name.split(".")[:2]) + "."
        near = [each for each in points if each.startswith(prefix)]
        there = f"There are {', '.join(near)}." if near else f"It has {info(model).shape.n_layers} layers, from 0."
        raise ValueError(f"{info(model).name} has no hook {name!r}. {there}")
    return points[name]


# ------------------------------------------------------------------------------------------------------------ weights


class Norm(NamedTuple):
    """A normalisation: ``weight * (x - mean x if centred) / sqrt(mean square + epsilon) + bias``."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    epsilon: float
    centred: bool


def final_norm(model: Any) -> Norm:
    """The last LayerNorm (centred) or RMSNorm. Folded into the unembedding it has weight 1 and bias 0."""
    return _norm(model, model.ln_final)


def attention_norm(model: Any, layer: int) -> Norm:
    """The normalisation through which a layer's heads read the stream. Folded into them it has weight 1 and bias 0."""
    return _norm(model, model.blocks[layer].ln1)


def _norm(model: Any, norm: Any) -> Norm:
    import torch

    weight = getattr(norm.original_component, "weight", None)
    # OLMo's has none. Else the bridge's own: it stays 1 where the weight was folded.
    weight = (
        torch.ones(info(model).shape.d_model, device=info(model).device) if weight is None else norm.weight.detach()
    )
    if getattr(model.cfg, "rmsnorm_uses_offset", False):  # Gemma stores the weight as its difference from 1
        weight = 1 + weight
    bias = getattr(norm.original_component, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach()
    return Norm(weight, bias, float(model.cfg.eps), not norm.uses_rms_norm)


def attention_scale(model: Any, layer: int) -> float:
    """What a layer's heads multiply query · key by: 1 / √d_head, as a rule.

    GPT-Neo takes the product as it is, and a GPT-2 may divide by the layer's number as well.
    """
    attention = model.blocks[layer].attn.original_component
    if type(attention).__name__ == "GPTNeoSelfAttention":
        return 1.0
    scaling = getattr(attention, "scaling", None)
    return float(info(model).shape.d_head ** -0.5 if scaling is None else scaling)


def unembed(
    model: Any,
    stream: Float[Tensor, "... d_model"],
    columns: Int[Tensor, "... column"] | None = None,
) -> Float[Tensor, "... d_vocab"]:
    """Logits that the model would give if this were its residual stream after the last block.

    With ``columns``, for each stream those of these tokens only [..., column]: a few products instead of the whole
    vocabulary's.
    """
    import torch

    info(model)
    normed = model.ln_final(stream)
    if columns is None:
        logits = model.unembed(normed)
    else:
        logits = torch.einsum("...m,m...c->...c", normed, W_U(model)[:, columns]) + b_U(model)[columns]
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


def position_embedding(model: Any, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_model"] | None:
    """What the position adds to the stream; None where positions are not embedded there (rotary models)."""
    info(model)
    if model.cfg.positional_embedding_type != "standard":
        return None
    kept: list[Tensor] = []
    with _hooks(model, [("hook_pos_embed", lambda activation, hook: kept.append(activation.detach().clone()))]):
        run(model, tokens, stop_at_layer=0)
    return kept[0].expand(*tokens.shape, -1)


def W_E(model: Any) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802
    """Embedding, a row a token, as it enters the stream (Gemma's times √d_model)."""
    import torch

    rows = model.embed.W_E.detach()
    ids = torch.arange(len(rows), device=info(model).device)[None]
    with torch.no_grad():
        as_stored = torch.equal(model.embed(ids[:, :8])[0], rows[:8])
        return rows if as_stored else model.embed(ids)[0]


def W_pos(model: Any) -> Float[Tensor, "n_ctx d_model"] | None:  # noqa: N802
    """Position embedding, a row a position; None where positions are not added to the stream (rotary models)."""
    n_ctx = info(model).shape.n_ctx
    if model.cfg.positional_embedding_type != "standard":
        return None
    return model.pos_embed.W_pos.detach()[-n_ctx:]  # OPT begins with two rows for no position


def mlp(model: Any, layer: int, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """What a layer's MLP would write if this were the stream that it reads.

    Raises:
        NotImplementedError: a model that normalises again what its MLP gives (Gemma 2 and 3, OLMo 2), or whose MLP is
            no module of its own (OPT).
    """
    block = model.blocks[layer]
    if hasattr(block.original_component, "post_feedforward_layernorm") or block.mlp.name is None:
        raise NotImplementedError(
            f"The MLP of {info(model).name} is no module of its own, or is normalised once more: use the activation "
            "mlp_out of a run instead."
        )
    return block.mlp(block.ln2(stream))


def W_Q(model: Any, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
    """What a layer's heads take from the normalised stream as queries."""
    return model.blocks[layer].attn.W_Q.detach()


def W_K(model: Any, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
    """The same for keys. Heads that share theirs (grouped-query attention) each get a copy."""
    return _for_each_head(model, model.blocks[layer].attn.W_K.detach())


def W_V(model: Any, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
    """The same for values. Heads that share theirs (grouped-query attention) each get a copy."""
    return _for_each_head(model, model.blocks[layer].attn.W_V.detach())


def attention_bias(model: Any, layer: int, which: str) -> Float[Tensor, "head d_head"]:
    """Bias of a layer's "q", "k" or "v"; zeros where there is none."""
    bias = getattr(model.blocks[layer].attn, f"b_{which.upper()}")
    if bias is None:
        weight = W_Q(model, layer)
        return weight.new_zeros(weight.shape[0], weight.shape[2])
    return _for_each_head(model, bias.detach())


def _for_each_head(model: Any, shared: Float[Tensor, "kv_head ..."]) -> Float[Tensor, "head ..."]:
    n_sharing = info(model).shape.n_heads // shared.shape[0]
    return shared if n_sharing == 1 else shared.repeat_interleave(n_sharing, dim=0)


def W_out(model: Any, layer: int) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
    """What each neuron of a layer's MLP writes to the stream."""
    info(model)
    return model.blocks[layer].mlp.W_out.detach()


def b_out(model: Any, layer: int) -> Float[Tensor, " d_model"]:
    """Bias of a layer's MLP output; zeros where there is none."""
    import torch

    bias = model.blocks[layer].mlp.b_out
    return torch.zeros_like(final_norm(model).bias) if bias is None else bias.detach()


def scores_are_bilinear(model: Any) -> bool:
    """Whether attention scores are a product of query and key as the weights give them: nothing turns them by
    position (rotary), biases them by distance (ALiBi) or normalises them in between."""
    info(model)
    normed = any(getattr(model.blocks[0].attn, name, None) is not None for name in ("q_norm", "k_norm"))
    return model.cfg.positional_embedding_type == "standard" and not normed


def W_O(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
    """What a layer's heads write to the stream for their z."""
    return model.blocks[layer].attn.W_O.detach()


def b_O(model: Any, layer: int) -> Float[Tensor, " d_model"]:  # noqa: N802
    """Bias of a layer's attention output; zeros where there is none."""
    import torch

    bias = model.blocks[layer].attn.b_O
    return torch.zeros_like(final_norm(model).bias) if bias is None else bias.detach()


def W_U(model: Any) -> Float[Tensor, "d_model d_vocab"]:  # noqa: N802
    """Unembedding."""
    return model.unembed.W_U.detach()


def b_U(model: Any) -> Float[Tensor, " d_vocab"]:  # noqa: N802
    """Bias of the unembedding; folding moves the last LayerNorm's bias here."""
    return model.unembed.b_U.detach()
