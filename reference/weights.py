"""Release files -> the model: find the files, compare them with the configuration, map the weights into
memory.

No numbers are read before the name, shape and dtype of every tensor have been compared; one error lists all
differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from .config import StarConfig, config_from_files
from .containers import LazyTensor, tensors_from_pt, tensors_from_safetensors
from .diffusion.names import DIT
from .errors import CheckpointError
from .hub import commits_of, is_hub_id, snapshot
from .model import Star
from .names import aliases, expected_tensors, is_set_aside, release_name, wrapper_of
from .releases import RELEASES, find_parts, find_release, silent
from .shards import tensors_from_folder
from .strict_json import Section, read_object

LOADED_DTYPES = {  # stored -> loaded
    torch.float64: torch.float32,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}
VAE_FILE = "diffusion_pytorch_model.safetensors"
GIVE_STAR, GIVE_VQ = "give the file with --checkpoint", "give the file with --vq"
HEAD = "lm_head.weight"  # the base model's, under all its names of it
TOLD = 10  # differences that one error names
SHIPPED = {"nano": Path(__file__).parent / "nano" / "weights"}  # source -> a checkpoint in this package


@dataclass(frozen=True)
class CheckpointFiles:
    """The paths of a checkpoint's four parts, and of its diffusion decoder's folder if that is used."""

    config_json: Path
    star_pt: Path
    qwen_folder: Path
    vq_pt: Path
    lumina_folder: Path | None = None

    @property
    def commits(self) -> dict[str, str]:
        """Repository -> commit of the parts that come from the hub."""
        parts = (self.config_json, self.star_pt, self.qwen_folder, self.vq_pt, self.lumina_folder)
        return commits_of(tuple(part for part in parts if part))

    def config(self) -> StarConfig:
        """The model that the files describe. Raises CheckpointError as `config_from_files` does."""
        return config_from_files(self.config_json, self.qwen_folder, self.lumina_folder)


def resolve_checkpoint(
    source: str | Path,
    *,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    vq: str | Path | None = None,
    lumina: str | Path | None = None,
    from_folder: str | Path | None = None,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] = silent,
) -> CheckpointFiles:
    """Find the files of a checkpoint.

    `source` is `star-3b` or `star-7b` (the releases, downloaded to the hub's cache as far as `from_folder`
    and the cache do not hold them), a folder in the release layout, the release's config JSON, `nano`
    (STAR-Nano, which is part of this package; a folder of that name is `./nano`), or a hub id (`owner/name`).
    `checkpoint` (STAR-*.pt), `base` (Qwen's folder), `vq` (VQ-Model.pt) and `lumina` (the diffusion decoder's
    folder), each a path or a hub id, replace a part of a release, or what is found beside the JSON or under
    the paths that it states. A checkpoint without a diffusion decoder's folder is used without it. `revision`
    is a branch, tag or commit of the one hub id among these. Raises CheckpointError naming what was not
    found, and where, and as `find_parts` does.
    """
    if revision:
        check_revision(revision, source, checkpoint, base, vq, lumina)
    given_star = file_in(local(checkpoint, revision), "STAR*.pt", fix=GIVE_STAR) if checkpoint else None
    given_base = local(base, revision) if base else None
    given_lumina = local(lumina, revision) if lumina else None
    given_vq = file_in(local(vq, revision), "VQ*.pt", fix=GIVE_VQ) if vq else None
    if release := find_release(source):
        wanted = [p for p, path in zip(release.parts, (given_star, given_vq, given_base)) if path is None]
        found = find_parts(wanted, from_folder=from_folder, progress=progress)
        return CheckpointFiles(
            config_json=release.config_json,
            star_pt=given_star or found[release.star],
            qwen_folder=given_base or found[release.base],
            vq_pt=given_vq or found[release.vq],
            lumina_folder=given_lumina,
        )
    if from_folder:
        raise CheckpointError(
            "--from is only for the releases",
            where=f"--from {from_folder}: expected SOURCE {' or '.join(RELEASES)}, got {source}",
            fix="leave out --from, and give parts with --checkpoint, --base and --vq",
        )
    place = SHIPPED.get(str(source)) or local(source, revision)
    config_json = file_in(
        place, "STAR*.json", fix="give the JSON of the release's repository, and --checkpoint"
    )
    values = Section(read_object(config_json), source=config_json)
    return CheckpointFiles(
        config_json=config_json,
        star_pt=given_star or file_in(config_json.parent, "STAR*.pt", fix=GIVE_STAR),
        qwen_folder=given_base or stated(values.section("language_model"), flag="--base"),
        vq_pt=given_vq
        or file_in(stated(values.section("pixel_encoder"), flag="--vq"), "VQ*.pt", fix=GIVE_VQ),
        lumina_folder=given_lumina or stated_lumina(values),
    )


def check_revision(revision: str, source: str | Path, *parts: str | Path | None) -> None:
    """Raise CheckpointError unless exactly one of a checkpoint's sources is a hub id."""
    given = [part for part in parts if part]
    named = [] if find_release(source) or str(source) in SHIPPED else [source]
    if len(ids := [str(part) for part in (*named, *given) if is_hub_id(part)]) != 1:
        raise CheckpointError(
            "--revision is for one hub id",
            where=f"--revision {revision}: expected one hub id (owner/name) among SOURCE, --checkpoint, "
            f"--base and --vq, got {', '.join(ids) or 'none'}",
            fix="leave out --revision, or download the parts and give their paths",
        )


