"""Sparse autoencoders: train, save, load and judge them. The only door to SAELens.

A sparse autoencoder (SAE) writes an activation as a sum of a few directions out of a large dictionary: ``encode`` says
how much of each, ``decode`` adds them up. SAELens does the training, the loading and the saving. What is added here is
a :class:`Passport`, which says where an SAE belongs and is checked against the model, and figures that can be trusted.

Sources: Bricken et al. 2023, *Towards Monosemanticity* (L1); Gao et al. 2024 (arXiv:2406.04093; TopK and its auxiliary
loss); Bussmann et al. 2024 (arXiv:2412.06410; BatchTopK); Rajamanoharan et al. 2024 (arXiv:2407.14435; JumpReLU);
Bussmann et al. 2025 (arXiv:2503.17547; Matryoshka).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mi_utils import models
from mi_utils.compute import BYTES, available_memory, format_bytes, site_width
from mi_utils.estimates import SAE_BATCH, SAE_BUFFER, SAE_HELD_OUT, estimate
from mi_utils.results import NothingChanged
from mi_utils.tokens import (
    BATCH_TOKENS,
    ActivationBuffer,
    TokenSource,
    batches_of_one_length,
    cut_rows,
    row_activations,
)

if TYPE_CHECKING:
    import xarray as xr

SHIPPED = Path(__file__).parent / "smallworld" / "saes"
PASSPORT, CONFIG, WEIGHTS = "passport.json", "cfg.json", "sae_weights.safetensors"

# Where an edit reaches all that reads (resid_mid's would not), so that the cost of a reconstruction can be measured.
SAE_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_post", "z")
ARCHITECTURES = {  # ours: SAELens' name
    "topk": "topk", "batchtopk": "batchtopk", "standard": "standard", "jumprelu": "jumprelu",
    "matryoshka": "matryoshka_batchtopk",
}  # fmt: skip

# Read by every SAE when it is loaded. What it should explain here stands in its passport.
PROBE_TEXTS = (
    "When Mary and John went to the store, John gave a drink to Mary.",
    "The keys to the cabinet are on the table near the window.",
    "The capital of France is Paris, and people in Japan speak Japanese.",
    "The old teacher said that the garden behind the house was green.",
    'Anna said, "the train is late." Then Tom lost the ticket because he was tired.',
    "The war lasted from the year 1732 to the year 1748.",
    "def open(self, book, lamp): return book",
    "It was a terrible film, and everyone hated the boring ending.",
)
PROBE_TOLERANCE = 0.03  # of variance explained: rounding moves it by less, a wrong layer by more
PROBE_FLOOR = 0.3  # an SAE without a passport must explain at least this much of the activations it claims


class WrongSAE(ValueError):
    """An SAE that does not belong to this model, site or layer: whatever it said would be about nothing."""


class BrokenSAE(ValueError):
    """Files of an SAE that are missing, cut short, changed, or hold what is no number."""


# ----------------------------------------------------------------------------------------------------------- passport


@dataclass(frozen=True)
class Passport:
    """Where an SAE belongs and where it comes from. Stored beside the weights; checked by :func:`load_sae`.

    Attributes:
        model: name of the model; of a local directory, the directory's name.
        site, layer: see ``mi_utils.models.SITES``. Heads are laid side by side.
        d_model: width of the activations that go in (of the site: d_mlp for mlp_post).
        n_features: size of the dictionary.
        architecture: as trained ("topk", "batchtopk", "standard", "jumprelu", "matryoshka").
        activation: what makes the features sparse when it is used ("topk, k=16", "jumprelu", "relu").
        normalisation: what SAELens does to activations before encoding; "none" where it is folded into the weights.
        processing: how the model's weights must be processed ("folded", "raw"; see ``load_model``).
        dtype: of the model's activations.
        corpus: what it was trained on. n_tokens: on how many tokens. seed: of its weights and of the data's order.
        context: most tokens in a row.
        versions: of the libraries it was trained with.
        weights: SHA-256 of the file of weights, "" before it is saved.
        variance_explained: on :data:`PROBE_TEXTS`, what it must reach; None where nobody measured it.
        training: the other settings.
    """

    model: str
    site: str
    layer: int
    d_model: int
    n_features: int
    architecture: str
    activation: str
    normalisation: str
    processing: str
    dtype: str
    corpus: str = ""
    n_tokens: int | None = None
    seed: int | None = None
    context: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    variance_explained: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The fields, a line each."""
        return "\n".join(f"{each.name.replace('_', ' '):<19} {getattr(self, each.name)}" for each in fields(self))

    def check(self, model: Any) -> None:
        """Refuse a model that this SAE was not made for, by what both say about themselves.

        Raises:
            WrongSAE: another model, layer, width, processing or dtype.
        """
        info = models.info(model)
        here = {
            "model": _model_name(info), "processing": info.processing, "dtype": info.dtype,
            "d_model": site_width(info.shape, self.site),
        }  # fmt: skip
        if not 0 <= self.layer < info.shape.n_layers:
            raise WrongSAE(f"This SAE is for layer {self.layer}; {info.name} has {info.shape.n_layers}, from 0.")
        mend = {
            "model": f"Load it with load_model({self.model!r}), or take an SAE that was trained on this model.",
            "processing": f"Load the model with load_model(…, processing={self.processing!r}).",
            "dtype": f"Load the model with load_model(…, dtype={self.dtype!r}).",
            "d_model": "Another model, or another site: activations of this width mean something else.",
        }
        for name in ("d_model", "model", "processing", "dtype"):
            if here[name] != getattr(self, name):
                what = f"width of {self.site}" if name == "d_model" else name
                raise WrongSAE(
                    f"Wrong {what}: this SAE was made for {getattr(self, name)!r}, and {info.name} has {here[name]!r}. "
                    + mend[name]
                )


def _model_name(info: models.ModelInfo) -> str:
    """A name that means the same on every machine: a directory's last part, a hub id's usual short name."""
    name = Path(info.path).name if Path(info.path).is_dir() else _short_name(info.name.removeprefix("random:"))
    return f"random:{name}" if info.random_weights else name


def _short_name(name: str) -> str:
    """ "gpt2", "openai-community/gpt2" and "gpt2-small" are one model."""
    from mi_utils.compute import SHORT_NAMES

    ids = {hub_id: short for short, hub_id in SHORT_NAMES.items()}
    return ids.get(name) or ids.get(f"openai-community/{name}") or name


# -------------------------------------------------------------------------------------------------------- autoencoder


