"""The small world: a generated language whose every word has a known role, and the models trained on it."""
