"""How the base model's processor prepares a prompt and an image: its chat template and its image settings.

transformers up to 4.51 wrote the template to `chat_template.json`, and from 4.52 to `chat_template.jinja`;
the tokenizer has one of its own in `tokenizer_config.json`, which may know no images. The image settings are
in `preprocessor_config.json`, and from 5.0 in `processor_config.json`.

Sources: transformers, processing_utils.py (`get_processor_dict`) and image_processing_base.py
(`get_image_processor_dict`), for the order in which they look.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .base_config import VisionConfig
from .errors import CheckpointError
from .strict_json import Section, kind, read_object, read_text

# The slow processor is what is computed here; the others are the same but for their resize.
IMAGE_PROCESSORS = tuple(f"Qwen2VLImageProcessor{suffix}" for suffix in ("", "Fast", "Pil"))
DONE = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
NOT_DONE = ("do_center_crop", "do_pad")
BICUBIC = 3
UNUSED = frozenset(  # what the runtime takes as an argument, or what says nothing of one image
    (
        *("min_pixels", "max_pixels", "size", "processor_class", "data_format", "default_to_square"),
        *("auto_map", "feature_extractor_type", "video_processor_type"),
    )
)


@dataclass(frozen=True)
class ImageSettings:
    """What the pixels of an image, 0 to 1, are normalised with, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def image_settings_from_folder(folder: Path, vision: VisionConfig) -> ImageSettings:
    """The settings of the base model's image processor.

    Raises CheckpointError for settings that are missing or no numbers, and for a processor that prepares an
    image otherwise than the runtime does.
    """
    section = _image_section(folder)
    section.values = {key: value for key, value in section.values.items() if value is not None}
    red, green, blue = section.numbers("image_mean", low=0.0, high=1.0, length=3)
    mean = red, green, blue
    red, green, blue = section.numbers("image_std", low=0.01, high=10.0, length=3)
    section.text("image_processor_type", choices=IMAGE_PROCESSORS, default=IMAGE_PROCESSORS[0])
    for key, value in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if (got := section.integer(key, high=256, default=value)) != value:
            raise section.refuse(key, f"{value} (vision_config of config.json)", str(got))
    for key in (*DONE, *NOT_DONE):
        if section.flag(key, default=key in DONE) != (key in DONE):
            raise section.refuse(key, "true" if key in DONE else "false", "the opposite")
    section.integer("resample", low=BICUBIC, high=BICUBIC, default=BICUBIC)
    section.number("rescale_factor", low=0.003921, high=0.003922, default=1 / 255)
    section.finish(unused=UNUSED)
    return ImageSettings(mean, std=(red, green, blue))


def _image_section(folder: Path) -> Section:
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    if newer.exists() and "image_processor" in (found := Section(read_object(newer), source=newer)):
        return found.section("image_processor")
    return Section(read_object(older), source=older)


def chat_template_from_folder(folder: Path) -> tuple[str, Path]:
    """The chat template of the base model's processor, and the file that it is in. Raises CheckpointError."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return read_text(jinja), jinja
    files = [folder / name for name in ("chat_template.json", "tokenizer_config.json")]
    for path in files:
        if path.exists():
            section = Section(read_object(path), source=path)
            if section.values.get("chat_template") is not None:
                return _template(section), path
    raise CheckpointError(
        "the base model has no chat template",
        where=f"{folder}: expected chat_template.jinja, or chat_template in one of "
        f"{' and '.join(path.name for path in files)}; found none",
        fix="download the base model again, with all of its small files",
    )


def _template(section: Section) -> str:
    """`chat_template`: a text, or the one named `default` of a list."""
    value = section.take("chat_template", "a string")
    if type(value) is list:
        named = {item.get("name"): item.get("template") for item in value if type(item) is dict}
        value = named.get("default", value)
    if type(value) is not str:
        raise section.refuse("chat_template", "a string", kind(value))
    return value
