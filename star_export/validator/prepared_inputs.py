"""The rung "prepared inputs": does this host make of an image and words what the exporting host made?"""

from __future__ import annotations

import numpy as np

from engines.inputs.prompt import Chat
from engines.progress import Progress

from ..golden.cases import cases_from_file
from ..golden.compare import compare
from ..golden.prepared import PREPARED, prepared
from .certificate import Row, rows_from_results
from .subject import Subject

TOLERANCE = 1e-6  # of the deviation of pixels: they are resized in integers, and a level of 255 is 1e-2


def prepared_inputs(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare the pixels, ids and positions that this host prepares with those of the host that exported."""
    if PREPARED not in subject.bundle.manifest.files:
        return [], "left out: the bundle does not record what its host prepared: export it again"
    progress("what the host prepares", 0, 1)
    chat, rows = Chat.from_bundle(subject.bundle), []
    for case, recorded in cases_from_file(subject.bundle.file(PREPARED)).items():
        tolerances = {
            name: 0.0 if array.dtype == np.int64 else TOLERANCE for name, array in recorded.outputs.items()
        }
        results = compare(prepared(chat, case, recorded.inputs), recorded.outputs, tolerances=tolerances)
        rows += rows_from_results("runtime", f"prepared for {case}", results)
    return rows, ""
