"""STAR-Nano's world: its scenes, its language, its tasks, and a scorer that reads images."""
