"""A browser drives the page: draw with previews, edit, ask, cancel, reload, and again from a link."""

from __future__ import annotations

import base64

import pytest

from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.served import WITH_DIFFUSION, FakeModel, picture, serving

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
DONE = "!document.getElementById('go').disabled"
DROP = """(() => {{
  const bytes = Uint8Array.from(atob("{data}"), c => c.charCodeAt(0)), given = new DataTransfer();
  given.items.add(new File([bytes], "p.png", {{type: "{kind}"}}));
  document.dispatchEvent(new DragEvent("drop", {{dataTransfer: given, cancelable: true}}));
}})()"""


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened
        assert opened.errors == []


@pytest.fixture
def server():
    with serving(FakeModel(step_s=0.02)) as running:
        yield running


def ask(page, text: str, *, task: str = "draw", **fields) -> None:
    page.value(f"document.querySelector('[value={task}]').click()")
    for name, value in {"prompt": text, "seed": "", **fields}.items():
        page.value(f"document.getElementById({name!r}).value = {value!r}")
    page.value("document.getElementById('prompt').focus()")
    page.key("Enter", code=13, control=True)


def test_an_image_is_drawn_with_previews_by_the_keyboard_alone(page, server):
    page.go(server.url)
    page.until("document.getElementById('about').textContent.includes('fake')")
    page.value("document.getElementById('prompt').focus()")
    page.type("a <b>cat</b>")
    page.key("Tab", code=9)
    page.type("7")
    page.value(
        "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('#pictures img')"
        ".forEach(i => window.seen.add(i.src))).observe(document.getElementById('pictures'),"
        " {subtree: true, childList: true, attributes: true}) || true"
    )
    page.key("Enter", code=13, control=True)
    page.until("document.querySelectorAll('#past li').length === 1")
    assert page.value("window.seen.size") >= 3 and "seed 7" in page.text()
    assert page.value("document.querySelector('#past p').textContent") == "a <b>cat</b>"
    assert page.value("document.querySelector('#past a[download]').download") == "star-7.png"
    assert page.value("document.querySelector('#pictures img').naturalWidth") == 64


def test_a_link_draws_the_same_image_again(page, server):
    page.go(server.url)
    ask(page, "a cat", seed="9", guidance="2.5")
    page.until("document.querySelectorAll('#past li').length === 1 && " + DONE)
    first = page.value("document.querySelector('#pictures img').src")
    page.value("[...document.querySelectorAll('#past a')].at(-1).click()")
    page.until("location.hash.includes('seed=9')")
    page.call("Page.reload")
    page.until("document.readyState === 'complete' && document.querySelectorAll('#past li').length === 1")
    assert page.value("document.getElementById('prompt').value") == "a cat"
    assert page.value("document.getElementById('guidance').value") == "2.5"
    page.key("Enter", code=13, control=True)
    page.until("document.querySelectorAll('#past li').length === 2 && " + DONE)
    assert page.value("document.querySelector('#pictures img').src") == first


def test_a_bundle_with_two_decoders_lets_choose_and_a_link_repeats_the_choice(page, server):
    page.go(server.url)
    page.until("document.getElementById('about').textContent.includes('fake')")
    assert page.value(
        "document.getElementById('decoding').hidden && document.getElementById('painting').hidden"
    )
    with serving(FakeModel(), spec=WITH_DIFFUSION) as other:
        page.go(other.url)
        page.until("!document.getElementById('decoding').hidden")
        page.value("document.querySelector('details').open = true")
        page.value("$('decoder').value = 'diffusion', show()")
        assert page.value("$('steps').checkVisibility() && !$('vq_guidance').checkVisibility()")
        ask(page, "a cat", seed="9", size="512x512", steps="9", text_guidance="2.5")
        page.until("document.querySelectorAll('#past li').length === 1 && " + DONE)
        assert other.model.painted == 9
        assert page.value("document.querySelector('#pictures img').naturalWidth") == 512
        link = page.value("[...document.querySelectorAll('#past a')].at(-1).hash")
        assert all(part in link for part in ("decoder=diffusion", "steps=9", "text_guidance=2.5", "seed=9"))
        page.value("$('decoder').value = 'vq', $('steps').value = ''")
        page.value("[...document.querySelectorAll('#past a')].at(-1).click()")
        page.until("$('decoder').value === 'diffusion' && $('steps').value === '9'")
        page.value("document.querySelector('[value=edit]').click()")
        assert page.value("$('vq_guidance').checkVisibility()")
        page.value("form.reset(), show()")


def test_a_dropped_picture_is_edited_and_asked_about(page, server):
    page.go(server.url)
    page.value(DROP.format(data=base64.b64encode(picture(70)).decode(), kind="image/png"))
    page.until("document.getElementById('shown').naturalWidth === 70")
    assert page.value("document.querySelector('[name=task]:checked').value") == "edit"
    ask(page, "make it blue", task="edit", seed="3")
    page.until("document.getElementById('past').textContent.includes('make it blue') && " + DONE)
    ask(page, "what is it?", task="ask")
    page.until("document.getElementById('answer').textContent === '70x30 is what is it?' && " + DONE)
    page.value(DROP.format(data="AAAA", kind="text/html"))
    page.until("document.getElementById('message').textContent.includes('no PNG')")


def test_a_draw_is_cancelled_with_a_key_or_the_button(page, server):
    server.model.step_s = 0.3
    page.go(server.url)
    for cancel in (lambda: page.key("Escape", code=27), lambda: page.value("$('cancel').click()")):
        ask(page, "a cat")
        page.until("!document.getElementById('cancel').disabled")
        cancel()
        page.until("document.getElementById('status').textContent === 'Cancelled.' && " + DONE)


def test_an_error_is_told_in_its_three_parts(page, server):
    page.go(server.url)
    ask(page, "refuse")
    page.until("document.getElementById('message').textContent.startsWith('The prompt is refused')")
    assert "change it" in page.value("document.getElementById('message').textContent")


def test_a_setting_that_is_no_number_is_told_and_not_sent(page, server):
    page.go(server.url)
    ask(page, "a cat", guidance="1,5")
    page.until("document.getElementById('message').textContent.includes('guidance: expected a number')")
    assert server.model.batches == []
    page.value("document.getElementById('guidance').value = ''")


def test_a_key_is_asked_for_where_one_is_needed(page):
    with serving(api_key="k" * 20) as server:
        page.go(server.url)
        assert page.value("document.getElementById('key-field').hidden")
        ask(page, "a cat")
        page.until("!document.getElementById('key-field').hidden && " + DONE)
        ask(page, "a cat", key="k" * 20)
        page.until("document.querySelectorAll('#past li').length === 1")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_is_cut_off_and_all_is_large_enough_for_a_finger(page, server, width):
    page.size(width)
    page.go(server.url)
    ask(page, "a " + "very" * 40 + " long word", seed="1")
    page.until("document.querySelectorAll('#past li').length === 1 && " + DONE)
    assert page.value("document.scrollingElement.scrollWidth") <= width
    small = """[...document.querySelectorAll('button, .button, .tasks span, input, summary')]
      .filter(e => e.checkVisibility() && e.type !== 'radio' && e.type !== 'checkbox')
      .filter(e => e.getBoundingClientRect().height < 40).map(e => e.outerHTML)"""
    assert page.value(small) == []
