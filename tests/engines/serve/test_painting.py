"""Images of the diffusion decoder over HTTP: fields, sizes by the written rule, previews, ends, refusals."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engines.errors import InputError
from engines.inputs.image_io import image_from_bytes
from engines.runtime.painting import Painting
from engines.runtime.star import Star
from engines.runtime.together import Together
from engines.serve.painting import resolution_for
from tests.engines.serve.test_scheduler import number
from tests.engines.serve.test_served_bundle import started
from tests.helpers.served import WITH_DIFFUSION, FakeModel, ask, events, form, picture, serving, until

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
PAINT = {"prompt": "a cat", "decoder": "diffusion", "seed": 7, "resolution": 64, "steps": 4}


@pytest.fixture(scope="module")
def server():
    with serving(spec=WITH_DIFFUSION) as running:
        yield running


def image_of(item: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def test_a_painting_says_how_it_was_painted(server):
    answer = ask(server, GENERATE, PAINT).json
    settings = answer["star"]["settings"]
    assert {name: settings[name] for name in ("greedy", "decoder", "resolution", "steps")} == {
        "greedy": False,
        "decoder": "diffusion",
        "resolution": 64,
        "steps": 4,
    }
    assert (settings["text_guidance"], settings["image_guidance"]) == (4.5, 1.05)
    assert "vq_guidance" not in settings
    assert answer["size"] == answer["star"]["drawn_size"] == "64x64" and answer["star"]["notes"] == []
    assert image_of(answer["data"][0]).shape == (64, 64, 3)
    assert ask(server, GENERATE, PAINT).json["data"] == answer["data"]


@pytest.mark.parametrize(
    ("size", "resolution"),
    [(None, 1024), ((16, 16), 512), ((512, 512), 512), ((2000, 512), 512), ((513, 600), 1024)]
    + [((1024, 1024), 1024), ((2048, 2048), 1024)],
)
def test_a_size_is_painted_at_the_next_resolution_that_the_release_was_trained_for(size, resolution):
    assert resolution_for(size) == resolution


@pytest.mark.parametrize(
    ("size", "painted", "sent"),
    [("512x512", 512, 512), ("1024x1024", 1024, 1024), ("auto", 1024, 1024), ("100x300", 512, 100)],
)
def test_a_size_is_mapped_by_the_written_rule_and_what_differs_is_said(server, size, painted, sent):
    body = {"prompt": "a cat", "decoder": "diffusion", "steps": 1, "size": size}
    answer = ask(server, GENERATE, body).json
    assert answer["size"] == f"{sent}x{sent}" and image_of(answer["data"][0]).shape == (sent, sent, 3)
    assert answer["star"]["drawn_size"] == f"{painted}x{painted}"
    notes = [f"size: asked for {size}, drawn as {painted}x{painted}, sent as {sent}x{sent}"]
    assert answer["star"]["notes"] == ([] if painted == sent else notes)


def test_without_a_word_or_with_auto_the_vq_decoder_draws(server):
    before = server.model.painted
    for more in ({}, {"decoder": "auto"}, {"decoder": None}, {"decoder": "vq"}, {"size": "1024x1024"}):
        answer = ask(server, GENERATE, {"prompt": "a", "seed": 1, **more}).json
        assert answer["star"]["settings"]["decoder"] == "vq"
    assert server.model.painted == before


def test_each_image_has_a_seed_of_its_own_and_greedy_ones_too(server):
    three = ask(server, GENERATE, PAINT | {"n": 3}).json["data"]
    assert [item["seed"] for item in three] == [7, 8, 9]
    assert ask(server, GENERATE, PAINT | {"seed": 9}).json["data"] == three[2:]
    greedy = [ask(server, GENERATE, PAINT | {"greedy": True, "seed": seed}).json for seed in (7, 8)]
    (one, other) = (reply["data"][0] for reply in greedy)
    assert one["image_ids_sha256"] == other["image_ids_sha256"] and one["b64_json"] != other["b64_json"]
    assert [one["seed"], other["seed"]] == [7, 8] and greedy[0]["star"]["settings"]["greedy"]


def test_an_edit_takes_the_weight_of_its_image_tokens_from_a_form(server):
    fields = [("prompt", "blue"), ("decoder", "diffusion"), ("resolution", "64"), ("image", picture())]
    body, kind = form([*fields, ("steps", "2"), ("vq_guidance", "0.5")])
    settings = ask(server, EDIT, body, kind=kind).json["star"]["settings"]
    assert settings["vq_guidance"] == 0.5 and settings["text_guidance"] == 3.0
    body, kind = form([*fields, ("steps", "auto"), ("vq_guidance", "auto")])
    settings = ask(server, EDIT, body, kind=kind).json["star"]["settings"]
    assert (settings["steps"], settings["vq_guidance"]) == (50, 1.0)


def test_previews_are_those_of_the_steps_and_none_more(server):
    body = PAINT | {"steps": 8, "stream": True, "partial_images": 3}
    found = events(ask(server, GENERATE, body).data)
    assert [e["type"].rpartition(".")[2] for e in found] == ["partial_image"] * 3 + ["completed"]
    assert [image_of(e).max() for e in found[:-1]] == [2, 4, 6]
    assert [e["partial_image_index"] for e in found[:-1]] == [0, 1, 2]
    plain = ask(server, GENERATE, PAINT | {"steps": 8}).json["data"][0]
    assert found[-1]["b64_json"] == plain["b64_json"]


def test_a_prompt_that_is_cut_is_said(server):
    notes = ask(server, GENERATE, PAINT | {"prompt": "long"}).json["star"]["notes"]
    assert notes == ["prompt: the diffusion decoder did not read its last 7 tokens"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"decoder": "sdxl"}, "decoder"),
        ({"resolution": 500}, "resolution"),
        ({"resolution": 2048}, "resolution"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"text_guidance": 1e30}, "text_guidance"),
        ({"image_guidance": "much"}, "image_guidance"),
        ({"vq_guidance": 1}, "vq_guidance"),
        ({"decoder": "vq"}, "resolution"),
        ({"decoder": "auto", "resolution": None}, "steps"),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_by_name(server, body, param):
    reply = ask(server, GENERATE, PAINT | body)
    assert reply.status == 400 and reply.error["param"] == param


def test_the_range_of_a_resolution_is_told(server):
    told = ask(server, GENERATE, PAINT | {"resolution": 2048}).error["where"]
    assert told == "resolution: expected a whole number from 64 to 1024, got 2048"


def test_a_bundle_without_it_says_so_and_lists_what_it_has(server):
    star = ask(server, "/v1/models").json["data"][0]["star"]
    assert star["decoders"] == ["vq", "diffusion"] and star["resolutions"] == [512, 1024]
    with serving() as plain:
        reply = ask(plain, GENERATE, PAINT)
        assert reply.status == 400 and reply.error["param"] == "decoder"
        assert reply.error["what"] == "This bundle has no diffusion decoder"
        star = ask(plain, "/v1/models").json["data"][0]["star"]
        assert star["decoders"] == ["vq"] and star["resolutions"] == []
        assert ask(plain, GENERATE, {"prompt": "a", "decoder": "auto"}).status == 200


def test_a_painting_ends_within_a_step_when_its_client_has_gone():
    with serving(FakeModel(), spec=WITH_DIFFUSION) as server:
        for stream in (False, True):
            server.model.step_s, begun = 0.1, server.model.painted + 1
            body = json.dumps(PAINT | {"steps": 1000, "stream": stream})
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", GENERATE, body, {"Content-Type": "application/json"})
            until(lambda begun=begun: server.model.painted >= begun)
            before = server.model.painted
            connection.close()
            until(lambda: number(server, "star_drawing") == 0)
            assert server.model.painted - before <= 3
        assert number(server, "star_paintings_total") == 0
        server.model.step_s, before = 0.0, number(server, "star_painting_steps_total")
        assert ask(server, GENERATE, PAINT).status == 200
        assert number(server, "star_paintings_total") == 1
        assert number(server, "star_painting_steps_total") - before == 4


def test_paintings_take_turns_with_what_is_drawn_together():
    model = FakeModel(hold=threading.Event())
    with serving(model, spec=WITH_DIFFUSION) as server, ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask, server, GENERATE, {"prompt": "first"})
        until(lambda: model.batches)
        bodies = [PAINT, {"prompt": "a", "seed": 1}, PAINT | {"seed": 8}, {"prompt": "b", "seed": 2}]
        replies = [
            pool.submit(ask, server, GENERATE, body | {"user": str(i)}) for i, body in enumerate(bodies)
        ]
        until(lambda: number(server, "star_waiting") == 4)
        model.hold.set()
        together = [reply.result().json["star"]["drawn_together"] for reply in replies]
        assert first.result().status == 200 and together == [1, 2, 1, 2]


def test_a_served_painting_is_that_of_the_runtime(diffusion_bundle):
    server, data = started(diffusion_bundle), picture(60, 40)
    painting = Painting(64, steps=3)
    try:
        with Star(diffusion_bundle) as star:
            wanted = star.generate("a cat", seed=8, painting=painting)
            reply = ask(server, GENERATE, PAINT | {"steps": 3, "n": 2}).json
            np.testing.assert_array_equal(image_of(reply["data"][1]), wanted.images[0])
            image = image_from_bytes(data, where="test")
            body = {"prompt": "blue", "seed": 5, "image": base64.b64encode(data).decode()}
            edited = star.edit(image, "blue", seed=5, painting=replace(painting, vq_guidance=0.5))
            body |= {"decoder": "diffusion", "resolution": 64, "steps": 3, "vq_guidance": 0.5}
            reply = ask(server, EDIT, body).json
            np.testing.assert_array_equal(image_of(reply["data"][0]), edited.images[0])
            greedy = star.generate("a cat", seed=7, greedy=True, painting=painting)
            found = events(ask(server, GENERATE, PAINT | {"steps": 3, "greedy": True, "stream": True}).data)
            np.testing.assert_array_equal(image_of(found[-1]), greedy.images[0])
            assert len(found) == 3 and not np.array_equal(image_of(found[0]), image_of(found[-1]))
        reply = ask(server, GENERATE, PAINT | {"prompt": "a <bos> cat"})
        assert reply.status == 400 and "text encoder" in reply.error["what"]
    finally:
        server.stop()
        server.thread.join(60)


def test_the_caption_is_checked_before_anything_is_drawn(diffusion_bundle):
    with Star(diffusion_bundle) as star, pytest.raises(InputError, match="text encoder"):
        Together(star).generation("a <bos> cat", painting=Painting(64))
