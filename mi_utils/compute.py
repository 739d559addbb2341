"""What this machine can do and what a model asks of it: device, precision, memory, and the tool for a model's size."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

DTYPES = ("float32", "bfloat16", "float16")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# What TransformerLens loads in comfort, and what still fits on one large accelerator with nnsight (half precision).
TRANSFORMER_LENS_LIMIT = 2e9
ONE_MACHINE_LIMIT = 13e9

DISTRIBUTION = "mi-workbench"
PACKAGES = (
    "torch", "transformers", "transformer-lens", "sae-lens", "nnsight", "tokenizers", "numpy", "xarray", "scipy",
    "scikit-learn", "statsmodels", "plotly", "papermill", DISTRIBUTION,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- device and precision


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """CUDA where there is one, else the CPU; what was asked for where that is there.

    MPS (Apple) has silently given wrong numbers with some versions of PyTorch, so it is used only when asked for.

    Raises:
        ValueError: the device is unknown or not there.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"Unknown device {str(device)!r}: use cpu, cuda, cuda:1 … or mps.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        there = f"there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        raise ValueError(
            f"Device {str(device)!r} is not there: {there}. Leave the device out to take the best there is, or use "
            "'cpu'. With an NVIDIA card in the machine, check `nvidia-smi` and that PyTorch is a CUDA build."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("Device 'mps' needs an Apple GPU and a PyTorch built for it. Use 'cpu'.")
    return chosen


def pick_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """float32 unless told otherwise: differences between two runs are what is measured, and they can be small.

    Raises:
        ValueError: unknown dtype, or bfloat16 on a card that only emulates it (compute capability below 8).
    """
    import torch

    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"Unknown dtype {name!r}: use {', '.join(DTYPES)}.")
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16 of its own (compute capability below 8) and "
            "would emulate it slowly. Use float16 or float32."
        )
    return getattr(torch, name)


def available_memory(device: torch.device) -> int:
    """Bytes that a new allocation can have: free memory of the GPU, or what the system still has to give."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a result: versions, machine, commits. Values are strings, numbers, None, dicts.

    ``commit`` is that of the repository one works in, ``mi_utils`` that of this package (its version, where it was
    installed from an index); both with "+" where files differ from it. None outside of a repository.
    """
    import os
    import platform
    from importlib import metadata
    from pathlib import Path

    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else (platform.processor() or platform.machine()),
        "cuda": torch.version.cuda if cuda else None,
        "cpu_count": os.cpu_count(),
        "commit": _commit(Path.cwd()),
        "mi_utils": _package(),
    }


def installed_from() -> tuple[str, dict[str, Any]]:
    """Version of this package as it is installed, and what pip wrote down of an address it came from.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    import json
    from importlib import metadata

    package = metadata.distribution(DISTRIBUTION)
    return package.version, json.loads(package.read_text("direct_url.json") or "{}")


def _package() -> str | None:
    from importlib import metadata
    from pathlib import Path

    checkout = Path(__file__).resolve().parents[1]
    if (checkout / ".git").exists():  # an installed package may lie inside someone else's repository
        return _commit(checkout)
    try:
        version, origin = installed_from()
    except metadata.PackageNotFoundError:
        return None
    return origin.get("vcs_info", {}).get("commit_id") or version


def _commit(folder: Path) -> str | None:
    import subprocess

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------------------ model shapes


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a model costs. All are counts; ``n_kv_heads`` < ``n_heads`` is grouped attention.

    ``stepwise_gelu``: GPT-2's GELU, which its code computes in several steps with a tensor for each.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_parameters: int
    gated_mlp: bool = False
    tied_embeddings: bool = True
    stepwise_gelu: bool = False

    @classmethod
    def from_config(cls, config: Any, name: str | None = None, n_parameters: int | None = None) -> ModelShape:
        """Read the sizes off a Hugging Face configuration.

        ``n_parameters`` is counted on a model without storage where it is not given.

        Raises:
            ValueError: the configuration lacks a size, so it is no transformer language model known here.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config

        def size(*names: str) -> int | None:
            values = (getattr(text, each, None) for each in names)
            return next((int(value) for value in values if value is not None), None)

        found = {
            "n_layers": size("num_hidden_layers", "n_layer"),
            "d_model": size("hidden_size", "n_embd"),
            "n_heads": size("num_attention_heads", "n_head"),
            "d_vocab": size("vocab_size"),
            "n_ctx": size("max_position_embeddings", "n_positions"),
        }
        if missing := [key for key, value in found.items() if value is None]:
            raise ValueError(
                f"This configuration ({type(config).__name__}) says nothing about {', '.join(missing)}: "
                "it does not describe a decoder-only transformer."
            )
        return cls(
            name=name or getattr(config, "name_or_path", "") or type(config).__name__,
            **found,
            n_kv_heads=size("num_key_value_heads") or found["n_heads"],
            d_head=size("head_dim") or found["d_model"] // found["n_heads"],
            d_mlp=size("intermediate_size", "n_inner", "ffn_dim") or 4 * found["d_model"],
            n_parameters=_count_parameters(config) if n_parameters is None else n_parameters,
            gated_mlp=getattr(text, "model_type", "") in GATED,
            tied_embeddings=bool(getattr(text, "tie_word_embeddings", True)),
            stepwise_gelu="gelu_new" in (getattr(text, "activation_function", ""), getattr(text, "hidden_act", "")),
        )