class SparseAutoencoder:
    """An SAE with its passport. ``inner`` is SAELens' own object, which does the arithmetic.

    Attributes:
        passport: see :class:`Passport`; ``site``, ``layer``, ``n_features`` and ``d_model`` are its fields.
        history: what training looked like (dims step), where it was trained in this session; else None.
    """

    def __init__(self, inner: Any, passport: Passport, history: xr.Dataset | None = None) -> None:
        self.inner, self.passport, self.history = inner.eval().requires_grad_(False), passport, history
        self.site, self.layer = passport.site, passport.layer
        self.n_features, self.d_model = passport.n_features, passport.d_model
        self._known: WeakSet[Any] = WeakSet()  # models that it was measured on

    def __repr__(self) -> str:
        about = self.passport
        return f"SparseAutoencoder({about.model} {about.site} {about.layer}, {about.n_features} features)"

    @torch.no_grad()
    def encode(self, activations: Float[Tensor, "... d_model"]) -> Float[Tensor, "... feature"]:
        """How active each feature is: at least 0, and 0 for most.

        Raises:
            WrongSAE: activations of another width or dtype.
        """
        if activations.shape[-1] != self.d_model or activations.dtype != self.inner.W_enc.dtype:
            raise WrongSAE(
                f"Activations of shape {tuple(activations.shape)}, {activations.dtype}: this SAE reads "
                f"[..., {self.d_model}] in {self.inner.W_enc.dtype}."
            )
        return self.inner.encode(activations)

    @torch.no_grad()
    def decode(self, features: Float[Tensor, "... feature"]) -> Float[Tensor, "... d_model"]:
        """The reconstruction: the sum of the directions, each times its feature, and the bias."""
        return self.inner.decode(features)

    @property
    def directions(self) -> Float[Tensor, "feature d_model"]:
        """What each feature adds to the activation when it is 1: the decoder's rows."""
        return self.inner.W_dec.detach()

    @property
    def hook_name(self) -> str:
        """Where it belongs, as ``models.run_with_hooks`` takes it."""
        return models.hook_name(self.site, self.layer)

    def check_model(self, model: Any) -> None:
        """Refuse a model that this SAE does not belong to: by the passport, and once for each model by measuring how
        much of the variance on :data:`PROBE_TEXTS` it explains.

        Raises:
            WrongSAE: says what differs.
        """
        self.passport.check(model)
        if self.passport.variance_explained is None or model in self._known:
            return
        found, expected = probe_fit(model, self), self.passport.variance_explained
        if not abs(found - expected) <= PROBE_TOLERANCE:
            raise WrongSAE(
                f"This SAE says that it belongs to {self.site} of layer {self.layer} of {self.passport.model}, where "
                f"it explained {expected:.3f} of the variance on the probe texts. Here it explains {found:.3f}. So its "
                "weights are another layer's, or these are another model's: look for where the files were mixed up."
            )
        self._known.add(model)

    def save(self, folder: str | Path, *, dtype: str = "float32") -> Path:
        """Write SAELens' own two files and the passport to a folder.

        Args:
            dtype: of the stored weights. float16 halves the file; they are read back in the model's dtype.

        Raises:
            ValueError: unknown dtype.
        """
        if dtype not in BYTES:
            raise ValueError(f"Unknown dtype {dtype!r}: use {', '.join(BYTES)}.")
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().to(getattr(torch, dtype)) for name, tensor in self.inner.state_dict().items()}
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS)
        config = self.inner.cfg.to_dict() | {"dtype": dtype, "device": "cpu"}
        (folder / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
        self.passport = replace(self.passport, weights=_file_hash(folder / WEIGHTS))
        (folder / PASSPORT).write_text(json.dumps(asdict(self.passport), indent=1) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG, PASSPORT):
            (folder / name).chmod(0o644)
        return folder


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ loading


def shipped_saes() -> list[str]:
    """Names of the SAEs that ship with this package, sorted."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{PASSPORT}"))


def load_sae(
    name_or_folder: str | Path, model: Any, *, site: str | None = None, layer: int | None = None, check: bool = True
) -> SparseAutoencoder:
    """Load an SAE for a model: a shipped one, a folder, or one of a release that SAELens knows.

    Args:
        name_or_folder: "smallworld-resid_post-1" (see :func:`shipped_saes`), a folder with SAELens' ``cfg.json`` and
            weights, or a release ("gpt2-small-res-jb").
        site, layer: which SAE of a release; of a folder, what it must be.
        check: False leaves out the measurement on :data:`PROBE_TEXTS`, and nothing else.

    An SAE with a passport has to explain what the passport says. One without has to explain at least
    :data:`PROBE_FLOOR`, and no other layer of the same site clearly better: a release says which layer it was trained
    on, and this asks the activations.

    Raises:
        WrongSAE: it belongs to another model, site, layer, width, processing or dtype.
        BrokenSAE: files that are missing, cut short, changed, or hold NaN.
        ValueError: no such SAE; says which there are.
    """
    models.info(model)
    folder = SHIPPED / str(name_or_folder)
    if not (folder / CONFIG).is_file():
        folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        sae = _load_folder(folder, model)
    else:
        sae = _load_release(str(name_or_folder), model, site, layer)
    for what, asked, found in (("site", site, sae.site), ("layer", layer, sae.layer)):
        if asked is not None and asked != found:
            raise WrongSAE(f"Wrong {what}: asked for {asked!r}, and this SAE belongs to {found!r}.")
    sae.passport.check(model)
    if check and sae.passport.variance_explained is None:
        _check_layers(model, sae)
    elif check:
        sae.check_model(model)
    return sae


def _load_folder(folder: Path, model: Any) -> SparseAutoencoder:
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise BrokenSAE(f"The folder {folder.name!r} lacks {', '.join(missing)}: it holds no SAE that SAELens saved.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenSAE(f"{folder.name}/{CONFIG} is no JSON: {error}. Copy it again.") from error
    _read_weights(folder / WEIGHTS, config)
    passport = None
    if (folder / PASSPORT).is_file():
        passport = _read_passport(folder / PASSPORT)
        _check_config(passport, config)
        if passport.weights and passport.weights != _file_hash(folder / WEIGHTS):
            raise BrokenSAE(
                f"{folder.name}/{WEIGHTS} is not the file that its passport was written for. Copy the folder again, "
                "or save the SAE anew with sae.save(folder)."
            )
    from sae_lens import SAE

    info = models.info(model)
    inner = SAE.load_from_disk(folder, device=info.device, dtype=info.dtype)
    return SparseAutoencoder(inner, passport or _passport_from_config(inner))


def _read_passport(path: Path) -> Passport:
    try:
        return Passport(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise BrokenSAE(
            f"{path.parent.name}/{path.name} is no passport ({error}). Copy the folder again; without the file, the "
            "SAE is judged by what SAELens' own config says."
        ) from error


def _read_weights(path: Path, config: dict[str, Any]) -> None:
    """Check a file of weights: complete, numbers, of the shapes and dtype that the config says."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenSAE(
            f"{path.parent.name}/{path.name} cannot be read: cut short or damaged ({error}; {path.stat().st_size} "
            "bytes). Copy or download it again."
        ) from error
    _check_state(state, config, path.parent.name)


