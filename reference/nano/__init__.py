"""STAR-Nano: a small STAR that really draws, edits, answers and reasons, with its world, training and
scorer."""
