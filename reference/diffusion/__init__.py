"""The diffusion decoder: a modified Lumina-Image-2.0 that paints what STAR's image tokens say."""