def local(source: str | Path, revision: str | None = None) -> Path:
    """A path as it is, or the folder of a hub id's downloaded snapshot."""
    if Path(source).exists():
        return Path(source)
    if is_hub_id(source):
        return snapshot(str(source), revision)
    raise CheckpointError(
        "no such file or folder",
        where=f"{source}: expected a path or a hub id (owner/name, with no folder `owner` here); SOURCE may "
        "also be " + ", ".join([*SHIPPED, *RELEASES]),
        fix="check the path",
    )


def file_in(place: Path, pattern: str, *, fix: str) -> Path:
    """The file itself, or the only file in a folder that matches the pattern."""
    if not place.is_dir():
        return place
    found = sorted(place.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"the folder does not hold exactly one {pattern}",
            where=f"{place}: expected one {pattern}, got {names}",
            fix=fix,
        )
    return found[0]


def stated(section: Section, *, flag: str) -> Path:
    """The file or folder that `model_path` refers to.

    Raises CheckpointError where it lies in none of its places.
    """
    candidates = places_of(section)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise CheckpointError(
        f"{section.key_path('model_path')} does not exist",
        where=f"{section.source}: looked for " + ", ".join(dict.fromkeys(map(str, candidates))),
        fix=f"put it there, or give a path or hub id with {flag}",
    )


def places_of(section: Section) -> list[Path]:
    """Where what `model_path` refers to may lie: beside the JSON under its last name, or under the stated
    path relative to the JSON's folder or one of the two folders above it, as in a clone of the release's
    repository."""
    stated_path, folder = Path(section.text("model_path")), section.source.absolute().parent
    candidates = [folder / stated_path.name]
    if not stated_path.is_absolute() and ".." not in stated_path.parts:
        candidates += [parent / stated_path for parent in [folder, *folder.parents[:2]]]
    return candidates


def stated_lumina(values: Section) -> Path | None:
    """The folder of the diffusion decoder that `pixel_decoder` refers to; None where there is none."""
    if "pixel_decoder" not in values:
        return None
    section = values.section("pixel_decoder")
    section.text("model_name", choices=("LUMINA2",))
    return next((place for place in places_of(section) if place.is_dir()), None)