def _check_state(state: dict[str, Tensor], config: dict[str, Any], name: str) -> None:
    for tensor_name, tensor in state.items():
        if not tensor.is_floating_point() or (config.get("dtype") in BYTES and tensor.element_size() > 4):
            raise BrokenSAE(f"{tensor_name} of {name} is stored as {tensor.dtype}: expected {config.get('dtype')}.")
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise BrokenSAE(
                f"{count} of {tensor.numel()} numbers in {tensor_name} of {name} are NaN or infinite: training "
                "diverged or the file is damaged. Nothing it computes would be a number."
            )
    stated = str(config.get("dtype", "")).removeprefix("torch.")
    if "W_enc" in state and stated in BYTES and str(state["W_enc"].dtype).removeprefix("torch.") != stated:
        raise BrokenSAE(f"{name} says that its weights are {stated}, and they are {state['W_enc'].dtype}.")
    expected = {"W_enc": (config.get("d_in"), config.get("d_sae")), "W_dec": (config.get("d_sae"), config.get("d_in"))}
    for tensor_name, shape in expected.items():
        found = tuple(state[tensor_name].shape) if tensor_name in state else None
        if found != shape:
            raise BrokenSAE(
                f"{tensor_name} of {name} should be {shape} by its config, and is {found or 'missing'}: config and "
                "weights belong to different SAEs."
            )


def _check_config(passport: Passport, config: dict[str, Any]) -> None:
    """Passport and SAELens' config lie side by side, and must not say different things."""
    said = {"d_model": config.get("d_in"), "n_features": config.get("d_sae")}
    hook = (config.get("metadata") or {}).get("hook_name")
    said |= {"site": _site_of(hook)[0], "layer": _site_of(hook)[1]} if hook else {}
    for name, value in said.items():
        if value != getattr(passport, name):
            raise WrongSAE(
                f"Wrong {name}: {CONFIG} says {value!r} and {PASSPORT} says {getattr(passport, name)!r}. One of them "
                "was changed, or the files of two SAEs were mixed."
            )


def _site_of(hook_name: str) -> tuple[str, int]:
    """ "blocks.3.hook_resid_pre" is ("resid_pre", 3)."""
    for site, pattern in models.SITES.items():
        before, after = pattern.split("{}")
        middle = hook_name.removeprefix(before).removesuffix(after)
        if hook_name == f"{before}{middle}{after}" and middle.isdigit():
            return site, int(middle)
    raise WrongSAE(f"This SAE belongs to {hook_name!r}, which is none of the sites {', '.join(SAE_SITES)}.")


def _passport_from_config(inner: Any, release: str = "") -> Passport:
    """What SAELens' own config says, for an SAE that nobody gave a passport.

    Raises:
        WrongSAE: it does not say which model or hook.
    """
    config, about = inner.cfg, inner.cfg.metadata
    if not about.hook_name or not about.model_name:
        raise WrongSAE(
            "This SAE's config names no model or no hook, so nobody can tell where it belongs. Add metadata.model_name "
            f"and metadata.hook_name to its {CONFIG} if you know them."
        )
    site, layer = _site_of(about.hook_name)
    wanted = about.model_from_pretrained_kwargs or {}
    folded = any(wanted.get(name) for name in ("center_writing_weights", "fold_ln"))
    return Passport(
        model=_short_name(about.model_name), site=site, layer=layer, d_model=config.d_in, n_features=config.d_sae,
        architecture=about.training_architecture or config.architecture(), activation=_activation(config),
        normalisation=config.normalize_activations, dtype="float32",
        processing=about.processing or ("folded" if folded else "raw"),
        corpus=about.dataset_path or "", context=about.context_size,
        versions={"sae-lens": str(about.sae_lens_training_version or "unknown")},
        training={"release": release} if release else {},
    )  # fmt: skip


def _activation(config: Any) -> str:
    name = config.architecture()
    return f"topk, k={config.k}" if name == "topk" else {"standard": "relu"}.get(name, name)


def _load_release(release: str, model: Any, site: str | None, layer: int | None) -> SparseAutoencoder:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from safetensors import SafetensorError

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise ValueError(
            f"There is no SAE {release!r}: no shipped one ({', '.join(shipped_saes()) or 'none'}), no folder, and no "
            "release that SAELens knows. See the list of releases in SAELens' documentation."
        )
    ids = list(directory[release].saes_map)
    found = []
    for each in ids:
        try:
            place = _site_of(each)
        except WrongSAE:
            continue  # a release with names of its own: take it by its folder
        if site in (None, place[0]) and layer in (None, place[1]):
            found.append(each)
    if len(found) != 1:
        raise ValueError(
            f"{release} has {len(found)} SAEs for site={site!r}, layer={layer!r}. Choose one of "
            f"{', '.join(ids[:12])}{' …' if len(ids) > 12 else ''} with site= and layer=."
        )
    info = models.info(model)
    try:
        inner, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(release, found[0], device=info.device, dtype=info.dtype)
    except (SafetensorError, RuntimeError) as error:
        raise BrokenSAE(
            f"{found[0]} of {release} cannot be read: cut short or damaged ({error}). Delete it from the hub cache "
            "and download it again."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{found[0]} of {release} is not in the hub cache, and the hub cannot be reached ({type(error).__name__}). "
            f"Download it once where there is a network: hf download {directory[release].repo_id} --include "
            f"'{directory[release].saes_map[found[0]]}/*', copy the cache here, and point HF_HOME at it."
        ) from error
    _check_state(dict(inner.state_dict()), {"d_in": inner.cfg.d_in, "d_sae": inner.cfg.d_sae}, f"{release} {found[0]}")
    kwargs = (directory[release].config_overrides or {}).get("model_from_pretrained_kwargs")
    if kwargs and not inner.cfg.metadata.model_from_pretrained_kwargs:
        inner.cfg.metadata.model_from_pretrained_kwargs = kwargs
    passport = _passport_from_config(inner, release)
    said = _site_of(found[0])
    if (passport.site, passport.layer) != said:
        raise WrongSAE(
            f"{found[0]} of {release} holds an SAE whose own config says {passport.site} of layer {passport.layer}: "
            "the files in the cache are not what the release says. Download them again."
        )
    return SparseAutoencoder(inner, passport)


