"""One call of a session against a recorded case: outputs within tolerances, caches right where written and untouched elsewhere.

Knows nothing of bundles or reports. A session is anything with `spec`, `buffer(shape, dtype)` and `bind(buffers) -> step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from engines.bundle.tensors import PRESENT, bound_tensors, present_name
from engines.errors import MissingError
from engines.runtime.sampler import sample

from .cases import POISON, Case, Tensors
from .compare import Comparison, compare


def run_case(
    session,
    case: Case,
    *,
    tolerances: Mapping[str, float],
    capacity_tokens: int | None = None,
    own_draws: bool = False,
) -> list[Comparison]:
    """Run `case` once and compare every output. `capacity_tokens`: the fixed capacity of a plan, to which caches are extended by
    poison. Written cache slots are held to the tolerances; all others must keep their bits. `own_draws`: ids that are drawn are held to
    the executor's own logits, not to the recorded ones."""
    feeds = {
        name: extended(array, capacity_tokens) if present_name(name) else array
        for name, array in case.inputs.items()
    }
    buffers = {}
    for tensor in bound_tensors(session.spec):
        source = feeds[tensor.name] if tensor.name in feeds else case.outputs[tensor.name]
        buffers[tensor.name] = session.buffer(source.shape, tensor.dtype)
    for name, array in feeds.items():
        buffers[name].write(array.astype(array_dtype(buffers[name].dtype)))
    before = read_caches(buffers)
    session.bind(buffers)()
    outputs = {name: array for name, array in case.outputs.items() if not name.startswith(PRESENT)}
    got, wanted = where_ids_agree({name: buffers[name].read() for name in outputs}, outputs)
    if own_draws:
        wanted = wanted | redrawn(got, feeds)
    results = compare(got, wanted, tolerances=tolerances)
    if before:
        wanted = {name: array for name, array in case.outputs.items() if name not in outputs}
        results += compare_caches(
            read_caches(buffers),
            wanted,
            before=before,
            tolerances=tolerances,
            write_indices=feeds["write_indices"],
            tokens=feeds["inputs_embeds"].shape[1],
        )
    return results


def where_ids_agree(got: Tensors, wanted: Tensors) -> tuple[Tensors, Tensors]:
    """Both sides with `inputs_embeds` [..,H] only where `image_ids` agree: the row of another id is another row, and the share of such
    ids has a tolerance of its own. Rows are the ids' in order, two for each id under guidance. Without them where no id agrees."""
    if (
        not {"image_ids", "inputs_embeds"} <= wanted.keys()
        or got["image_ids"].shape != wanted["image_ids"].shape
    ):
        return got, wanted
    same = (got["image_ids"] == wanted["image_ids"]).reshape(-1)
    if same.all():
        return got, wanted
    if not same.any():
        return tuple(
            {name: array for name, array in side.items() if name != "inputs_embeds"} for side in (got, wanted)
        )
    rows = wanted["inputs_embeds"].reshape(-1, wanted["inputs_embeds"].shape[-1])
    kept = same.repeat(len(rows) // same.size)
    return got | {"inputs_embeds": got["inputs_embeds"].reshape(rows.shape)[kept]}, wanted | {
        "inputs_embeds": rows[kept]
    }


def redrawn(got: Tensors, feeds: Tensors) -> Tensors:
    """The ids that the sampler's definition draws from an executor's own logits [N,V]; nothing of a component that draws none. In 16
    bits a number that falls near the border of two candidates gives either, and where hundreds are about as probable it mostly does."""
    if not {"logits", "uniform"} <= got.keys() | feeds.keys() or not np.isfinite(got["logits"]).all():
        return {}
    return {
        "image_ids": sample(
            got["logits"],
            top_k=int(feeds["top_k"][0]),
            top_p=float(feeds["top_p"][0]),
            uniform=feeds["uniform"],
        )
    }


def read_caches(buffers: Mapping[str, object]) -> Tensors:
    """Copies of all caches in `buffers`, under their `present.` names."""
    return {
        present: np.array(buffer.read())
        for name, buffer in buffers.items()
        if (present := present_name(name))
    }


def compare_caches(
    after: Tensors,
    reference: Tensors,
    *,
    before: Tensors,
    write_indices: np.ndarray,
    tokens: int,
    tolerances: Mapping[str, float],
) -> list[Comparison]:
    """Caches [B,KV,C,D] after a step of `tokens` positions at `write_indices` [B]: the written slots against those of `reference`
    (of any capacity) within the tolerances, all other slots against `before`, bit by bit."""
    written = compare(
        {name: written_slots(cache, write_indices, tokens) for name, cache in after.items()},
        {name: written_slots(cache, write_indices, tokens) for name, cache in reference.items()},
        tolerances=tolerances,
    )
    return written + [
        untouched(name, cache, before=before[name], write_indices=write_indices, tokens=tokens)
        for name, cache in after.items()
    ]


def written_slots(cache: np.ndarray, write_indices: np.ndarray, tokens: int) -> np.ndarray:
    """The slots that a step wrote, in float32: [B,KV,C,D] -> [B,tokens,KV,D]."""
    rows, slots = np.arange(len(write_indices))[:, None], write_indices[:, None] + np.arange(tokens)
    return cache[rows, :, slots].astype(np.float32)


def untouched(
    name: str, after: np.ndarray, *, before: np.ndarray, write_indices: np.ndarray, tokens: int
) -> Comparison:
    """The share of elements outside the written slots whose bits changed; none may."""
    slots = np.arange(after.shape[2])
    outside = (slots < write_indices[:, None]) | (slots >= write_indices[:, None] + tokens)  # [B,C]
    changed = bits(after) != bits(before)  # [B,KV,C,D]
    changed &= outside[:, None, :, None]
    where = (
        f" (first at row {(first := np.argwhere(changed)[0])[0]}, slot {first[2]})" if changed.any() else ""
    )
    return Comparison(name, float(changed.mean()), 0.0, place=f"slots that must not change{where}")


def extended(cache: np.ndarray, capacity_tokens: int | None) -> np.ndarray:
    """`cache` [B,KV,C,D] with poisoned slots appended up to `capacity_tokens`."""
    if capacity_tokens is None or capacity_tokens == cache.shape[2]:
        return cache
    pad = capacity_tokens - cache.shape[2]
    return np.pad(cache, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=POISON)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bit patterns as unsigned integers: equal where the memory is, NaN included."""
    return array.view(f"u{array.dtype.itemsize}")


def array_dtype(name: str) -> np.dtype:
    """The numpy type that a buffer of type `name` is written in. numpy has no bfloat16 of its own: MissingError without ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingError(
            "ml_dtypes is not installed",
            where=f"bfloat16 caches: expected ml_dtypes, got {error}",
            fix="pip install ml_dtypes",
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def placed(place: str, results: list[Comparison]) -> list[Comparison]:
    """The same results, seen at `place`: `step 3`."""
    return [replace(result, place=f"{place}: {result.place}".removesuffix(": ")) for result in results]
