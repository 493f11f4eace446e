"""One training loop for both stages, and the run configs that describe it."""
