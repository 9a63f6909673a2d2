"""Export a checkpoint to a bundle, and build its TensorRT plans for a device that is not at hand.

    .venv/bin/python examples/03_export_and_build.py [CHECKPOINT]

CHECKPOINT is `nano` (default), a folder in the release layout, or a hub id. The script writes the
folder `bundle`, which must not exist yet. TensorRT for RTX builds on any CPU; other targets build on
their device.
"""

from __future__ import annotations

import sys

from star_export import Bundle, build, export

checkpoint = sys.argv[1] if len(sys.argv) > 1 else "nano"

bundle = Bundle.open(export(checkpoint, out="bundle", precision="bf16"))
manifest = bundle.manifest
print(f"{bundle.path}: {manifest.model.name}, {manifest.precision}, {len(manifest.files)} files")

for plan in build(bundle, ["rtx-4090"]):
    print(f"{plan.path}: {plan.spec.plan.size / 1e6:.1f} MB in {plan.spec.seconds:.1f} s")
