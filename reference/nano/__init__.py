"""STAR-Nano: a small STAR that really paints, edits, answers and reasons; its world, tokenizer, training and scorer."""
