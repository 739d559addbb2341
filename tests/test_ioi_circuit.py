"""The course's claim about circuits: on every shipped seed a quarter of the edges does IOI."""

import numpy as np
import pytest

from mi_utils.circuits import Circuit, faithfulness_curve, smallest_circuit
from mi_utils.edges import eap_ig
from mi_utils.models import embedded_names, load_model
from mi_utils.prompts import behaviour_pairs
from mi_utils.stats import pooled_effect

SEEDS = [name for name in embedded_names() if "-step" not in name]


@pytest.mark.parametrize("name", SEEDS)
def test_a_quarter_of_the_edges_does_ioi_on_held_out_prompts_whatever_the_prompts_it_was_found_on(name):
    model = load_model(name)
    scores = [eap_ig(model, behaviour_pairs(model, "ioi", n=32, seed=seed)) for seed in (0, 1)]
    quarter = scores[0].edge.size // 4
    sizing = behaviour_pairs(model, "ioi", n=24, seed=2)
    found = smallest_circuit(model, sizing, scores[0], range(40, quarter + 1, 8), tolerance=0.03)
    again = Circuit.from_scores(scores[1], len(found.scores))
    assert found.jaccard(again) >= 0.7
    twins = [found.random_twin(seed) for seed in range(8)]
    held = behaviour_pairs(model, "ioi", n=32, seed=3, split="held_out")
    kept = pooled_effect(faithfulness_curve(model, held, [found, again, *twins])).values
    assert ((0.9 <= kept[:2]) & (kept[:2] <= 1.1)).all()
    assert kept[2:].max() < kept[0] - 0.3 and np.mean(kept[2:]) < 0.4
