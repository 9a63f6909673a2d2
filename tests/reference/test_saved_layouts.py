"""What `save_pretrained` of transformers writes, version by version, is read as the release's own files are.

The differences from the release's files were recorded with transformers 4.49.0, 4.52.4, 4.57.1 and 5.23.0,
each of which loaded and saved the configuration and the processor of Qwen2.5-VL-3B-Instruct (and 7B, whose
vision encoder has one more default).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from reference.base_config import base_from_json, generation_from_json
from reference.processor import ImageSettings, chat_template_from_folder, image_settings_from_folder
from tests.helpers.refusals import refused
from tests.helpers.released import GENERATION, nested_qwen_json, qwen_json

ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
VISION_449 = {  # all that 4.49 writes of the vision encoder
    "hidden_size": 1280,
    "in_chans": 3,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SLOW = {  # preprocessor_config.json of 4.49 to 4.57
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "max_pixels": 12845056,
    "min_pixels": 3136,
    "processor_class": "Qwen2_5_VLProcessor",
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
}
UNSET = (
    "crop_size",
    "device",
    "disable_grouping",
    "do_center_crop",
    "do_pad",
    "input_data_format",
    "pad_size",
)
FAST = SLOW | {  # the same of the fast processor
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "data_format": "channels_first",
    "default_to_square": True,
    **dict.fromkeys((*UNSET, "return_tensors")),
}
NESTED = {  # processor_config.json of 5.23
    "image_processor": {
        k: v for k, v in SLOW.items() if k not in ("max_pixels", "min_pixels", "processor_class")
    },
    "processor_class": "Qwen2_5_VLProcessor",
    "video_processor": {"image_mean": [0.5] * 3},
}


def saved_449(size: str) -> dict:
    vision = VISION_449 | ({"out_hidden_size": 2048} if size == "3B" else {})
    return qwen_json(size) | {"rope_scaling": ROPE, "vision_config": vision, "transformers_version": "4.49.0"}


def saved_452(size: str) -> dict:
    """The decoder's keys twice, and `tie_word_embeddings` only where it is not the level's default."""
    flat = qwen_json(size) | {"rope_scaling": ROPE}
    vision = flat["vision_config"] | {"in_channels": 3, "initializer_range": 0.02, "model_type": "qwen2_5_vl"}
    elsewhere = ("vision_config", "tie_word_embeddings", "transformers_version")
    text = {key: value for key, value in flat.items() if key not in elsewhere}
    text |= {"model_type": "qwen2_5_vl_text", "image_token_id": None, "video_token_id": None}
    tied = flat.pop("tie_word_embeddings")
    (text if tied else flat)["tie_word_embeddings"] = tied
    return flat | {"text_config": text, "vision_config": vision}


def saved_457(size: str) -> dict:
    saved = saved_452(size)
    text = saved["text_config"]
    text |= {"dtype": text.pop("torch_dtype"), "sliding_window": None}
    text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    return saved | {"dtype": saved.pop("torch_dtype")}


def saved_523(size: str) -> dict:
    saved = nested_qwen_json(qwen_json(size))
    saved["text_config"]["rope_parameters"] |= {"type": "mrope"}
    saved["vision_config"] |= {
        "model_type": "qwen2_5_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    return saved


@pytest.mark.parametrize("size", ["3B", "7B"])
@pytest.mark.parametrize("saved", [saved_449, saved_452, saved_457, saved_523])
def test_each_configuration_means_the_releases(tmp_path: Path, saved, size: str) -> None:
    (tmp_path / "release.json").write_text(json.dumps(qwen_json(size)))
    (tmp_path / "saved.json").write_text(json.dumps(saved(size)))
    assert base_from_json(tmp_path / "saved.json") == base_from_json(tmp_path / "release.json")


def test_a_penalty_that_the_library_left_out_is_none(tmp_path: Path) -> None:
    saved = {key: value for key, value in GENERATION.items() if key != "repetition_penalty"}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(saved))
    assert generation_from_json(path, vocab_size=151936)[1] == 1.0
    del saved["transformers_version"]  # no library wrote this
    path.write_text(json.dumps(saved))
    with refused("repetition_penalty", "no such key"):
        generation_from_json(path, vocab_size=151936)


@pytest.fixture
def vision(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(qwen_json("3B")))
    return base_from_json(tmp_path / "config.json")[1]


@pytest.mark.parametrize(
    "name, saved",
    [
        ("preprocessor_config.json", SLOW),
        ("preprocessor_config.json", FAST),
        ("preprocessor_config.json", NESTED["image_processor"]),
        ("processor_config.json", NESTED),
    ],
)
def test_each_image_processor_means_the_same(tmp_path: Path, vision, name: str, saved: dict) -> None:
    (tmp_path / name).write_text(json.dumps(saved))
    expected = ImageSettings(tuple(MEAN), tuple(STD))  # type: ignore[arg-type]
    assert image_settings_from_folder(tmp_path, vision) == expected


def test_the_newer_file_of_the_processor_comes_first(tmp_path: Path, vision) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SLOW | {"image_mean": [0.5] * 3}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    assert image_settings_from_folder(tmp_path, vision).mean == (0.5, 0.5, 0.5)
    (tmp_path / "processor_config.json").write_text(json.dumps(NESTED))
    assert image_settings_from_folder(tmp_path, vision).mean == tuple(MEAN)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"image_mean": None}, "image_mean: expected a list of 3 numbers from 0 to 1, got no such key"),
        ({"image_mean": ["a", "b", "c"]}, 'image_mean[0]: expected a number from 0 to 1, got "a"'),
        ({"image_mean": [0.5, 0.5]}, "image_mean: expected a list of 3 numbers from 0 to 1, got a list of 2"),
        ({"image_mean": [True] * 3}, "image_mean[0]"),
        ({"image_mean": {"r": 0.5}}, "image_mean"),
        ({"image_mean": [123.7, 116.3, 103.5]}, "image_mean[0]: expected a number from 0 to 1, got 123.7"),
        ({"image_std": [0, 0, 0]}, "image_std[0]: expected a number from 0.01 to 10, got 0"),
        ({"image_std": [-0.2] * 3}, "image_std[0]"),
        ({"image_std": 0.2}, "image_std"),
        ({"patch_size": 16}, "patch_size: expected 14 (vision_config of config.json), got 16"),
        ({"merge_size": 1}, "merge_size"),
        ({"temporal_patch_size": 1}, "temporal_patch_size"),
        ({"do_rescale": False}, "do_rescale: expected true"),
        ({"do_normalize": False}, "do_normalize: expected true"),
        ({"do_center_crop": True}, "do_center_crop: expected false"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
        ({"sharpen": 1}, "sharpen: expected no key of this name"),
    ],
)
def test_an_image_processor_that_is_not_computed_is_refused(
    tmp_path: Path, vision, change: dict, told: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SLOW | change))
    with refused("preprocessor_config.json", told):
        image_settings_from_folder(tmp_path, vision)
    nested = copy.deepcopy(NESTED)
    nested["image_processor"] |= change  # type: ignore[operator]
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    with refused("processor_config.json", "image_processor." + told):
        image_settings_from_folder(tmp_path, vision)


def test_without_an_image_processor_the_file_is_named(tmp_path: Path, vision) -> None:
    with refused("preprocessor_config.json does not exist"):
        image_settings_from_folder(tmp_path, vision)


def test_the_template_is_the_processors(tmp_path: Path) -> None:
    """The tokenizer's own one comes last: that of early revisions of Qwen2.5-VL knows no images."""
    with refused("no chat template", "chat_template.jinja"):
        chat_template_from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "of the tokenizer"}))
    assert chat_template_from_folder(tmp_path) == ("of the tokenizer", tmp_path / "tokenizer_config.json")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of 4.49"}))
    assert chat_template_from_folder(tmp_path) == ("of 4.49", tmp_path / "chat_template.json")
    (tmp_path / "chat_template.jinja").write_text("of 4.52")
    assert chat_template_from_folder(tmp_path) == ("of 4.52", tmp_path / "chat_template.jinja")


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template_from_folder(tmp_path)[0] == "b"
    for wrong in ([], [3], {"default": "b"}, 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
        with refused("chat_template: expected a string"):
            chat_template_from_folder(tmp_path)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with refused("chat_template.jinja is not text in UTF-8"):
        chat_template_from_folder(tmp_path)
