"""STAR in plain PyTorch: what is right. Imports nothing else of this project."""