# -------------------------------------------------------------------------------------------------------------- probe


def _variance_explained(x: Float[Tensor, "token d_model"], reconstructed: Tensor) -> float:
    """1 − squared error / squared distance from the mean, both summed over tokens and coordinates."""
    x, reconstructed = x.double(), reconstructed.double()
    return 1 - float((x - reconstructed).square().sum() / (x - x.mean(0)).square().sum())


def _probe_activations(model: Any, site: str, layers: Sequence[int]) -> dict[int, Float[Tensor, "token d_model"]]:
    rows = list(cut_rows(model, (model.tokenizer.encode(text, add_special_tokens=False) for text in PROBE_TEXTS)))
    kept: dict[int, list[Tensor]] = defaultdict(list)
    for row in rows:
        tokens = torch.tensor([row])
        keep = tokens[0] != models.bos(model)
        for (_, layer), value in models.cache(model, tokens, [site], layers).items():
            kept[layer].append(value[0].flatten(1)[keep.to(value.device)])
    return {layer: torch.cat(values) for layer, values in kept.items()}


def probe_fit(model: Any, sae: SparseAutoencoder) -> float:
    """Variance explained on :data:`PROBE_TEXTS`, BOS left out: a figure that a wrong layer or model changes."""
    x = _probe_activations(model, sae.site, [sae.layer])[sae.layer]
    return _variance_explained(x, sae.decode(sae.encode(x)))


def _check_layers(model: Any, sae: SparseAutoencoder) -> None:
    """For an SAE whose proper figure nobody stored: it must fit the layer it names, and no other one better."""
    n_layers = models.info(model).shape.n_layers
    fits = {
        layer: _variance_explained(x, sae.decode(sae.encode(x)))
        for layer, x in _probe_activations(model, sae.site, range(n_layers)).items()
    }
    best, own = max(fits, key=fits.__getitem__), fits[sae.layer]
    if not own >= PROBE_FLOOR:
        raise WrongSAE(
            f"This SAE explains {own:.2f} of the variance of {sae.site} in layer {sae.layer} on the probe texts, and "
            f"should explain at least {PROBE_FLOOR}: these are not the activations that it was trained on."
        )
    if fits[best] > own + PROBE_TOLERANCE:
        raise WrongSAE(
            f"This SAE says that it belongs to layer {sae.layer}, where it explains {own:.2f} of the variance on the "
            f"probe texts; in layer {best} it explains {fits[best]:.2f}. It seems to be layer {best}'s. If you are "
            "sure that it is not, load it with check=False."
        )


# ----------------------------------------------------------------------------------------------------------- training


def _check_settings(site: str, architecture: str, n_features: int, batch_size: int) -> None:
    if site not in SAE_SITES:
        raise ValueError(f"Unknown site {site!r}: SAEs are trained on {', '.join(SAE_SITES)}.")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"Unknown architecture {architecture!r}: use {', '.join(ARCHITECTURES)}.")
    if min(n_features, batch_size) < 1:
        raise ValueError(f"n_features={n_features}, batch_size={batch_size}: at least 1 each.")


def train_sae(
    model: Any, *, site: str, layer: int, n_features: int, architecture: str = "topk", k: float = 16,
    sparsity: float | None = None, tokens: Any = None, n_tokens: int = 2_000_000, seed: int = 0,
    learning_rate: float = 1e-3, batch_size: int = SAE_BATCH, buffer_tokens: int = SAE_BUFFER, passes: int = 1,
    widths: Sequence[int] | None = None, folder: str | Path | None = None, checkpoint_every: int = 500,
    monitor_every: int = 50, progress: bool = True, fast: bool = True,
) -> SparseAutoencoder:  # fmt: skip
    """Train an SAE with SAELens on a model that :func:`load_model` returned. Nothing is sent to wandb.

    Activations are computed once, a buffer at a time, and dealt out shuffled; BOS is left out. They are scaled to a
    mean norm of √d_model for training, so that settings carry over from model to model, and the scale is folded into
    the weights at the end. The decoder's bias starts at their mean.

    Args:
        site, layer: where; see :data:`SAE_SITES`.
        n_features: size of the dictionary.
        architecture: "topk" (k features a token), "batchtopk" (k on average), "matryoshka" (BatchTopK whose first
            features must do alone, in nested dictionaries of ``widths``), "standard" (L1), "jumprelu".
        k: active features a token, of the three TopK kinds.
        sparsity: coefficient of the L1 or L0 penalty, of the other two (5 and 1 by default).
        tokens: what to read: None for the smallworld corpus; a ``datasets`` dataset with a column input_ids, tokens
            or text; a local folder of such data; or rows of token ids. The first 2,000 tokens or so are kept out of
            training, to watch it by. At its end the source is read again from the start.
        n_tokens: how many activations to train on, rounded down to whole batches.
        seed: draws the weights and the order of the data. SAELens' own ``seed`` does neither.
        batch_size: tokens in a step. buffer_tokens: activations in memory; more shuffle better.
        passes: how often each buffer is dealt out.
        folder: for checkpoints. A run that was killed goes on from the last one; with the same settings on the same
            machine it ends with the same weights, bit by bit.
        checkpoint_every, monitor_every: steps.
        progress: a line with L0, variance explained, cross-entropy recovered and dead features as it trains.
        fast: for "topk", compute the same step with far fewer operations (see :class:`FastTopKTrainer`).

    Returns:
        The SAE for use (BatchTopK and Matryoshka become JumpReLU), with ``history``: dims step; l0,
        variance_explained, cross_entropy_recovered, dead_fraction, loss.

    Raises:
        ValueError: unknown site, layer or architecture, too few tokens, or a checkpoint with other settings.
        MemoryError: it would need more than the device has.
        RuntimeError: the loss is not a number.
    """
    info = models.info(model)
    _check_settings(site, architecture, n_features, batch_size)
    if not 0 <= layer < info.shape.n_layers:
        raise ValueError(f"{info.name} has no layer {layer}: it has {info.shape.n_layers}, from 0.")
    if n_tokens < batch_size:
        raise ValueError(f"n_tokens={n_tokens} is less than one batch of {batch_size}.")
    need = estimate(
        info.shape, "sae", site=site, n_features=n_features, architecture=architecture, sae_batch=batch_size,
        buffer_tokens=min(buffer_tokens, n_tokens), dtype=info.dtype, tool="TransformerLens",
    )  # fmt: skip
    there = available_memory(torch.device(info.device))
    if need.beside > there:  # the model is loaded already
        raise MemoryError(
            f"Training needs about {format_bytes(need.beside)} beside the model, and {info.device} has "
            f"{format_bytes(there)} left:\n{need.table()}\nTake a smaller buffer_tokens, batch_size or n_features."
        )
    source = TokenSource(model, tokens, seed)
    kept_out, first_item = [], 0
    for number, row in source.rows():
        if sum(map(len, kept_out)) >= SAE_HELD_OUT and number >= first_item:
            break
        kept_out.append(row)
        first_item = number + 1
    buffer = ActivationBuffer(
        model, source, site, layer, batch_size=batch_size, buffer_tokens=min(buffer_tokens, n_tokens), seed=seed,
        first_item=first_item, passes=passes,
    )  # fmt: skip
    settings = {
        "architecture": architecture, "n_features": n_features, "n_tokens": n_tokens, "seed": seed,
        "k": k if "topk" in ARCHITECTURES[architecture] else None, "sparsity": sparsity,
        "learning_rate": learning_rate, "batch_size": batch_size, "buffer_tokens": buffer_tokens, "passes": passes,
        "widths": list(widths) if widths else None,
    }  # fmt: skip
    place = {
        "model": _model_name(info), "processing": info.processing, "dtype": info.dtype,
        "weights' seed": info.seed if info.random_weights else None, "site": site, "layer": layer,
        "corpus": source.name, "first rows": hashlib.sha256(repr(kept_out).encode()).hexdigest()[:16],
    }  # fmt: skip
    watch = _Watch(model, kept_out, site, layer)
    inner, history, training = _fit(
        buffer, buffer.fill(), settings, place=place, device=info.device, folder=folder, progress=progress,
        checkpoint_every=checkpoint_every, monitor_every=monitor_every, watch=watch, fast=fast,
        metadata={
            "model_name": _model_name(info), "hook_name": models.hook_name(site, layer), "dataset_path": source.name,
            "context_size": info.shape.n_ctx, "prepend_bos": True, "processing": info.processing,
        },
    )  # fmt: skip
    inner = inner.to(dtype=getattr(torch, info.dtype))
    passport = Passport(
        model=_model_name(info), site=site, layer=layer, d_model=site_width(info.shape, site), n_features=n_features,
        architecture=architecture, activation=_activation(inner.cfg), normalisation=inner.cfg.normalize_activations,
        processing=info.processing, dtype=info.dtype, corpus=source.name, n_tokens=n_tokens, seed=seed,
        context=info.shape.n_ctx, versions=_versions(), training=training,
    )  # fmt: skip
    sae = SparseAutoencoder(inner, passport, history)
    sae.passport = replace(passport, variance_explained=round(probe_fit(model, sae), 4))
    return sae


