"""A checkpoint of a released model's size, filled with noise, to try what only real sizes show.

    python -m reference.real_size 3B|7B FOLDER [--layers N] [--stacked-layers N] ...

It has the release's files, and in them the release's names and shapes in bf16: `STAR_Qwen2.5-VL-3B.json`,
`STAR-3B.pt`, `VQ-Model.pt` and `Qwen2.5-VL-3B-Instruct/`; and with `--diffusion` the diffusion decoder, in
`STAR-3B.pt` and `lumina-image2/`. Two runs write the same numbers. Fewer layers give a model of real width
that is small enough for a test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import mini
from .config import config_from_files
from .diffusion import mini as diffusion_mini
from .errors import CheckpointError
from .names import expected_tensors
from .noise import Shapes, bytes_of, fill, laid_out_pt, laid_out_safetensors, whole_file
from .releases import CONFIGS, RELEASES, silent

SIZES = ("3B", "7B")
LUMINA_FILES = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
SHARD_BYTES = 4 * 10**9  # the release's shards are no larger
SPARE_BYTES = 64 << 20  # beside the tensors: tokenizer, headers, what the file system keeps of itself


def write_checkpoint(
    root: str | Path,
    size: str,
    *,
    layers: int | None = None,
    stacked_layers: int | None = None,
    vision_layers: int | None = None,
    vq_channels: int | None = None,
    diffusion: bool = False,
    tokenizer: str | Path | None = None,
    progress: Callable[[str, int, int], None] = silent,
) -> Path:
    """Write the checkpoint of `size` (3B or 7B) into the folder `root`, which is created, and return `root`.

    `layers`, `stacked_layers`, `vision_layers` and `vq_channels` replace the release's numbers. `diffusion`
    adds the diffusion decoder, which has one size, with the miniature's tokenizer. `tokenizer`
    is a tokenizer.json of Qwen's to use instead of the miniature's. `progress` gets bytes written and bytes
    in total. A file has its final name only when it is complete, and the configuration is the last one,
    without which a folder is no checkpoint. Raises CheckpointError, before anything is written, if the folder
    is in use or the disk too full; and if the disk fills up meanwhile.
    """
    root = Path(root)
    check_unused(root)
    star, base = configurations(
        size,
        layers=layers,
        stacked_layers=stacked_layers,
        vision_layers=vision_layers,
        vq_channels=vq_channels,
    )
    with tempfile.TemporaryDirectory() as folder:
        config_json, base_folder = Path(folder) / f"STAR_Qwen2.5-VL-{size}.json", Path(folder) / "base"
        write_small_files(config_json, base_folder, star, base, tokenizer=tokenizer)
        lumina = Path(folder) / diffusion_mini.FOLDER if diffusion else None
        if lumina:
            diffusion_mini.write_settings(lumina, **diffusion_mini.RELEASE)
        expected = expected_tensors(config_from_files(config_json, base_folder, lumina))
        shapes = {
            part: {name: stored for name, (_, stored, _) in of.items()} for part, of in expected.items()
        }
        # written at training time and unread since; the release counts one more than it has ids
        shapes["vq"]["quantize.codebook_used"] = (star["pixel_encoder"]["image_token_size"] + 1,)
        total = sum(map(bytes_of, shapes.values()))
        check_disk(root, total + SPARE_BYTES)
        try:
            write_files(root, size, shapes, counter(progress, total))
            places = dict.fromkeys(base_folder.iterdir(), root / f"Qwen2.5-VL-{size}-Instruct")
            for path in lumina.rglob("*.json") if lumina else ():
                places[path] = root / path.parent.relative_to(folder)
                places[path].mkdir(parents=True, exist_ok=True)
            for path, place in (places | {config_json: root}).items():
                with whole_file(place / path.name) as partial:
                    shutil.copyfile(path, partial)
        except OSError as error:
            raise CheckpointError(
                "the checkpoint cannot be written",
                where=f"{error.filename or root}: {error.strerror}; it takes {total} bytes",
                fix=f"make space, remove {root}, and run the command again",
            ) from None
    return root


def configurations(
    size: str,
    *,
    layers: int | None,
    stacked_layers: int | None,
    vision_layers: int | None,
    vq_channels: int | None,
) -> tuple[dict, dict]:
    """The content of the release's `STAR_*.json`, and of its base model's JSON files by name."""
    release = RELEASES[f"star-{size.lower()}"]
    star = json.loads(release.config_json.read_text(encoding="utf-8"))
    if stacked_layers is not None:
        star["stacked_ar"]["num_layers"] = stacked_layers
    if vq_channels is not None:  # the release does not state what its code holds as constants
        star["pixel_encoder"]["ch"] = vq_channels
    shipped = CONFIGS / release.base.name
    base = mini.base_json() | {
        name: json.loads((shipped / name).read_text(encoding="utf-8"))
        for name in ("config.json", "generation_config.json")
    }
    config = base["config.json"]
    if layers is not None:
        config["num_hidden_layers"] = layers
    if vision_layers is not None:
        vision = config["vision_config"]
        full = [block for block in vision["fullatt_block_indexes"] if block < vision_layers]
        vision |= {"depth": vision_layers, "fullatt_block_indexes": full or [0]}
    return star, base


def write_small_files(
    config_json: Path, base_folder: Path, star: dict, base: dict, *, tokenizer: str | Path | None
) -> None:
    """Write everything but the tensors."""
    mini.write_json(config_json, star)
    base_folder.mkdir()
    for name, content in base.items():
        mini.write_json(base_folder / name, content)
    if tokenizer is None:
        mini.write_tokenizer(base_folder / "tokenizer.json")
    else:
        try:
            shutil.copyfile(tokenizer, base_folder / "tokenizer.json")
        except OSError as error:
            raise CheckpointError(
                "the tokenizer cannot be read", where=f"{tokenizer}: {error.strerror}", fix="check the path"
            ) from None


def check_unused(root: Path) -> None:
    """Raise CheckpointError unless `root` is absent or an empty folder."""
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise CheckpointError(
            "the checkpoint's place is taken",
            where=f"{root}: expected nothing or an empty folder, got "
            + ("a folder with files in it" if root.is_dir() else "a file"),
            fix="give another folder, or remove what is there",
        )


def check_disk(root: Path, needed_bytes: int) -> None:
    """Raise CheckpointError unless the disk of `root` has `needed_bytes` free."""
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed_bytes:
        raise CheckpointError(
            "the disk has too little space",
            where=f"{root}: expected {needed_bytes} bytes free, got {free}",
            fix="make space, give a folder on another disk, or write fewer layers with --layers",
        )


def write_files(
    root: Path, size: str, shapes: dict[str, Shapes], written: Callable[[str, int], None]
) -> None:
    """Write the tensors: the base model's shards with their index, and the two .pt files."""
    folder = root / f"Qwen2.5-VL-{size}-Instruct"
    folder.mkdir(parents=True)
    shards, weight_map = shards_of(shapes["base"]), {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with whole_file(path) as partial:
            fill(partial, path.name, shard, laid_out_safetensors(partial, shard), written)
        weight_map |= dict.fromkeys(shard, path.name)
    with whole_file(folder / "model.safetensors.index.json") as partial:
        total = {"total_size": bytes_of(shapes["base"])}
        mini.write_json(partial, {"metadata": total, "weight_map": weight_map})
    for part, file in LUMINA_FILES.items() if "vae" in shapes else ():
        path = root / diffusion_mini.FOLDER / part / file
        path.parent.mkdir(parents=True)
        with whole_file(path) as partial:
            fill(partial, path.name, shapes[part], laid_out_safetensors(partial, shapes[part]), written)
    for name, part, key in ((f"STAR-{size}.pt", "trained", "state_dict"), ("VQ-Model.pt", "vq", None)):
        with whole_file(root / name) as partial:
            fill(partial, name, shapes[part], laid_out_pt(partial, shapes[part], key=key), written)


def shards_of(shapes: Shapes) -> list[Shapes]:
    """The tensors in order, in as few shards of at most `SHARD_BYTES` as that order allows."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if bytes_of(shards[-1]) + bytes_of({name: shape}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    return shards


def counter(progress: Callable[[str, int, int], None], total: int) -> Callable[[str, int], None]:
    """A function that adds bytes to those written, and reports them."""
    done = 0

    def add(name: str, count: int) -> None:
        nonlocal done
        done += count
        progress(name, done, total)

    return add


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.real_size", description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    for option, what in (
        ("--layers", "layers of the base"),
        ("--stacked-layers", "stacked layers"),
        ("--vision-layers", "blocks of the vision encoder"),
        ("--vq-channels", "channels of the VQ model, a multiple of 32"),
    ):
        parser.add_argument(option, type=int, metavar="N", help=f"{what} (default: the release's)")
    parser.add_argument("--diffusion", action="store_true", help="with the diffusion decoder, 10.6 GB more")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json of Qwen's")
    options = vars(parser.parse_args(arguments))
    root, size = options.pop("folder"), options.pop("size")
    from tqdm import tqdm

    every_s = 0.5 if sys.stderr.isatty() else 10
    with tqdm(unit="B", unit_scale=True, leave=False, mininterval=every_s, dynamic_ncols=True) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        try:
            write_checkpoint(root, size, **options, progress=show)
        except CheckpointError as error:
            bar.close()
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    print(f"written: {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
