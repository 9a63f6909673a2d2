"""Images and edits over HTTP: OpenAI's fields and ours, sizes by the written rule, and events."""

from __future__ import annotations

import base64
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.served import SIDE, TOKENS, ask, events, form, picture, serving

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def image_of(item: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def test_an_answer_has_openais_fields_and_our_facts(server):
    reply = ask(server, GENERATE, {"model": "dall-e-3", "prompt": "a cat", "seed": 7})
    answer = reply.json
    assert reply.status == 200 and answer["model"] == "fake" and answer["size"] == f"{SIDE}x{SIDE}"
    assert answer["usage"]["output_tokens"] == TOKENS and answer["output_format"] == "png"
    star, (item,) = answer["star"], answer["data"]
    assert star["seed"] == item["seed"] == 7 and star["bundle_sha256"] == "b" * 64
    assert star["image_ids_sha256"] == [item["image_ids_sha256"]] and star["notes"] == []
    assert star["tokens_per_forward"] == 1 and star["seconds"] >= 0
    assert image_of(item).size == (SIDE, SIDE) and image_of(item).format == "PNG"


def test_each_image_has_a_seed_of_its_own_that_draws_it_again(server):
    three = ask(server, GENERATE, {"prompt": "a cat", "seed": 7, "n": 3}).json["data"]
    assert [item["seed"] for item in three] == [7, 8, 9]
    again = ask(server, GENERATE, {"prompt": "a cat", "seed": 9}).json["data"][0]
    assert again == three[2] and three[0] != three[1]


def test_a_seed_is_made_and_told_where_none_is_given(server):
    one, other = (ask(server, GENERATE, {"prompt": "a cat", "seed": None}).json for _ in range(2))
    assert one["star"]["seed"] != other["star"]["seed"]
    again = ask(server, GENERATE, {"prompt": "a cat", "seed": one["star"]["seed"]}).json
    assert again["data"] == one["data"]


def test_the_hash_is_that_of_the_ids_in_little_endian(server):
    item = ask(server, GENERATE, {"prompt": "a cat", "greedy": True}).json["data"][0]
    ids = np.random.default_rng([sum(b"a cat   ")]).integers(0, 1024, TOKENS)
    assert item["image_ids_sha256"] == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert item["seed"] is None


@pytest.mark.parametrize("size, side", [("128x256", 128), ("1024x1024", 1024), ("32x16", 16), ("auto", SIDE)])
def test_an_image_is_sent_in_the_shorter_side_and_the_answer_says_so(server, size, side):
    answer = ask(server, GENERATE, {"prompt": "a cat", "size": size}).json
    assert image_of(answer["data"][0]).size == (side, side) and answer["size"] == f"{side}x{side}"
    notes = [f"size: asked for {size}, drawn as {SIDE}x{SIDE}, sent as {side}x{side}"]
    assert answer["star"]["notes"] == ([] if side == SIDE else notes)
    assert answer["star"]["drawn_size"] == f"{SIDE}x{SIDE}"


@pytest.mark.parametrize("name, kind", [("png", "PNG"), ("jpeg", "JPEG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_an_image_has_the_format_that_was_asked_for(server, name, kind):
    items = [
        ask(server, GENERATE, {"prompt": "a", "output_format": name, "seed": 1, **more}).json["data"][0]
        for more in ({}, {"output_compression": 10})
    ]
    assert all(image_of(item).format == kind for item in items)
    if kind != "PNG":
        assert len(items[1]["b64_json"]) < len(items[0]["b64_json"])


def test_what_has_no_effect_is_taken_and_named(server):
    body = {
        "prompt": "a",
        "quality": "hd",
        "style": "vivid",
        "background": "transparent",
        "moderation": "auto",
        "user": "someone",
    }
    notes = ask(server, GENERATE, body).json["star"]["notes"]
    assert [note.split()[0].strip(":") for note in notes] == ["quality", "style", "background"]


def test_auto_and_null_mean_the_default_everywhere(server):
    names = (
        *("model", "n", "size", "response_format", "output_format", "quality", "background", "user", "seed"),
        *("guidance", "top_k", "top_p", "greedy", "reason", "window", "stream", "partial_images"),
        *("output_compression",),
    )
    for value in ("auto", None):
        assert ask(server, GENERATE, {"prompt": "a", **dict.fromkeys(names, value)}).status == 200


def test_a_reasoned_image_says_what_was_drawn(server):
    item = ask(server, GENERATE, {"prompt": "a riddle", "reason": True}).json["data"][0]
    assert item["revised_prompt"] == "answer to a riddle"


def test_an_address_gives_the_file_without_a_key(server):
    items = ask(server, GENERATE, {"prompt": "a", "seed": 1, "response_format": "url"}).json["data"]
    inline = ask(server, GENERATE, {"prompt": "a", "seed": 1}).json["data"][0]["b64_json"]
    path = items[0]["url"].removeprefix(f"http://127.0.0.1:{server.port}")
    reply = ask(server, path)
    assert reply.data == base64.b64decode(inline) and reply.headers["content-type"] == "image/png"
    assert ask(server, path[:-6] + "x.png").status == 404
    assert ask(server, "/v1/files/..%2f..%2fetc%2fpasswd").status == 404


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a" * 40_000}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 11}, "n"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "n": 1.5}, "n"),
        ({"prompt": "a", "n": "2"}, "n"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "size": "9999x9999"}, "size"),
        ({"prompt": "a", "size": "1x1"}, "size"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "seed": 1e300}, "seed"),
        ({"prompt": "a", "guidance": 1e9}, "guidance"),
        ({"prompt": "a", "top_k": 0}, "top_k"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "window": 17}, "window"),
        ({"prompt": "a", "partial_images": 99}, "partial_images"),
        ({"prompt": "a", "response_format": "xml"}, "response_format"),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "guidence": 2}, "guidence"),
        ({"prompt": "refuse"}, "prompt"),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_by_name(server, body, param):
    reply = ask(server, GENERATE, body)
    assert reply.status == 400 and reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"


