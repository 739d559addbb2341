"""Helpers of the course: load a model, intervene on it, measure, test a claim.

``from mi_utils import load_model`` works as if everything were here; a module, and with it PyTorch, is imported when
a name of it is first used, so that ``import mi_utils`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "compute": ("choose_tool", "environment", "known_shape", "pick_device", "seed_everything"),
    "models": ("ModelNotFound", "embedded_names", "info", "load_model"),
    "prompts": ("ModelDoesNotKnowTask", "PromptPairs", "behaviour_pairs", "ioi_pairs"),
    "metrics": ("METRICS", "LogitDiff"),
    "tokens": ("token_batches", "token_rows"),
    "lens": ("TunedLens", "lens_quality", "logit_lens", "top_tokens", "train_tuned_lens"),
    "engine": ("SlowPath",),
    "results": ("NothingChanged",),
    "patching": ("ablate", "patch_sweep", "plan_sweep"),
    "attribution": ("direct_logit_attribution",),
    "heads": ("attention_patterns", "head_scores"),
    "probing": (
        "activations", "agreement_documents", "agreement_pairs", "corpus_tokens", "difference_in_means", "erase",
        "label_tokens", "probe", "random_direction", "steer",
    ),
    "estimates": ("estimate",),
    "sae": ("BrokenSAE", "WrongSAE", "evaluate_sae", "fit_sae", "load_sae", "shipped_saes", "train_sae"),
    "features": (
        "ablate_feature", "against_controls", "feature_directions", "feature_search", "logit_effects", "steer_feature",
    ),
    "concepts": ("concept_search", "concept_table", "corpus_concepts", "prompt_concept", "shuffle_labels"),
    "ov_qk": ("composition_scores", "copying_scores", "matching_scores", "ov_circuit", "score_parts", "weight_scores"),
    "naming": ("HeadReport", "head_report"),
    "gradients": ("attribution_patch",),
    "graph": ("CannotDecompose", "Graph"),
    "paths": ("path_patch",),
    "edges": ("eap", "eap_ig"),
    "large": ("LargeModel", "OutOfMemory", "RemoteFailed", "load_large_model"),
    "circuits": ("Circuit", "faithfulness_curve", "nested_circuits", "smallest_circuit"),
    "stats": (
        "agreement", "between", "bootstrap_interval", "effect_size", "max_statistic", "pooled_effect",
        "proportion_interval", "sign_flip_test", "split_prompts", "summarise", "superiority",
    ),
    "study": ("Prediction", "Study"),
    "dashboard": ("feature_dashboard",),
    "runlog": ("log_run", "read_runs"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"mi_utils has no {name!r}; there are {', '.join(__all__)}, and its modules.")
    value = getattr(import_module(f"mi_utils.{_HOME[name]}"), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
