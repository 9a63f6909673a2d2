"""Does it fit, and how fast can it be: bytes and seconds from a manifest, before anything is loaded."""
