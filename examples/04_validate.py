"""Measure that a bundle computes what the reference computes, and show how close it is.

    .venv/bin/python examples/04_validate.py [BUNDLE]

Writes a certificate into the bundle and parity.html into the current folder. On its device,
`target="rtx-4090"` validates the plans; elsewhere it evaluates the networks that they were compiled from.
"""

from __future__ import annotations

import sys

from engines import ParityError
from star_export import validate

bundle = sys.argv[1] if len(sys.argv) > 1 else "demo/bundle"

try:
    certificate = validate(bundle, report="parity.html")
except ParityError as error:
    sys.exit(f"error: {error}")

for rung in certificate.rungs:
    print(f"{rung.name}: passed in {rung.seconds:.1f} s {rung.note}")
    for row in rung.rows:
        print(f"  {row.component}, {row.check}: {row.worst.value:.2g}, tolerance {row.worst.tolerance:.2g}")
for gap in certificate.not_proven:
    print(f"not proven: {gap}")
