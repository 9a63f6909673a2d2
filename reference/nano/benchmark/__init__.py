"""How well STAR-Nano draws, edits, answers and reasons: the score, the sampling sweep, charts and image
grids."""