def load_star(
    files: CheckpointFiles,
    *,
    rope_bf16: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Star:
    """The model with its weights, in evaluation mode and without gradients.

    Weights that are stored in `dtype` already stay memory-mapped on the CPU. Raises CheckpointError as
    `named_tensors` does.
    """
    config = files.config()
    tensors = named_tensors(files, config)
    with torch.device("meta"):
        star = Star(config, rope_bf16=rope_bf16)
    star.load_state_dict(
        {name: lazy.load().to(device, dtype) for name, lazy in tensors.items()}, strict=True, assign=True
    )
    star.tie_text_head()
    for name, value in star.constants().items():
        module, _, key = name.rpartition(".")
        setattr(star.get_submodule(module), key, value.to(device))
    return star.eval().requires_grad_(False)


def named_tensors(
    files: CheckpointFiles, config: StarConfig, *, headers_only: bool = False
) -> dict[str, LazyTensor]:
    """Every name in `Star(config).state_dict()` -> its lazy tensor, in the model's shape and with at most 32
    bits per number.

    Names that share one tensor (the codebook, tied embeddings) all appear. A base model with tied embeddings
    may hold the text head too: then both are compared, unless `headers_only`. Raises one CheckpointError that
    lists all tensors that are missing, unexpected, of another shape or not floats.
    """
    stored = {
        "base": tensors_from_folder(files.qwen_folder),
        "trained": tensors_from_pt(files.star_pt),
        "vq": tensors_from_pt(files.vq_pt),
    }
    places = {"base": files.qwen_folder, "trained": files.star_pt, "vq": files.vq_pt}
    if config.diffusion and (lumina := files.lumina_folder):
        places |= {"vae": lumina / "vae", "text_encoder": lumina / "text_encoder"}
        stored["vae"] = tensors_from_safetensors(places["vae"] / VAE_FILE)
        stored["text_encoder"] = tensors_from_folder(places["text_encoder"])
    head = stored["base"].pop(HEAD, None) if config.tie_word_embeddings else None
    found: dict[str, LazyTensor] = {}
    differences: list[str] = []
    for part, expected in expected_tensors(config).items():
        named: dict[str, LazyTensor] = {}
        wrapper = "" if part == "base" else wrapper_of(stored[part])
        for stored_name, lazy in stored[part].items():
            name = stored_name.removeprefix(wrapper)
            if is_set_aside(name, part, config):
                continue
            if (release := release_name(name)) in named:
                differences.append(
                    f"{places[part].name}: {stored_name[:120]}: also present as {named[release].name}"
                )
            named[release] = lazy
        differences += [f"{places[part].name}: {difference}" for difference in compare(named, expected)]
        found |= {
            ours: replace(lazy, shape=shape, dtype=LOADED_DTYPES.get(lazy.dtype, lazy.dtype))
            for release, (ours, _, shape) in expected.items()
            if (lazy := named.get(release))
        }
    if differences:
        more = f"; and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
        raise CheckpointError(
            f"the checkpoint does not match its configuration: {len(differences)} tensors differ",
            where="; ".join(differences[:TOLD]) + more,
            fix="use weights and configuration of the same release: "
            f"{files.config_json.name} describes {config.name}"
            + without_diffusion(stored["trained"], config),
        )
    if head and not headers_only:
        check_tied(head, found["token_embedding.weight"])
    return found | {alias: found[name] for alias, name in aliases(config).items()}


def without_diffusion(trained: dict[str, LazyTensor], config: StarConfig) -> str:
    """What to say of a STAR file that lacks the diffusion decoder which is asked for; else nothing."""
    if config.diffusion is None or any(DIT in name for name in trained):
        return ""
    return "; this STAR file holds no diffusion decoder: use it without the folder of Lumina-Image-2.0"


def compare(named: dict[str, LazyTensor], expected: dict) -> list[str]:
    """The differences between the tensors that a part holds and those that it must hold, by release name, and
    by the file's own where that is another. What is missing alternates with the others, because only the
    first ten are told."""
    missing = [f"{name}: missing" for name in expected if name not in named]
    differences = []
    for name, lazy in named.items():
        told = name[:120] if lazy.name == name else f"{name[:120]} (in the file: {lazy.name[:120]})"
        if name not in expected:
            differences.append(f"{told}: unexpected")
        elif lazy.shape != expected[name][1]:
            got = f"{list(lazy.shape)}" if len(lazy.shape) <= 8 else f"{len(lazy.shape)} dimensions"
            differences.append(f"{told}: expected shape {list(expected[name][1])}, got {got}")
        elif lazy.dtype not in LOADED_DTYPES:
            dtype = str(lazy.dtype).removeprefix("torch.")
            differences.append(f"{told}: expected a float of 16, 32 or 64 bits, got {dtype}")
    return [told for pair in zip_longest(missing, differences) for told in pair if told]


def check_tied(head: LazyTensor, embedding: LazyTensor) -> None:
    """Raise CheckpointError unless a text head that is stored beside tied embeddings is equal to them."""
    mine, other = head.read(), embedding.read()
    if mine.dtype != other.dtype or mine.shape != other.shape or not torch.equal(mine, other):
        raise CheckpointError(
            "the base model's text head is not its token embedding",
            where=f"{head.source}: {head.name}: expected the numbers of {embedding.name} "
            "(tie_word_embeddings of config.json), got others",
            fix="set tie_word_embeddings to false if the text head was trained, or leave it out",
        )