GATED = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo", "olmo2")


def _count_parameters(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without storage
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _gpt2(n_layers: int, d_model: int, n_heads: int, n_parameters: int) -> ModelShape:
    return ModelShape(
        "", n_layers, d_model, n_heads, n_heads, 64, 4 * d_model, 50257, 1024, n_parameters, stepwise_gelu=True
    )


def _pythia(n_layers: int, d_model: int, n_heads: int, n_parameters: int, d_vocab: int = 50304) -> ModelShape:
    d_head = d_model // n_heads
    return ModelShape(
        "", n_layers, d_model, n_heads, n_heads, d_head, 4 * d_model, d_vocab, 2048, n_parameters,
        tied_embeddings=False,
    )  # fmt: skip


def _gated(*sizes: int, tied: bool = False) -> ModelShape:
    return ModelShape("", *sizes, gated_mlp=True, tied_embeddings=tied)


# Hub id: (short name, shape). Sizes from the published configurations.
_KNOWN = {
    "openai-community/gpt2": ("gpt2-small", _gpt2(12, 768, 12, 124_439_808)),
    "openai-community/gpt2-medium": ("gpt2-medium", _gpt2(24, 1024, 16, 354_823_168)),
    "openai-community/gpt2-large": ("gpt2-large", _gpt2(36, 1280, 20, 774_030_080)),
    "openai-community/gpt2-xl": ("gpt2-xl", _gpt2(48, 1600, 25, 1_557_611_200)),
    "EleutherAI/pythia-70m": ("pythia-70m", _pythia(6, 512, 8, 70_426_624)),
    "EleutherAI/pythia-160m": ("pythia-160m", _pythia(12, 768, 12, 162_322_944)),
    "EleutherAI/pythia-410m": ("pythia-410m", _pythia(24, 1024, 16, 405_334_016)),
    "EleutherAI/pythia-1b": ("pythia-1b", _pythia(16, 2048, 8, 1_011_781_632)),
    "EleutherAI/pythia-1.4b": ("pythia-1.4b", _pythia(24, 2048, 16, 1_414_647_808)),
    "EleutherAI/pythia-2.8b": ("pythia-2.8b", _pythia(32, 2560, 32, 2_775_208_960)),
    "EleutherAI/pythia-6.9b": ("pythia-6.9b", _pythia(32, 4096, 32, 6_857_302_016, 50432)),
    "EleutherAI/pythia-12b": ("pythia-12b", _pythia(36, 5120, 40, 11_846_072_320, 50688)),
    "meta-llama/Llama-2-7b-hf": (
        "llama-2-7b", _gated(32, 4096, 32, 32, 128, 11008, 32000, 4096, 6_738_415_616),
    ),
    "meta-llama/Llama-3.1-8B": (
        "llama-3.1-8b", _gated(32, 4096, 32, 8, 128, 14336, 128256, 131072, 8_030_261_248),
    ),
    "google/gemma-2-2b": (
        "gemma-2-2b", _gated(26, 2304, 8, 4, 256, 9216, 256000, 8192, 2_614_341_888, tied=True),
    ),
    "google/gemma-2-9b": (
        "gemma-2-9b", _gated(42, 3584, 16, 8, 256, 14336, 256000, 8192, 9_241_705_984, tied=True),
    ),
    "Qwen/Qwen2.5-0.5B": (
        "qwen2.5-0.5b", _gated(24, 896, 14, 2, 64, 4864, 151936, 32768, 494_032_768, tied=True),
    ),
    "Qwen/Qwen2.5-7B": (
        "qwen2.5-7b", _gated(28, 3584, 28, 4, 128, 18944, 152064, 131072, 7_615_616_512),
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral-7b", _gated(32, 4096, 32, 8, 128, 14336, 32000, 32768, 7_241_732_096),
    ),
    "meta-llama/Llama-2-13b-hf": (
        "llama-2-13b", _gated(40, 5120, 40, 40, 128, 13824, 32000, 4096, 13_015_864_320),
    ),
    "meta-llama/Llama-2-70b-hf": (
        "llama-2-70b", _gated(80, 8192, 64, 8, 128, 28672, 32000, 4096, 68_976_648_192),
    ),
    "meta-llama/Meta-Llama-3-8B": (
        "llama-3-8b", _gated(32, 4096, 32, 8, 128, 14336, 128256, 8192, 8_030_261_248),
    ),
    "meta-llama/Meta-Llama-3-70B": (
        "llama-3-70b", _gated(80, 8192, 64, 8, 128, 28672, 128256, 8192, 70_553_706_496),
    ),
    "meta-llama/Llama-3.1-70B": (
        "llama-3.1-70b", _gated(80, 8192, 64, 8, 128, 28672, 128256, 131072, 70_553_706_496),
    ),
    "meta-llama/Llama-3.1-405B": (
        "llama-3.1-405b", _gated(126, 16384, 128, 8, 128, 53248, 128256, 131072, 405_853_388_800),
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama-3.2-1b", _gated(16, 2048, 32, 8, 64, 8192, 128256, 131072, 1_235_814_400, tied=True),
    ),
    "meta-llama/Llama-3.2-3B": (
        "llama-3.2-3b", _gated(28, 3072, 24, 8, 128, 8192, 128256, 131072, 3_212_749_824, tied=True),
    ),
    "mistralai/Mistral-7B-v0.3": (
        "mistral-7b-v0.3", _gated(32, 4096, 32, 8, 128, 14336, 32768, 32768, 7_248_023_552),
    ),
    "mistralai/Mistral-Nemo-Base-2407": (
        "mistral-nemo-12b", _gated(40, 5120, 32, 8, 128, 14336, 131072, 131072, 12_247_782_400),
    ),
    "google/gemma-2b": (
        "gemma-2b", _gated(18, 2048, 8, 1, 256, 16384, 256000, 8192, 2_506_172_416, tied=True),
    ),
    "google/gemma-7b": (
        "gemma-7b", _gated(28, 3072, 16, 16, 256, 24576, 256000, 8192, 8_537_680_896, tied=True),
    ),
    "google/gemma-2-27b": (
        "gemma-2-27b", _gated(46, 4608, 32, 16, 128, 36864, 256000, 8192, 27_227_128_320, tied=True),
    ),
    "Qwen/Qwen2.5-1.5B": (
        "qwen2.5-1.5b", _gated(28, 1536, 12, 2, 128, 8960, 151936, 131072, 1_543_714_304, tied=True),
    ),
    "Qwen/Qwen2.5-3B": (
        "qwen2.5-3b", _gated(36, 2048, 16, 2, 128, 11008, 151936, 32768, 3_085_938_688, tied=True),
    ),
    "Qwen/Qwen2.5-14B": (
        "qwen2.5-14b", _gated(48, 5120, 40, 8, 128, 13824, 152064, 131072, 14_770_033_664),
    ),
    "Qwen/Qwen2.5-32B": (
        "qwen2.5-32b", _gated(64, 5120, 40, 8, 128, 27648, 152064, 131072, 32_763_876_352),
    ),
    "Qwen/Qwen2.5-72B": (
        "qwen2.5-72b", _gated(80, 8192, 64, 8, 128, 29568, 152064, 131072, 72_706_203_648),
    ),
    "Qwen/Qwen3-0.6B": (
        "qwen3-0.6b", _gated(28, 1024, 16, 8, 128, 3072, 151936, 40960, 596_049_920, tied=True),
    ),
    "Qwen/Qwen3-1.7B": (
        "qwen3-1.7b", _gated(28, 2048, 16, 8, 128, 6144, 151936, 40960, 1_720_574_976, tied=True),
    ),
    "Qwen/Qwen3-4B": (
        "qwen3-4b", _gated(36, 2560, 32, 8, 128, 9728, 151936, 40960, 4_022_468_096, tied=True),
    ),
    "Qwen/Qwen3-8B": (
        "qwen3-8b", _gated(36, 4096, 32, 8, 128, 12288, 151936, 40960, 8_190_735_360),
    ),
    "Qwen/Qwen3-14B": (
        "qwen3-14b", _gated(40, 5120, 40, 8, 128, 17408, 151936, 40960, 14_768_307_200),
    ),
    "Qwen/Qwen3-32B": (
        "qwen3-32b", _gated(64, 5120, 64, 8, 128, 25600, 151936, 40960, 32_762_123_264),
    ),
}  # fmt: skip
SHORT_NAMES: dict[str, str] = {short: hub_id for hub_id, (short, _) in _KNOWN.items()}


def known_shape(name: str) -> ModelShape | None:
    """Shape of a well-known model by short name ("gpt2-small") or hub id; None where the table has none."""
    hub_id = f"openai-community/{name}" if name.startswith("gpt2") else name  # the hub's own older ids
    hub_id = SHORT_NAMES.get(name.lower(), hub_id)
    return replace(_KNOWN[hub_id][1], name=name) if hub_id in _KNOWN else None


# ------------------------------------------------------------------------------------------------ memory and tools

TASKS = ("forward", "cache", "patching")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a task needs at its peak.

    ``folded_copies``: folding keeps queries', keys' and values' matrices beside the joint one, and parts the
    unembedding from a tied embedding.
    """

    weights: int
    folded_copies: int
    activations: int
    cache: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def table(self) -> str:
        """The parts in readable units, a line each."""
        rows = [(field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self)]
        return "\n".join(f"{name:<17} {format_bytes(size):>10}" for name, size in (*rows, ("total", self.total)))


def format_bytes(size: float) -> str:
    """12884901888 as "12.0 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def block_flops(shape: ModelShape, seq: int, after: str | None = None) -> float:
    """Floating-point operations of one block on one token that attends to ``seq`` positions (2 a multiply-add).

    ``after`` counts only what follows a site inside the block, which is all that a patch there makes necessary.
    """
    width, kv_width, d_model = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head, shape.d_model
    steps = {  # in the order of the computation
        "qkv": d_model * (width + 2 * kv_width),
        "scores": width * seq,
        "values": width * seq,
        "out": width * d_model,
        "mlp_in": d_model * shape.d_mlp * (2 if shape.gated_mlp else 1),
        "mlp_out": shape.d_mlp * d_model,
    }
    done = {  # how many of them come before a site
        "q": 1, "k": 1, "v": 1, "pattern": 2, "z": 3, "attn_out": 4, "resid_mid": 4, "mlp_post": 5, "mlp_out": 6,
        "resid_post": 6,
    }.get(after or "", 0)  # fmt: skip
    return 2.0 * sum(list(steps.values())[done:])


def estimate_memory(
    shape: ModelShape,
    *,
    batch: int = 1,
    seq: int = 64,
    dtype: str = "float32",
    task: str = "forward",
    site: str = "resid_pre",
) -> MemoryEstimate:
    """The parts that ``estimates.estimate`` and the planner of sweeps count with; take that function for a task's peak.

    Args:
        batch, seq: prompts at once, and tokens in each.
        task: "forward" (logits only), "cache" (every activation of every layer is kept, as an unfiltered
            ``run_with_cache`` does) or "patching" (of every layer the stream, keys and values of one run, and
            ``site`` of two).
        site: what is patched; see ``mi_utils.models.SITES``.

    Raises:
        ValueError: unknown dtype or task, or more tokens than the model's context holds.
    """
    if dtype not in BYTES:
        raise ValueError(f"Unknown dtype {dtype!r}: use {', '.join(BYTES)}.")
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: use {', '.join(TASKS)}.")
    if batch < 1 or not 1 <= seq <= shape.n_ctx:
        raise ValueError(f"batch={batch}, seq={seq}: at least 1 each, and at most {shape.n_ctx} tokens a prompt.")
    size, tokens = BYTES[dtype], batch * seq
    width = shape.n_heads * shape.d_head
    kv_width = shape.n_kv_heads * shape.d_head
    scores = batch * shape.n_heads * seq * seq
    mlp = shape.d_mlp * (3 if shape.gated_mlp else 2)
    # Everything with a hook, as the bridge keeps it, each storage once: of a block the stream at two places, two
    # normalisations in two forms, the two outputs, q, k, v and z, with rotated queries and keys beside the plain ones,
    # scores before and after the softmax, and the MLP; around the blocks the embeddings, the last normalisation and the
    # logits.
    rotated = width + kv_width if shape.gated_mlp else 0
    block = tokens * (8 * shape.d_model + 2 * width + 2 * kv_width + rotated + mlp) + 2 * scores
    everything = shape.n_layers * block + tokens * (4 * shape.d_model + shape.d_vocab)
    kept = {
        "forward": 0,
        "cache": everything,
        "patching": shape.n_layers * tokens * (shape.d_model + 2 * kv_width + 2 * site_width(shape, site, seq)),
    }[task]
    # Models with gated MLPs keep the three matrices apart already.
    copies = 0 if shape.gated_mlp else shape.n_layers * shape.d_model * (width + 2 * kv_width)
    copies += shape.d_vocab * shape.d_model if shape.tied_embeddings else 0
    return MemoryEstimate(
        weights=shape.n_parameters * size,
        folded_copies=copies * size,
        activations=layer_at_work(shape, batch, seq, size, quick=True),
        cache=kept * size,
        logits=tokens * shape.d_vocab * (size + 4),  # and their log-probabilities, in single precision
    )


def layer_at_work(shape: ModelShape, batch: int, seq: int, size: int, quick: bool = False) -> int:
    """Bytes of the layer at work in a forward pass, ``size`` of them a number: attention, or the MLP with what its
    nonlinearity makes on the way.

    ``quick``: as ``load_model`` sets models up for TransformerLens, with scores that pass two hooks.
    """
    tokens, width, kv_width = batch * seq, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    scores = batch * shape.n_heads * seq * seq
    hidden = 4 if shape.gated_mlp else 5 if shape.stepwise_gelu and not quick else 2
    mlp = tokens * (3 * shape.d_model + hidden * shape.d_mlp)
    rotated = 2 * width if shape.gated_mlp else width
    attention = tokens * (3 * shape.d_model + 2 * width + 2 * kv_width + rotated) + (4 if quick else 3) * scores
    return max(mlp, attention) * size


def site_width(shape: ModelShape, site: str, seq: int = 1) -> int:
    """Numbers that a site holds for a token, heads laid side by side; of a pattern, in prompts of ``seq`` tokens."""
    width, kv_width = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    inside = {"q": width, "z": width, "k": kv_width, "v": kv_width, "mlp_post": shape.d_mlp}
    return shape.n_heads * seq if site == "pattern" else inside.get(site, shape.d_model)


@dataclass(frozen=True)
class ToolChoice:
    """Which library to take for a model, and why."""

    tool: str
    reason: str


def choose_tool(model: ModelShape | int | float) -> ToolChoice:
    """The library for a model's size (its shape, or its number of parameters).

    TransformerLens gives every activation a name and folds LayerNorm, at the price of copies of the weights; nnsight
    runs the model as it is, also across several cards or on remote machines.
    """
    n = model.n_parameters if isinstance(model, ModelShape) else model
    billions = f"{n / 1e9:.2g} billion parameters"
    if n <= TRANSFORMER_LENS_LIMIT:
        return ToolChoice("TransformerLens", f"{billions}: fits with named hooks and folded weights on one machine.")
    if n <= ONE_MACHINE_LIMIT:
        return ToolChoice("nnsight", f"{billions}: run it as it is, in half precision, on one large card.")
    return ToolChoice(
        "nnsight, device_map or NDIF",
        f"{billions}: more than one card holds. Spread it with device_map='auto', or run it remotely on NDIF.",
    )
