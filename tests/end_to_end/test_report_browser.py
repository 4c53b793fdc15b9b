"""The report in a real browser: no error, no request, every picture there, no sideways scrolling, and it prints."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("ot")
pytest.importorskip("playwright")

from headless import ARGUMENTS, CHROMIUM
from playwright.sync_api import sync_playwright
from report_samples import EXTREME, written

if CHROMIUM is None:
    pytest.skip("no chromium on this host: apt-get install chromium", allow_module_level=True)
SIZES = {"phone": (390, 844), "desk": (1280, 900)}
LEAST_TEXT_PX = 10
"""Of text in figures on a phone, where body text is 16."""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(compiled, tmp_path_factory):
    """A compiled artifact's report, and one that is hard to lay out."""
    extreme = written(tmp_path_factory.mktemp("extreme"), **EXTREME)
    return {"compiled": compiled / "report.html", "extreme": extreme / "report.html"}


@pytest.fixture
def opened(browser, pages, request):
    """(page, what it complained about and asked for), at a size, with or without JavaScript."""
    name, size, script = request.param
    context = browser.new_context(
        viewport=dict(zip(("width", "height"), SIZES[size], strict=True)), java_script_enabled=script
    )
    page = context.new_page()
    heard = []
    page.on("console", lambda message: heard.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("request", lambda each: heard.append(each.url) if not each.url.startswith("data:") else None)
    page.on("requestfailed", lambda each: heard.append(f"failed: {each.url[:80]}"))
    page.goto(pages[name].as_uri())
    page.wait_for_load_state("networkidle")
    yield page, heard
    context.close()


CASES = [(name, size, True) for name in ("compiled", "extreme") for size in SIZES]


@pytest.mark.parametrize(
    "opened", [*CASES, ("compiled", "phone", False)], indirect=True, ids=lambda case: "-".join(map(str, case))
)
def test_no_error_and_no_request(opened):
    page, heard = opened
    assert heard == [page.url], "the page itself is all that is asked for"


@pytest.mark.parametrize("opened", CASES, indirect=True, ids=lambda case: "-".join(map(str, case)))
def test_pictures_are_there_and_nothing_scrolls_sideways(opened):
    page, _ = opened
    images = page.evaluate("""async () => {
        await Promise.all([...document.images].map(image => image.decode()));
        return [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.alt.length]);
    }""")
    assert len(images) > 10 and all(natural > 0 and shown > 0 and alt > 8 for natural, shown, alt in images)
    width, page_width = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    assert page_width == width
    outside = page.evaluate("""() => [...document.querySelectorAll('body *')]
        .filter(e => !e.closest('.scroll'))
        .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))""")
    assert outside == [], "what is wide is in a box of its own"
    page.evaluate("window.scrollTo(1000, 0)")
    assert page.evaluate("window.scrollX") == 0


@pytest.mark.parametrize("opened", [("compiled", "phone", True)], indirect=True)
def test_it_can_be_read_on_a_phone(opened):
    page, _ = opened
    smallest = page.evaluate("""() => Math.min(...[...document.querySelectorAll('p, td, th, figcaption, li, a')]
        .map(e => parseFloat(getComputedStyle(e).fontSize)))""")
    assert smallest >= 12
    figures = page.evaluate("[...document.querySelectorAll('figure > img')].map(i => i.clientWidth / i.naturalWidth)")
    text_px = [11 * 200 / 72 * scale for scale in figures]  # figures.STYLE's size at figures.DPI
    assert figures and min(text_px) >= LEAST_TEXT_PX
    boxes = page.evaluate("""() => [...document.querySelectorAll('.scroll')]
        .map(e => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX, e.tabIndex,
                   e.getAttribute('aria-label')])""")
    assert all(overflow == "auto" and tab == 0 and label for _, overflow, tab, label in boxes)
    assert any(wide for wide, *_ in boxes), "a table that is too wide scrolls in its box"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A", "the sections can be reached by keyboard"


@pytest.mark.parametrize("opened", [("compiled", "desk", True), ("extreme", "desk", True)], indirect=True)
def test_it_prints(opened, tmp_path):
    page, heard = opened
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 between its margins
    cut = page.evaluate("""() => [...document.querySelectorAll('img, h2, p')]
        .filter(e => e.getBoundingClientRect().right > 704).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))""")
    assert cut == [] and page.locator("nav").is_hidden()
    path = tmp_path / "report.pdf"
    page.pdf(path=str(path), format="A4")
    data = path.read_bytes()
    assert data.startswith(b"%PDF-") and data.count(b"/Subtype /Image") >= 8 and data.count(b"/Type /Page\n") >= 3
    assert heard == [page.url]
