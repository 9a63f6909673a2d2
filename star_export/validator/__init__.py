"""The parity ladder: rungs that show whether a bundle computes what the reference computes."""
