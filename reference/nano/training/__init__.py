"""The training of STAR-Nano, stage by stage."""
