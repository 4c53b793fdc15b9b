"""The page in a real browser: a prompt at every budget side by side, errors in words, nothing from elsewhere."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright")
pytest.importorskip("starlette")

from headless import ARGUMENTS, CHROMIUM
from playwright.sync_api import expect, sync_playwright

if CHROMIUM is None:
    pytest.skip("no chromium on this host: apt-get install chromium", allow_module_level=True)
SIZES = {"phone": (390, 844), "desk": (1280, 900)}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, server, request):
    """(page, what it complained about, what it asked for)."""
    size = dict(zip(("width", "height"), SIZES[getattr(request, "param", "desk")], strict=True))
    context = browser.new_context(viewport=size)
    page = context.new_page()
    heard, asked = [], []
    page.on("console", lambda message: heard.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("request", lambda each: asked.append(each.url))
    page.goto(server.address)
    page.wait_for_selector("figure[data-budget=full]")
    yield page, heard, asked
    context.close()


@pytest.mark.parametrize("opened", SIZES, indirect=True)
def test_a_prompt_at_every_budget(opened, server):
    page, heard, asked = opened
    assert page.title() == "small – otcache" and "4 × 4 pixels" in page.inner_text("#about")
    page.fill("#prompt", "a red ring & <b>a star</b>")
    page.fill("[name=seed]", "7")
    page.keyboard.press("Enter")
    expect(page.locator("figure img")).to_have_count(3, timeout=30_000)
    expect(page.locator("#draw")).to_be_enabled()
    shown = page.evaluate("""() => [...document.querySelectorAll('figure')].map(
        f => [f.dataset.budget, f.querySelector('img').naturalWidth, f.innerText])""")
    assert [(budget, width) for budget, width, _ in shown] == [("2", 4), ("3", 4), ("full", 4)]
    assert all("drawn in " in text and "evaluations" in text for *_, text in shown)
    assert page.locator("figure b").count() == 0
    queries = [url for url in asked if "/picture" in url]
    assert len(queries) == 3 and all("seed=7" in url and "minimum_budget=" in url for url in queries)
    assert all(url.startswith((server.address, f"blob:{server.address}", "data:")) for url in asked)
    width, page_width = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert page_width == width and heard == []


def test_a_refusal_is_shown_in_its_words(opened):
    page, heard, _ = opened
    page.fill("#prompt", "a")
    page.fill("[name=seed]", "99999999999999999999")
    page.click("#draw")
    expect(page.locator("figure .error")).to_have_count(3)
    assert "seed is 99999999999999999999: expected" in page.inner_text("figure[data-budget='2']")
    assert page.locator("figure img").count() == 0
    assert all("400" in line for line in heard), "the browser's own note of each answer alone"


def test_it_asks_for_a_prompt(opened):
    page, _, asked = opened
    page.click("#draw")
    assert not [url for url in asked if "/picture" in url]
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.evaluate("[...document.querySelectorAll('input')].every(i => i.labels.length === 1)")