def fit_sae(
    activations: Float[Tensor, "token d_model"], *, n_features: int, architecture: str = "topk", k: float = 16,
    sparsity: float | None = None, n_tokens: int | None = None, seed: int = 0, learning_rate: float = 1e-3,
    batch_size: int = 1024, widths: Sequence[int] | None = None, progress: bool = True, fast: bool = True,
) -> SparseAutoencoder:  # fmt: skip
    """Train an SAE on given activations: of a toy model, or synthetic ones whose true dictionary is known.

    Args: as :func:`train_sae`; ``n_tokens`` counts an activation each time it is seen (once by default).

    The passport's model is "given activations", so no model will take it.

    Raises:
        ValueError: as :func:`train_sae`; or activations that are not [token, d_model] numbers in float32.
    """
    if activations.ndim != 2 or activations.dtype != torch.float32 or not activations.isfinite().all():
        raise ValueError(
            f"Activations of shape {tuple(activations.shape)}, {activations.dtype}: finite float32 [token, d_model] "
            "are needed."
        )
    _check_settings("resid_post", architecture, n_features, batch_size)
    n_tokens = n_tokens or len(activations)
    if min(n_tokens, len(activations)) < batch_size:
        raise ValueError(f"{len(activations)} activations, n_tokens={n_tokens}: less than a batch of {batch_size}.")

    def batches() -> Iterator[Tensor]:
        generator, n = torch.Generator().manual_seed(seed), len(activations) // batch_size * batch_size
        while True:
            order = torch.randperm(len(activations), generator=generator)[:n].to(activations.device)
            yield from (activations[chosen] for chosen in order.split(batch_size))

    settings = {
        "architecture": architecture, "n_features": n_features, "n_tokens": n_tokens, "seed": seed,
        "k": k if "topk" in ARCHITECTURES[architecture] else None, "sparsity": sparsity,
        "learning_rate": learning_rate, "batch_size": batch_size, "widths": list(widths) if widths else None,
    }  # fmt: skip
    inner, history, training = _fit(
        batches(), activations, settings, place={}, device=str(activations.device), folder=None, progress=progress,
        checkpoint_every=0, monitor_every=50, watch=None, fast=fast, metadata={"model_name": "given activations"},
    )  # fmt: skip
    passport = Passport(
        model="given activations", site="resid_post", layer=0, d_model=activations.shape[1], n_features=n_features,
        architecture=architecture, activation=_activation(inner.cfg), normalisation=inner.cfg.normalize_activations,
        processing="none", dtype="float32", corpus="given activations", n_tokens=n_tokens, seed=seed,
        versions=_versions(), training=training,
    )  # fmt: skip
    return SparseAutoencoder(inner, passport, history)


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("sae-lens", "transformer-lens", "torch")}


