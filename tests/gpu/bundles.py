"""A bundle of STAR-Nano, for the steps that run it: its components, graphs and sizes, and its runtime."""

from __future__ import annotations

from pathlib import Path


def components_of(bundle: Path) -> list[str]:
    """Names of a bundle's components."""
    from engines.bundle.reader import Bundle

    return list(Bundle.open(bundle).manifest.components)


def graph_of(bundle: Path, component: str) -> Path:
    return bundle / component / "model.onnx"


def config_of(bundle: Path):
    """(sizes of the decoders and the head that a bundle holds, the type of its caches)."""
    from engines.bundle.reader import Bundle

    from .sizes import star

    manifest = Bundle.open(bundle).manifest
    model, cache = manifest.model, manifest.model.cache
    dtype = next(
        t.dtype for t in manifest.components["base_ar"].inputs if t.name.startswith("past_key_values.")
    )
    return star(
        model.name,
        hidden=model.hidden_size,
        layers=cache["base_ar"].layers,
        stacked=cache["stacked_ar"].layers,
        heads=model.hidden_size // cache["base_ar"].head_dim,
        kv_heads=cache["base_ar"].kv_heads,
        intermediate=1,
        vocab=model.vocab_size,
        codes=model.codebook_size,
    ), dtype


def runtime_of(bundle: Path, backend: str):
    from engines.runtime.star import Star

    from .ort_decode import onnxruntime_with_libraries

    onnxruntime_with_libraries()
    return Star(bundle, backend=backend)
