"""How well STAR-Nano draws, edits, answers and reasons: the score, sweeps and charts."""
