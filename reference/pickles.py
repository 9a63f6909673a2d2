"""What a pickle names, read without executing it: a release's `.pt` may build tensors and dictionaries only.

torch's `weights_only=True` executes no code of others, but it still calls what builds a bytearray or a
quantised tensor of any size, so that a file of 300 bytes takes gigabytes. What is named here is checked
before torch sees the file.

Sources: Python's pickletools; torch/_weights_only_unpickler.py (`_get_allowed_globals`).
"""

from __future__ import annotations

import pickletools
import zipfile

PICKLE_BYTES = 2 << 20  # a file of 1,000 tensors has 0.2 MiB
KINDS = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
NAMES = frozenset(
    f"{module} {name}"
    for module, name in (
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        *(
            ("torch", f"{kind}Storage")
            for kind in (
                "BFloat16",
                "Bool",
                "Byte",
                "Char",
                "Double",
                "Float",
                "Half",
                "Int",
                "Long",
                "Short",
            )
        ),
    )
)


def foreign_name(archive: zipfile.ZipFile) -> str | None:
    """The first thing that a pickle of torch's zip container names and no tensor needs, or None.

    Raises ValueError for a pickle that is damaged or too large.
    """
    for entry in archive.infolist():
        if not entry.filename.endswith("data.pkl"):
            continue
        if entry.file_size > PICKLE_BYTES:
            raise ValueError(f"expected a pickle of at most {PICKLE_BYTES} bytes, got {entry.file_size}")
        for operation, argument, _ in pickletools.genops(archive.read(entry)):
            if operation.name == "GLOBAL" and argument not in NAMES:
                return str(argument).replace(" ", ".", 1)
            if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                return operation.name
    return None
