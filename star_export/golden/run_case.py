"""Run a session once on a recorded case, and compare its outputs and caches.

Outputs must lie within tolerances; so must the cache slots that were written, while all others keep their
bits. This module knows nothing of bundles or reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from engines.bundle.tensors import PRESENT, bound_tensors, present_name
from engines.errors import MissingError
from engines.runtime.sampler import sample
from engines.sessions import Buffer, Session

from .cases import POISON, Case, Tensors
from .compare import Comparison, compare


def run_case(
    session: Session,
    case: Case,
    *,
    tolerances: Mapping[str, float],
    capacity_tokens: int | None = None,
    own_draws: bool = False,
) -> list[Comparison]:
    """Run `case` once and compare every output.

    Caches are extended with poison to `capacity_tokens`, the fixed capacity of a plan. With `own_draws`,
    drawn ids are compared with those that the executor's own logits give, not with the recorded ones.
    """
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
    """Restrict `inputs_embeds` [..,H] on both sides to the rows whose `image_ids` agree.

    Another id has another row, and the share of ids that differ has a tolerance of its own. The rows of
    ids [N,S] are [N,S,H], or [2N,S,H] under guidance, where an image has two in a row. If no id agrees, both
    sides lose `inputs_embeds`.
    """
    if (
        not {"image_ids", "inputs_embeds"} <= wanted.keys()
        or got["image_ids"].shape != wanted["image_ids"].shape
    ):
        return got, wanted
    same = got["image_ids"] == wanted["image_ids"]
    if same.all():
        return got, wanted
    if not same.any():
        return _without(got, "inputs_embeds"), _without(wanted, "inputs_embeds")
    rows = wanted["inputs_embeds"].reshape(-1, wanted["inputs_embeds"].shape[-1])
    kept = same.repeat(len(rows) // same.size, axis=0).reshape(-1)
    return got | {"inputs_embeds": got["inputs_embeds"].reshape(rows.shape)[kept]}, wanted | {
        "inputs_embeds": rows[kept]
    }


def _without(tensors: Tensors, name: str) -> Tensors:
    return {key: array for key, array in tensors.items() if key != name}


def redrawn(got: Tensors, feeds: Tensors) -> Tensors:
    """Draw `image_ids` from an executor's logits [N,S,V] as the sampler does; {} if the component draws none.

    In 16 bits, the arg-max of logit + noise may be another where two are almost equal.
    """
    if not {"logits", "noise"} <= got.keys() | feeds.keys() or not np.isfinite(got["logits"]).all():
        return {}
    return {
        "image_ids": sample(
            got["logits"],
            top_k=int(feeds["top_k"][0]),
            top_p=float(feeds["top_p"][0]),
            noise=feeds["noise"],
        )
    }


def read_caches(buffers: Mapping[str, Buffer]) -> Tensors:
    """Copy all caches in `buffers`, under their `present.` names."""
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
    """Compare caches [B,KV,C,D] after a step of `tokens` positions at `write_indices` [B].

    Written slots must agree with those of `reference` (of any capacity) within the tolerances, and all other
    slots with `before`, bit by bit.
    """
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
    """Select the slots that a step wrote, in float32: [B,KV,C,D] -> [B,tokens,KV,D]."""
    rows, slots = np.arange(len(write_indices))[:, None], write_indices[:, None] + np.arange(tokens)
    return cache[rows, :, slots].astype(np.float32)


def untouched(
    name: str, after: np.ndarray, *, before: np.ndarray, write_indices: np.ndarray, tokens: int
) -> Comparison:
    """The share of elements outside the written slots whose bits changed, which must be 0."""
    slots = np.arange(after.shape[2])
    outside = (slots < write_indices[:, None]) | (slots >= write_indices[:, None] + tokens)  # [B,C]
    changed = bits(after) != bits(before)  # [B,KV,C,D]
    changed &= outside[:, None, :, None]
    place = "slots that must not change"
    if changed.any():
        row, _, slot, _ = np.argwhere(changed)[0]
        place += f" (first at row {row}, slot {slot})"
    return Comparison(name, float(changed.mean()), 0.0, place=place)


def extended(cache: np.ndarray, capacity_tokens: int | None) -> np.ndarray:
    """Append poisoned slots to `cache` [B,KV,C,D] up to `capacity_tokens`."""
    if capacity_tokens is None or capacity_tokens == cache.shape[2]:
        return cache
    pad = capacity_tokens - cache.shape[2]
    return np.pad(cache, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=POISON)


def bits(array: np.ndarray) -> np.ndarray:
    """View the array as unsigned integers, which are equal exactly where the memory is, even for NaN."""
    return array.view(f"u{array.dtype.itemsize}")


def array_dtype(name: str) -> np.dtype:
    """The numpy type for writing to a buffer of type `name`.

    numpy has no bfloat16, so that type comes from ml_dtypes. Raises MissingError where it is not installed.
    """
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
    """The same results with `place`, such as `step 3`, in front of their own."""
    return [replace(result, place=f"{place}: {result.place}".removesuffix(": ")) for result in results]
