"""STAR from a released PyTorch checkpoint to ONNX, TensorRT engines and a light runtime, with proof.

The public names are imported on first use, so a device without torch and onnx has all of them but `export`
and `validate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engines import Bundle, Star, build

    from .exporter.export import export
    from .validator.ladder import validate

__all__ = ["Bundle", "Star", "build", "export", "validate"]


def __getattr__(name: str) -> Any:
    if name in ("Bundle", "Star", "build"):
        import engines

        return getattr(engines, name)
    if name == "export":
        from .exporter.export import export

        return export
    if name == "validate":
        from .validator.ladder import validate

        return validate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
