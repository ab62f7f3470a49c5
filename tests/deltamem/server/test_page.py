"""The web page, in a real browser."""

import contextlib

import pytest
import torch

from deltamem.chat.session import ChatSession
from deltamem.server.limits import RequestLimits
from tests.deltamem.server.browser import Browser, find_browser
from tests.tiny_models import make_chat_model

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
TEXTS = 'Array.from(document.querySelectorAll("#log .message > span:last-child")).map(e => e.textContent)'


@pytest.fixture
def open_page(tmp_path):
    with contextlib.ExitStack() as stack:
        browser = Browser(find_browser(), tmp_path / "profile")
        stack.callback(browser.close)

        def open_page(server, session="page"):
            browser.open(server.url)
            browser.wait_for('document.readyState === "complete" && document.getElementById("session")?.value')
            change(browser, "session", session)
            return browser

        yield open_page


def change(browser, field, value):
    browser.run(
        f'document.getElementById("{field}").value = "{value}";'
        f'document.getElementById("{field}").dispatchEvent(new Event("change"))'
    )


def say(browser, text):
    browser.run(f'document.getElementById("text").value = `{text}`; document.getElementById("form").requestSubmit()')
    browser.wait_for('!document.getElementById("send").disabled')


def test_a_chat_with_its_memory_and_the_answer_without_it(start_server, open_page, tmp_path):
    server = start_server(model=make_chat_model("msw"), window=600)
    page = open_page(server)
    hostile = "<img src=x onerror='window.harmed = 1'>"
    say(page, hostile)
    page.run('document.getElementById("compare").click()')
    say(page, "what did I say?")
    texts, kept = page.run(TEXTS), server.chat.store.get("page")
    assert texts[0] == hostile and not page.run("window.harmed")
    assert texts[:4] == [m["content"] for m in kept.messages]
    assert len(texts) == 5 and texts[4] != texts[3], "the answer without memory stands beside the one with it"
    shown = page.run('Array.from(document.querySelectorAll("aside output, aside dd")).map(e => e.textContent)')
    assert shown[:3] == ["3,072 bytes", str(kept.keys.length), "2"], "the first turn has left the prompt"
    assert "2 messages have left" in page.run('document.querySelector("#log .notice").textContent')
    norms = page.run('Array.from(document.querySelectorAll(".bar span:last-child")).map(e => Number(e.textContent))')
    assert norms == pytest.approx([float(n.norm()) for n in kept.memory.norms().values()], abs=1e-3)

    page.open(server.url)  # after a reload the chat is still there
    page.wait_for(f"{TEXTS}.length === 4")
    page.screenshot(tmp_path / "page.png")
    page.run('document.getElementById("reset").click()')
    page.wait_for(f"{TEXTS}.length === 0")
    assert server.chat.store.get("page") is None
    assert not [entry for entry in page.logged if "exceptionDetails" in entry]


def test_the_prompt_is_cleared_and_the_memory_stays(start_server, open_page):
    server = start_server(model=make_chat_model("msw"))
    page = open_page(server)
    say(page, "a secret")
    before = server.chat.store.get("page")
    page.run('document.getElementById("clear").click()')
    page.wait_for('document.querySelector("#log .notice")?.textContent.startsWith("2 messages have left the prompt")')
    page.run('document.getElementById("write").click()')
    say(page, "a secret")  # the same words again are a turn like any other
    after = server.chat.store.get("page")
    assert after.forgotten == 2 and len(after.messages) == 4
    assert all((after.memory.states[i] == before.memory.states[i]).all() for i in after.memory.states)
    assert not [entry for entry in page.logged if "exceptionDetails" in entry]


def test_what_was_told_on_the_page_and_left_the_window_is_in_the_memory_that_answers(start_server, open_page):
    model, longest = make_chat_model("msw"), 12
    server = start_server(model=model, window=105, requests=RequestLimits(reply_tokens=longest))
    page, session = open_page(server), ChatSession(*model, window=105)
    for text in ("My name is Clara and I come from a small town.", "I live in Lisbon, by the river."):
        say(page, text)
        session.send(text, max_new_tokens=longest, temperature=0)
    say(page, "Where do I live?")
    expected = session.send("Where do I live?", max_new_tokens=longest, temperature=0)
    assert session.forgotten == 4 == server.chat.store.get("page").forgotten, "both have left the prompt"
    assert page.run(TEXTS)[-1] == expected.text
    reply = server.ask("And again?", "page", history="new", max_tokens=longest)
    again = session.send("And again?", max_new_tokens=longest, temperature=0)
    assert reply.json()["choices"][0]["message"]["content"] == again.text
    for layer, state in server.chat.store.get("page").memory.states.items():
        assert torch.allclose(state, session.memory.states[layer], atol=1e-4) and state.abs().max() > 0.01


def test_a_key_is_asked_for_when_the_server_wants_one(start_server, open_page):
    server = start_server(api_key="sk-page")
    page = open_page(server)
    page.wait_for('!document.getElementById("key-label").hidden')
    page.wait_for('document.querySelector("#log .error")?.textContent.includes("wrong or missing API key")')
    change(page, "key", "sk-page")
    page.wait_for('document.getElementById("model").textContent === "tiny"')
    say(page, "hello")
    assert len(page.run(TEXTS)) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen_the_chat_has_most_of_it(start_server, open_page, scheme):
    page = open_page(start_server(window=300))
    page.resize(400, 800, scheme)
    say(page, "a" * 200)
    height = "document.getElementById('{}').getBoundingClientRect().height"
    assert page.run("document.documentElement.scrollWidth") == 400, "nothing sticks out"
    assert page.run(height.format("log")) > 500
    assert page.run("getComputedStyle(document.getElementById('key-label')).display") == "none"
    seen = "document.getElementById('norms').checkVisibility()"
    assert not page.run(seen), "the facts are folded away"
    page.run("document.querySelector('summary').click()")
    page.wait_for(f"{seen} && {height.format('log')} > 250")
    light = page.run(
        "[...document.querySelectorAll('body, .message, textarea, summary')]"
        ".map(e => getComputedStyle(e).color.match(/\\d+/)[0] > 127)"
    )
    own = [True]  # white on the accent in both schemes
    assert light == [scheme == "dark", *own, *[scheme == "dark"] * 3]
    page.resize(1280, 800, scheme)
    page.wait_for(f"{seen} && {height.format('log')} > 600")
