"""Does it fit, and how fast can it be: bytes and seconds from a bundle's manifest, before anything is loaded."""