def _training_sae(settings: dict[str, Any], d_in: int, device: str, metadata: dict[str, Any]) -> Any:
    """SAELens' own training object, freshly drawn from the seed."""
    from sae_lens.registry import get_sae_training_class

    kind = ARCHITECTURES[settings["architecture"]]
    sae_class, config_class = get_sae_training_class(kind)
    own: dict[str, Any] = {}
    if "topk" in kind:
        if not 1 <= settings["k"] <= settings["n_features"]:
            raise ValueError(f"k={settings['k']}: at least 1 and at most the {settings['n_features']} features.")
        own["k"] = int(settings["k"]) if kind == "topk" else float(settings["k"])
    steps = settings["n_tokens"] // settings["batch_size"]
    if "batchtopk" in kind:  # the running threshold starts at 0 and has to arrive also in a short run
        own["topk_threshold_lr"] = max(0.01, min(0.5, 20 / max(steps, 1)))
    if kind == "matryoshka_batchtopk":
        n = settings["n_features"]
        own["matryoshka_widths"] = settings["widths"] or [n // 8, n // 4, n // 2, n]
    if kind == "standard":
        own |= {
            "l1_coefficient": 5.0 if settings["sparsity"] is None else settings["sparsity"],
            "l1_warm_up_steps": steps // 20,
        }
    if kind == "jumprelu":
        own |= {
            "l0_coefficient": 1.0 if settings["sparsity"] is None else settings["sparsity"],
            "l0_warm_up_steps": steps // 4,
        }
    config = config_class(
        d_in=d_in, d_sae=settings["n_features"], device=device, normalize_activations="expected_average_only_in", **own
    )
    for name, value in metadata.items():
        setattr(config.metadata, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        return sae_class(config)


def _trainer(sae: Any, batches: Iterator[Tensor], settings: dict[str, Any], device: str, fast: bool) -> Any:
    """SAELens' trainer with the settings; for "topk" with the faster step."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = settings["n_tokens"] // settings["batch_size"]
    config = SAETrainerConfig(
        total_training_samples=steps * settings["batch_size"], train_batch_size_samples=settings["batch_size"],
        lr=settings["learning_rate"], lr_end=0.0, lr_warm_up_steps=steps // 50, lr_decay_steps=steps // 5,
        device=device,
        dead_feature_window=max(20, min(1000, steps // 10)), feature_sampling_window=max(steps, 1) + 1,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    use_fast = fast and settings["architecture"] == "topk"
    return (_fast_trainer_class() if use_fast else SAETrainer)(cfg=config, sae=sae, data_provider=batches)


def _fit(
    batches: Iterator[Tensor], sample: Float[Tensor, "token d_model"], settings: dict[str, Any], *,
    place: dict[str, Any], device: str, folder: str | Path | None, progress: bool, checkpoint_every: int,
    monitor_every: int, watch: _Watch | None, fast: bool, metadata: dict[str, Any],
) -> tuple[Any, xr.Dataset, dict[str, Any]]:  # fmt: skip
    """Train; returns SAELens' object for use, the history, and the settings with what was found out on the way."""
    from tqdm.auto import tqdm

    sae = _training_sae(settings, sample.shape[1], device, metadata)
    trainer = _trainer(sae, batches, settings, device, fast)
    scale = math.sqrt(sample.shape[1]) / float(sample.float().norm(dim=-1).mean())
    trainer.activation_scaler.scaling_factor = scale
    with torch.no_grad():
        sae.b_dec.data = sample.float().mean(0).to(sae.b_dec) * scale
    history: list[dict[str, float]] = []
    steps = settings["n_tokens"] // settings["batch_size"]
    checkpoint = Path(folder) / "checkpoint.pt" if folder else None
    if checkpoint and checkpoint.is_file():
        history = _resume(checkpoint, trainer, batches, settings | place)
    bar = tqdm(
        total=steps, initial=trainer.n_training_steps, desc="sae", unit="step", disable=not progress, leave=False,
        delay=5,
    )  # fmt: skip
    with bar:
        while trainer.n_training_steps < steps:
            output = trainer.step(next(batches))
            trainer.n_training_steps += 1
            step = trainer.n_training_steps
            bar.update()
            if step % monitor_every == 0 or step == steps:
                history.append(_monitor(trainer, output, watch, step))
                shown = {"L0": "l0", "variance": "variance_explained", "CE": "cross_entropy_recovered"}
                shown |= {"dead": "dead_fraction"}
                bar.set_postfix({n: f"{history[-1][key]:.3g}" for n, key in shown.items() if key in history[-1]})
                if not math.isfinite(history[-1]["loss"]):
                    raise RuntimeError(
                        f"The loss is {history[-1]['loss']} after {step} steps: the learning rate "
                        f"{settings['learning_rate']} is too high. Try a third of it."
                    )
            del output  # what a step made is as large as a buffer
            if checkpoint and checkpoint_every and step % checkpoint_every == 0 and step < steps:
                _checkpoint(checkpoint, trainer, batches, settings | place, history)
    sae.fold_activation_norm_scaling_factor(scale)
    if checkpoint and checkpoint.is_file():
        checkpoint.unlink()
    return _for_use(sae), _history(history, settings | place), settings | {"scale": scale}


def _for_use(sae: Any) -> Any:
    """SAELens' inference object: what it would save, and load again (BatchTopK becomes JumpReLU, norms are folded)."""
    from sae_lens import SAE

    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    with torch.no_grad():
        sae.process_state_dict_for_saving_inference(state)
    with torch.random.fork_rng():  # it draws weights, which are then replaced
        inner = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    inner.load_state_dict(state)
    return inner.to(device=str(sae.device))


def _checkpoint(path: Path, trainer: Any, batches: Any, settings: dict[str, Any], history: list[dict]) -> None:
    """Weights, optimiser, place in the data: in one file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("checkpoint-being-written")
    trainer.save_trainer_state(scratch)
    state = {
        "settings": settings, "weights": trainer.sae.state_dict(), "history": history,
        "trainer": torch.load(scratch / "trainer_state.pt", weights_only=False), "data": batches.state(),
    }  # fmt: skip
    torch.save(state, scratch / path.name)
    os.replace(scratch / path.name, path)
    shutil.rmtree(scratch)


def _resume(path: Path, trainer: Any, batches: Any, settings: dict[str, Any]) -> list[dict[str, float]]:
    state = torch.load(path, weights_only=False, map_location=trainer.cfg.device)
    if state["settings"] != settings:
        there = state["settings"]
        differ = [
            f"{name}: {there.get(name)!r}, now {settings[name]!r}"
            for name in settings
            if there.get(name) != settings[name]
        ]
        raise ValueError(
            f"The checkpoint in {path.parent.name} was made with other settings ({'; '.join(differ)}). Use those, or "
            "another folder."
        )
    scratch = path.with_name("checkpoint-being-read")
    scratch.mkdir(exist_ok=True)
    torch.save(state["trainer"], scratch / "trainer_state.pt")
    trainer.activation_scaler.save(str(scratch / "activation_scaler.json"))
    trainer.load_trainer_state(scratch)
    shutil.rmtree(scratch)
    trainer.sae.load_state_dict(state["weights"])
    batches.restore(state["data"])
    return state["history"]


def _history(history: list[dict[str, float]], attrs: dict[str, Any]) -> xr.Dataset:
    import xarray as xr

    names = [name for name in history[0] if name != "step"]
    steps = [entry["step"] for entry in history]
    data = {name: ("step", [entry[name] for entry in history]) for name in names}
    return xr.Dataset(data, {"step": steps}, {name: str(value) for name, value in attrs.items()})


class _Watch:
    """Held-out rows to watch a training run by."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], site: str, layer: int) -> None:
        self.model, self.rows, self.site, self.layer = model, rows, site, layer
        self.activations = row_activations(model, rows, site, layer)
        clean, ablated = _clean_and_ablated(model, rows, site, layer)
        self.clean, self.ablated = clean.sum(), ablated.sum()

    def __call__(self, encode: Any, reconstruct: Any) -> dict[str, float]:
        l0 = float((encode(self.activations) > 0).sum(-1).float().mean())
        x_hat = reconstruct(self.activations)
        loss = _cross_entropy(self.model, self.rows, self.site, self.layer, reconstruct).sum()
        return {
            "l0": l0,
            "variance_explained": _variance_explained(self.activations, x_hat),
            "cross_entropy_recovered": float((self.ablated - loss) / (self.ablated - self.clean)),
        }


@torch.no_grad()
def _monitor(trainer: Any, output: Any, watch: _Watch | None, step: int) -> dict[str, float]:
    sae, scale = trainer.sae, trainer.activation_scaler.scaling_factor
    entry = {
        "step": step,
        "loss": float(output.loss),
        "dead_fraction": float(trainer.dead_neurons.float().mean()),
    }
    if watch is None:
        error = (output.sae_out - output.sae_in).square().sum()
        variance = (output.sae_in - output.sae_in.mean(0)).square().sum()
        l0 = (output.feature_acts > 0).sum() / len(output.sae_in)
        return entry | {"l0": float(l0), "variance_explained": 1 - float(error / variance)}

    def encode(x: Tensor) -> Tensor:
        return sae.encode(x.to(sae.dtype) * scale)

    def reconstruct(x: Tensor) -> Tensor:
        return (sae.decode(encode(x)) / scale).to(x.dtype)

    sae.eval()
    return entry | watch(encode, reconstruct)


# ------------------------------------------------------------------------------------------------ a faster TopK step


class _Chosen(torch.autograd.Function):
    """Pre-activations of the chosen features. The gradient goes to those alone: as sums over a few rows, where the
    dense way multiplies matrices that are nearly all zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        values, index = torch.addmm(bias, x, weight).topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(x, weight, index)
        ctx.mark_non_differentiable(index)
        return values, index

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: D102
        x, weight, index = ctx.saved_tensors
        for_x = F.embedding_bag(index, weight.T.contiguous(), per_sample_weights=gradient, mode="sum")
        for_weight, for_bias = _sum_by_feature(index, gradient, x, weight.shape[1])
        return for_x, for_weight.T, for_bias, None


def _sum_by_feature(
    index: Int[Tensor, "token k"], weights: Float[Tensor, "token k"], rows: Float[Tensor, "token d_model"], n: int
) -> tuple[Float[Tensor, "feature d_model"], Float[Tensor, " feature"]]:
    """For each feature the sum of ``weights × row`` over the tokens that chose it, and the sum of the weights."""
    flat, k = index.flatten(), index.shape[1]
    order = flat.argsort()
    sorted_weights = weights.flatten()[order]
    counts = torch.bincount(flat, minlength=n)
    starts = counts.cumsum(0) - counts
    sums = F.embedding_bag(order // k, rows, starts, per_sample_weights=sorted_weights, mode="sum")
    return sums, torch.zeros(n, dtype=weights.dtype, device=weights.device).index_add_(0, flat, weights.flatten())


def _fast_trainer_class() -> type:
    """SAELens' trainer with a TopK step that touches the chosen features only."""
    from sae_lens.saes.sae import TrainStepOutput
    from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
    from sae_lens.training.sae_trainer import SAETrainer

    class FastTopKTrainer(SAETrainer):
        """The same loss, gradients and updates as SAELens' step for TopK, to rounding (a test compares them)."""

        def _train_step(self, sae: Any, sae_in: Tensor) -> Any:
            sae.train()
            norm = sae.W_dec.norm(dim=-1)
            directions = sae.W_dec / norm[:, None]
            weight, bias = sae.W_enc * norm, sae.b_enc * norm  # scaling [d, feature] instead of [batch, feature]
            centred = sae_in - sae.b_dec
            values, index = _Chosen.apply(centred, weight, bias, sae.cfg.k)
            activations = values.relu()
            sae_out = F.embedding_bag(index, directions, per_sample_weights=activations, mode="sum") + sae.b_dec
            mse = (sae_out - sae_in).square().sum(-1).mean()
            auxiliary = self._auxiliary(sae, sae_in, sae_out, centred, weight, bias, directions)
            loss = mse + auxiliary
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            with torch.no_grad():
                fired = torch.bincount(index[activations > 0], minlength=sae.cfg.d_sae)
                self.n_forward_passes_since_fired += 1
                self.n_forward_passes_since_fired[fired > 0] = 0
                self.act_freq_scores += fired
                self.n_frac_active_samples += len(sae_in)
            return TrainStepOutput(
                sae_in=sae_in, sae_out=sae_out, feature_acts=activations, hidden_pre=values, loss=loss,
                losses={"mse_loss": mse, "auxiliary_reconstruction_loss": auxiliary},
            )  # fmt: skip

        def _auxiliary(
            self, sae: Any, sae_in: Tensor, sae_out: Tensor, centred: Tensor, weight: Tensor, bias: Tensor,
            directions: Tensor,
        ) -> Tensor:  # fmt: skip
            """SAELens' loss that lets dead features explain what is left over, on the dead features alone."""
            dead = self.dead_neurons.nonzero()[:, 0]
            if not len(dead):
                return sae_in.new_tensor(0.0)
            half = sae_in.shape[-1] // 2
            pre = centred @ weight[:, dead] + bias[dead]
            everyone = torch.ones(len(dead), dtype=torch.bool, device=pre.device)
            acts = calculate_topk_aux_acts(k_aux=min(half, len(dead)), hidden_pre=pre, dead_neuron_mask=everyone)
            found = act_times_W_dec(acts, directions[dead], False)
            left = (sae_in - sae_out).detach()
            loss = (found - left).square().sum(-1).mean()
            return sae.cfg.aux_loss_coefficient * min(len(dead) / half, 1.0) * loss

    return FastTopKTrainer


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def _cross_entropy(
    model: Any, rows: Sequence[Sequence[int]], site: str, layer: int, replace_with: Any
) -> Float[Tensor, " row"]:
    """Summed loss (nats) of each row's predictions made at tokens other than BOS, with the site's activations there
    replaced by a function of them."""
    bos = models.bos(model)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for chosen, tokens in batches_of_one_length(rows, BATCH_TOKENS):
        tokens = tokens.to(models.info(model).device)
        inside = tokens != bos

        def edit(activation: Tensor, hook: Any, inside: Tensor = inside) -> Tensor:
            flat = activation.flatten(2).clone()
            flat[inside] = replace_with(flat[inside])
            return flat.view_as(activation)

        if replace_with is None:
            logits = models.run(model, tokens)
        else:
            logits = models.run_with_hooks(model, tokens, [(models.hook_name(site, layer), edit)])
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
        sums[chosen] = (losses * (inside[:, :-1] & inside[:, 1:])).sum(1).double().cpu()
    return sums


def _clean_and_ablated(
    model: Any, rows: Sequence[Sequence[int]], site: str, layer: int
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Losses as they are, and with zeros at the site: the two ends that "recovered" lies between.

    Raises:
        NothingChanged: they are the same.
    """
    clean, ablated = (_cross_entropy(model, rows, site, layer, how) for how in (None, torch.zeros_like))
    if torch.equal(clean, ablated):
        raise NothingChanged(
            f"Zeros in place of {site} of layer {layer} change no prediction of {models.info(model).name}: nothing "
            "depends on this site, or the replacement never took place. No loss can be recovered there."
        )
    return clean, ablated


@torch.no_grad()
def evaluate_sae(model: Any, sae: SparseAutoencoder, rows: Sequence[Sequence[int]]) -> xr.Dataset:
    """How well an SAE stands in for the activations it was trained on. BOS is left out of every figure.

    Args:
        rows: of token ids, BOS first, nothing padded: ``token_rows(model)`` makes some. Not those of training.

    Returns:
        Over prompt: ``l0`` (mean active features a token), ``cross_entropy`` (nats a token) clean, and with the site's
        activations replaced: ``cross_entropy_sae`` by reconstructions, ``cross_entropy_zero`` by zeros,
        ``cross_entropy_mean`` by their mean; ``n_tokens``. Over feature: ``density`` (share of tokens on which it is
        active), ``mean_activation`` (where active). And for all tokens together:
        ``variance_explained``: 1 − squared error / squared distance from the mean.
        ``cross_entropy_recovered``: (zero − sae) / (zero − clean). 1 is as good as the activations, 0 as zeros.
        ``cross_entropy_recovered_mean``: the same with the mean instead of zeros, which is harder.
        ``dead_fraction``: features that were never active on these tokens.
        ``shrinkage``: 1 − ‖x̂‖² / x·x̂ (sums; both measured from the decoder's bias): 0 where reconstructions have
        the right length, above where they are too short (Rajamanoharan et al. 2024, arXiv:2404.16014, section 4.3,
        who give the ratio γ itself).

    What it does not show: that a feature means something, or that the model uses it.

    Raises:
        WrongSAE: the SAE does not belong to this model.
        ValueError: no rows, or one that is not BOS and at least two more tokens.
        NothingChanged: the model predicts the same with zeros at the site.
    """
    import xarray as xr

    sae.check_model(model)
    rows = [[int(token) for token in row] for row in rows]
    bos, info = models.bos(model), models.info(model)
    n_tokens = [sum(token != bos for token in row) for row in rows]
    predicted = torch.tensor([sum(a != bos and b != bos for a, b in pairwise(row)) for row in rows])
    if not rows or min(predicted) < 1 or any(row[0] != bos for row in rows):
        raise ValueError("Every row must be BOS and at least two more tokens: one to predict at and one to predict.")
    per_prompt_l0 = torch.zeros(len(rows), dtype=torch.float64)
    count, active = 0, torch.zeros(sae.n_features, dtype=torch.float64)
    total = torch.zeros(sae.n_features, dtype=torch.float64)
    sums = defaultdict(float)
    x_sum: Tensor | float = 0.0
    bias = sae.decode(torch.zeros(1, sae.n_features, dtype=sae.directions.dtype, device=info.device))[0]
    for chosen, tokens in batches_of_one_length(rows, BATCH_TOKENS):
        inside = (tokens != bos).to(info.device)
        x = models.cache(model, tokens, [sae.site], [sae.layer])[sae.site, sae.layer].flatten(2)
        features = torch.zeros(*x.shape[:2], sae.n_features, dtype=x.dtype, device=x.device)
        features[inside] = sae.encode(x[inside])
        on = features > 0
        per_prompt_l0[chosen] = (on.sum((1, 2)).double() / inside.sum(1)).cpu()
        active += on.sum((0, 1)).double().cpu()
        total += features.sum((0, 1)).double().cpu()
        x, x_hat = x[inside].double(), sae.decode(features[inside]).double()
        count += len(x)
        x_sum = x_sum + x.sum(0)
        sums["square"] += float(x.square().sum())
        sums["error"] += float((x - x_hat).square().sum())
        x, x_hat = x - bias, x_hat - bias
        sums["product"] += float((x * x_hat).sum())
        sums["reconstructed"] += float(x_hat.square().sum())
    mean = x_sum / count
    variance = sums["square"] - count * float(mean.square().sum())
    mean = mean.to(sae.directions.dtype)
    replacements = {"_sae": lambda x: sae.decode(sae.encode(x)), "_mean": lambda x: mean.expand_as(x)}
    nats = dict(zip(("", "_zero"), _clean_and_ablated(model, rows, sae.site, sae.layer), strict=True))
    nats |= {name: _cross_entropy(model, rows, sae.site, sae.layer, how) for name, how in replacements.items()}

    def recovered(ablated: str) -> float:
        worst, clean, ours = (float(nats[name].sum()) for name in (ablated, "", "_sae"))
        return (worst - ours) / (worst - clean)

    data = {f"cross_entropy{name}": ("prompt", (values / predicted).numpy()) for name, values in nats.items()}
    data |= {
        "l0": ("prompt", per_prompt_l0.numpy()),
        "n_tokens": ("prompt", n_tokens),
        "density": ("feature", (active / count).numpy()),
        "mean_activation": ("feature", (total / active.clamp(min=1)).numpy()),
        "variance_explained": 1 - sums["error"] / variance,
        "cross_entropy_recovered": recovered("_zero"),
        "cross_entropy_recovered_mean": recovered("_mean"),
        "dead_fraction": float((active == 0).double().mean()),
        "shrinkage": 1 - sums["reconstructed"] / sums["product"] if sums["product"] else math.nan,
    }
    attrs = {
        "model": info.name, "processing": info.processing, "seed": info.seed, "site": sae.site, "layer": sae.layer,
        "n_tokens": count, "l0": float(active.sum() / count),
    }  # fmt: skip
    coords = {"prompt": range(len(rows)), "feature": range(sae.n_features)}
    return xr.Dataset(data, {name: list(values) for name, values in coords.items()}, attrs)