def test_a_misspelt_field_is_met_with_the_right_one(server):
    assert "guidance" in ask(server, GENERATE, {"prompt": "a", "guidence": 2}).error["fix"]


def test_a_stream_has_previews_and_then_the_image(server):
    body = {"prompt": "a cat", "seed": 3, "stream": True, "partial_images": 3}
    reply = ask(server, GENERATE, body)
    found = events(reply.data)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert [e["type"] for e in found] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [e["partial_image_index"] for e in found[:3]] == [0, 1, 2]
    assert all(f"event: {e['type']}" in reply.data.decode() for e in found)
    plain = ask(server, GENERATE, {"prompt": "a cat", "seed": 3}).json["data"][0]
    assert found[-1]["b64_json"] == plain["b64_json"] and found[-1]["star"]["seed"] == 3
    final, rows = np.asarray(image_of(found[-1])), []
    for preview in found[:3]:
        shown = np.asarray(image_of(preview))
        grey = (shown == 128).all(axis=(1, 2))
        rows.append(int((~grey).sum()))
        np.testing.assert_array_equal(shown[~grey], final[~grey])
    assert rows == sorted(set(rows)) and rows[0] > 0 and rows[-1] < SIDE


def test_a_stream_of_several_images_names_each(server):
    found = events(ask(server, GENERATE, {"prompt": "a", "n": 2, "stream": True, "partial_images": 0}).data)
    assert sorted(e["image_index"] for e in found) == [0, 1]


def test_a_request_that_fails_at_once_has_a_status_and_one_that_fails_late_an_event(server):
    assert ask(server, GENERATE, {"prompt": "a", "n": 0, "stream": True}).status == 400
    reply = ask(server, GENERATE, {"prompt": "refuse", "stream": True})
    assert reply.status == 200 and b"event: error" in reply.data
    assert events(reply.data)[-1]["error"]["param"] == "prompt"


def test_a_picture_is_edited_from_a_form_and_from_base64(server):
    encoded = base64.b64encode(picture(value=77)).decode()
    replies = []
    for name in ("image", "image[]"):
        body, kind = form([("prompt", "blue"), ("seed", "4"), ("n", "1"), (name, picture(value=77))])
        replies.append(ask(server, EDIT, body, kind=kind))
    for shown in (
        {"image": encoded},
        {"image": [f"data:image/png;base64,{encoded}"]},
        {"images": [{"image_url": f"data:image/png;base64,{encoded}"}]},
    ):
        replies.append(ask(server, EDIT, {"prompt": "blue", "seed": 4, **shown}))
    assert [reply.status for reply in replies] == [200] * 5
    assert len({reply.json["data"][0]["b64_json"] for reply in replies}) == 1
    other = ask(server, EDIT, {"prompt": "blue", "seed": 4, "image": base64.b64encode(picture()).decode()})
    assert other.json["data"] != replies[0].json["data"]


@pytest.mark.parametrize("seed", ["1_0", "\u0661", " 7", "0x7", "nan", ""])
def test_a_forms_numbers_are_plain(server, seed):
    body, kind = form([("prompt", "blue"), ("seed", seed), ("image", picture())])
    reply = ask(server, EDIT, body, kind=kind)
    assert reply.status == 400 and reply.error["param"] == "seed", reply.data


def test_an_edit_streams_events_of_its_own(server):
    body, kind = form([("prompt", "blue"), ("stream", "true"), ("partial_images", "1"), ("image", picture())])
    found = events(ask(server, EDIT, body, kind=kind).data)
    assert [e["type"] for e in found] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"image": "https://example.org/cat.png"},
        {"image": "file:///etc/passwd"},
        {"image": "not base64!"},
        {"image": "data:image/png,abc"},
        {"image": base64.b64encode(b"<html>").decode()},
        {"image": base64.b64encode(picture()[:60]).decode()},
        {"image": 5},
        {"image": []},
        {"image": [base64.b64encode(picture()).decode()] * 2},
        {"image": base64.b64encode(picture()).decode(), "mask": "x"},
    ],
    ids=lambda shown: str(shown)[:40],
)
def test_what_is_no_single_picture_is_refused(server, shown):
    reply = ask(server, EDIT, {"prompt": "blue", **shown})
    assert reply.status == 400 and reply.error["param"] in ("image", "mask")
