"""STAR-Nano's checkpoint in the release's layout: configuration, tokenizer and image preparation in torch."""
