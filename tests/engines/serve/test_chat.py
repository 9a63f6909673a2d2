"""Questions over HTTP: text and picture parts, whole answers and streamed ones."""

from __future__ import annotations

import base64

import pytest

from tests.helpers.served import ask, events, picture, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def shown(width: int) -> dict:
    url = f"data:image/png;base64,{base64.b64encode(picture(width)).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def test_the_last_question_is_answered_about_the_last_picture(server):
    messages = [
        {"role": "system", "content": "You are helpful."},
        user({"type": "text", "text": "what is this?"}, shown(50)),
        {"role": "assistant", "content": "a cat"},
        user(shown(60), {"type": "text", "text": "and this?"}),
        {"role": "user", "content": "what colour?"},
    ]
    answer = ask(server, CHAT, {"model": "gpt-4o", "messages": messages}).json
    assert answer["choices"][0]["message"]["content"] == "60x30 is what colour?"
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["model"] == "fake"
    assert answer["usage"]["total_tokens"] == 5 + answer["usage"]["completion_tokens"]
    assert len(answer["star"]["ids_sha256"]) == 64 and answer["star"]["tokens_per_forward"] == 1
    assert "only the last question and the last picture are answered" in answer["star"]["notes"]


def test_a_streamed_answer_is_the_whole_one_in_pieces(server):
    body = {"messages": [{"role": "user", "content": "what?"}], "stream": True}
    found = events(ask(server, CHAT, body | {"stream_options": {"include_usage": True}}).data)
    assert found[-1] == "[DONE]" and found[-2]["choices"] == [] and found[-2]["usage"]["prompt_tokens"] == 5
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found[:-2])
    assert text == "no picture is what?" and len(found) > 5
    assert found[-3]["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in str(events(ask(server, CHAT, body).data))


def test_an_answer_is_cut_where_it_was_asked_to_be(server):
    body = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 4}
    assert ask(server, CHAT, body).json["choices"][0]["message"]["content"] == "no p"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [3],
        [{"content": "a"}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": 5}],
        [user({"type": "input_audio", "input_audio": {}})],
        [user({"type": "image_url", "image_url": {}})],
        [user({"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://a/b.png"}})],
        [user({"type": "text", "text": "a" * 40_000})],
        [{"role": "user", "content": "a" * 40_000}],
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_that_ask_nothing_are_refused(server, messages):
    reply = ask(server, CHAT, {"messages": messages})
    assert reply.status == 400 and reply.error["param"].startswith("messages")


def test_a_field_that_nobody_knows_is_refused_and_sampling_is_named(server):
    body = {"messages": [{"role": "user", "content": "what?"}]}
    assert ask(server, CHAT, body | {"tempurature": 1}).error["param"] == "tempurature"
    assert ask(server, CHAT, body | {"temperature": 1}).json["star"]["notes"] == ["temperature has no effect"]
