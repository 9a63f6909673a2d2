"""The official client of OpenAI draws, edits, asks and streams, and raises its own errors."""

from __future__ import annotations

import base64

import openai
import pytest

from tests.helpers.served import ask, picture, serving


@pytest.fixture(scope="module")
def server():
    with serving(api_key="k" * 20) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k" * 20, max_retries=0) as made:
        yield made


def test_it_draws(client):
    answer = client.images.generate(
        prompt="a cat", n=2, size="1024x1024", quality="high", extra_body={"seed": 5}
    )
    assert [item.seed for item in answer.data] == [5, 6] and answer.size == "1024x1024"
    assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG") and answer.star["seed"] == 5


def test_it_streams_previews(client):
    stream = client.images.generate(prompt="a cat", stream=True, partial_images=2)
    kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_it_edits(client):
    answer = client.images.edit(image=("cat.png", picture(), "image/png"), prompt="make it blue")
    assert len(answer.data) == 1
    stream = client.images.edit(image=[("a.png", picture())], prompt="blue", stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_it_asks_and_streams_an_answer(client):
    url = f"data:image/png;base64,{base64.b64encode(picture(70)).decode()}"
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": "fake", "messages": [{"role": "user", "content": parts}]}
    assert client.chat.completions.create(**asked).choices[0].message.content == "70x30 is what?"
    chunks = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "70x30 is what?"


def test_it_lists_the_one_model(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("anything").id == "fake"


def test_it_raises_its_own_errors(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", n=50)
    assert caught.value.param == "n" and "expected a whole number from 1 to 10" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="There is no such field"):
        client.images.generate(prompt="a", extra_body={"colour": "red"})
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError, match="key"):
        stranger.images.generate(prompt="a")
    with pytest.raises(openai.APIError, match="The prompt is refused"):
        list(client.images.generate(prompt="refuse", stream=True))


# What Open WebUI sends: backend/open_webui/routers/images.py and its chat, with aiohttp.
def test_the_requests_of_open_webui(server):
    key = {"Authorization": "Bearer " + "k" * 20}
    drawn = b'{"model": "dall-e-3", "prompt": "a red cat", "n": 1, "size": "512x512", '
    drawn += b'"response_format": "b64_json"}'
    reply = ask(server, "/v1/images/generations", drawn, **key)
    assert reply.status == 200 and reply.json["data"][0]["b64_json"] and reply.json["size"] == "512x512"
    body = (
        b'--0a1b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="model"'
        b"\r\n\r\ngpt-image-1\r\n"
        b'--0a1b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="prompt"'
        b"\r\n\r\nmake it blue\r\n"
        b'--0a1b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="n"'
        b"\r\n\r\n1\r\n"
        b'--0a1b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="size"'
        b"\r\n\r\n512x512\r\n"
        b"--0a1b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; "
        b'name="response_format"\r\n\r\nb64_json\r\n'
        b'--0a1b\r\nContent-Type: image/png\r\nContent-Disposition: form-data; name="image[]"; '
        b'filename="6e0c.png"\r\n\r\n' + picture() + b"\r\n--0a1b--\r\n"
    )
    reply = ask(server, "/v1/images/edits", body, kind="multipart/form-data; boundary=0a1b", **key)
    assert reply.status == 200 and reply.json["data"][0]["b64_json"]
    reply = ask(
        server,
        "/v1/images/edits",
        body.replace(b'"image[]"', b'"image"'),
        kind="multipart/form-data; boundary=0a1b",
        **key,
    )
    assert reply.status == 200
    url = base64.b64encode(picture()).decode()
    chat = {
        "stream": True,
        "model": "STAR-Nano",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it?"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}},
                ],
            }
        ],
        "stream_options": {"include_usage": True},
    }
    assert ask(server, "/v1/chat/completions", chat, **key).data.endswith(b"data: [DONE]\n\n")
    assert ask(server, "/v1/models", **key).json["data"][0]["id"] == "fake"


# What LibreChat sends: api/app/clients/tools/structured/OpenAIImageTools.js, and its agents' chat.
def test_the_requests_of_librechat(server):
    key = {"Authorization": "Bearer " + "k" * 20}
    drawn = (
        b'{"model":"gpt-image-1","prompt":"a red cat","n":1,"background":"auto","output_format":"png",'
        b'"quality":"auto","size":"auto"}'
    )
    reply = ask(server, "/v1/images/generations", drawn, **key)
    assert reply.status == 200 and reply.json["data"][0]["b64_json"]
    webp = b'{"model":"gpt-image-1","prompt":"a","n":1,"background":"transparent","output_format":"webp",'
    webp += b'"output_compression":100,"quality":"auto","size":"1024x1024"}'
    assert ask(server, "/v1/images/generations", webp, **key).status == 200
    edge = "--------------------------515890814546601021194782"
    fields = [("model", "gpt-image-1"), ("prompt", "make it blue"), ("quality", "auto"), ("size", "auto")]
    body = b"".join(
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields
    )
    body += (
        f'--{edge}\r\nContent-Disposition: form-data; name="image[]"; filename="cat.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    body += picture() + f"\r\n--{edge}--\r\n".encode()
    kind = f"multipart/form-data; boundary={edge}"
    reply = ask(server, "/v1/images/edits", body, kind=kind, **key)
    assert reply.status == 200 and reply.json["data"][0]["b64_json"]
    chat = b'{"model":"STAR-Nano","temperature":1,"top_p":1,"presence_penalty":0,"frequency_penalty":0,"n":1,'
    chat += (
        b'"stream":true,"stream_options":{"include_usage":true},"user":"6650f","messages":[{"role":"user",'
    )
    chat += b'"content":"what is a dog?"}]}'
    assert ask(server, "/v1/chat/completions", chat, **key).data.endswith(b"data: [DONE]\n\n")
