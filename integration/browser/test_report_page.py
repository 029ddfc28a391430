"""The page of a report in a browser: it asks for nothing, sorts, filters, and can be read on a phone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed here")
pytest.importorskip("jinja2", reason="jinja2 is not installed here")

ROOT = Path(__file__).parents[2]
LAYERS = 53

CHROMIUM = os.environ.get("QFT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const c = parse(getComputedStyle(at).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll("body *:not(svg *):not(script):not(style)")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((p, q) => q - p);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${e.tagName}.${e.className}: ${(a + 0.05) / (b + 0.05)}`);
  }
  return low;
}"""
"""Lists the elements with text whose contrast is below 4.5, the limit of WCAG AA."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write the page of a MobileNetV2."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    # A process of its own: the unit tests' modules stay out of this one.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT), str(ROOT / "tests")])}
    subprocess.run(
        [sys.executable, ROOT / "tests" / "mobile_report.py", path], check=True, env=environment, timeout=300
    )
    return path


@pytest.fixture(scope="module")
def browser():
    """Start the browser."""
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, file):
    """Return a function that opens the page; what it says and asks for must be nothing."""
    said, asked, contexts = [], [], []

    def on_request(route):
        asked.append(route.request.url)
        route.continue_()

    def open_page(*, anchor="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1120, "height": 900}, **settings})
        contexts.append(context)
        context.route("**/*", on_request)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri() + anchor)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {re.sub("#.*", "", url) for url in asked} == {file.as_uri()}


def names(page):
    """List the names in the table, without hidden rows."""
    return page.eval_on_selector_all(
        "#table tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[1].querySelector('a').textContent)"
    )


def column(page, number):
    """List the numbers in a column of the table."""
    return [
        float(value)
        for value in page.eval_on_selector_all(
            "#table tbody tr", f"rows => rows.map(r => r.cells[{number}].dataset.v ?? r.cells[{number}].textContent)"
        )
    ]


def test_the_page_opens_and_asks_for_nothing(opened):
    """All layers are there, in the order of execution; the fixture looks at requests and the console."""
    page = opened()
    assert page.title() == "QFT report: MobileNetV2"
    found = names(page)
    assert len(found) == LAYERS
    assert (found[0], found[-1]) == ("features.0.0", "classifier.1")
    assert page.locator("#shown").inner_text() == "53 of 53 layers"


def test_the_policy_stops_requests(browser, file):
    """A script that asked for something outside would be refused before anything is sent."""
    page = browser.new_page()
    asked = []
    page.route("**/*", lambda route: (asked.append(route.request.url), route.continue_()))
    page.goto(file.as_uri())
    outcome = page.evaluate("fetch('https://example.org/').then(() => 'sent', error => error.name)")
    page.close()
    assert outcome == "TypeError"
    assert asked == [file.as_uri()]


def test_a_click_sorts(opened):
    """First the largest, then the smallest; what is sorted by is said to screen readers."""
    page = opened()
    header = page.locator("#table thead th", has_text="loss only it")
    place = header.evaluate("h => h.cellIndex")
    before = column(page, place)
    header.get_by_role("button").click()
    assert column(page, place) == sorted(before, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    header.get_by_role("button").click()
    assert column(page, place) == sorted(before)
    assert header.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="#").click()
    assert column(page, 0) == list(range(1, LAYERS + 1))
    assert header.get_attribute("aria-sort") == "none"


def test_names_are_sorted_as_people_count(opened):
    """features.2 comes before features.10."""
    page = opened()
    page.get_by_role("button", name="name").click()
    found = names(page)
    assert found[0] == "classifier.1"
    assert found.index("features.2.conv.2") < found.index("features.10.conv.2")


def test_the_keyboard_does_all(opened):
    """The first stop skips to the result, headers sort, and where the focus is can be seen."""
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    button = page.get_by_role("button", name="weights")
    button.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert names(page)[0] == "classifier.1"
    page.keyboard.press("Space")
    assert names(page)[-1] == "classifier.1"


def test_text_and_bits_filter(opened):
    """Rows and fold-outs are filtered alike, and how many are shown is said."""
    page = opened()
    page.get_by_label("Name or kind").fill("Features.3.")
    assert names(page) == ["features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2"]
    assert page.locator("#shown").inner_text() == "3 of 53 layers"
    assert page.locator("details:visible").count() == 3
    page.get_by_label("Name or kind").fill("")
    page.get_by_role("combobox", name="Bits").select_option("8")
    assert len(names(page)) == 2
    page.get_by_label("Name or kind").fill("linear")
    assert names(page) == []
    page.get_by_role("combobox", name="Bits").select_option("")
    assert names(page) == ["classifier.1"]


def test_links_open_the_fold_out(opened):
    """From the table, from the graph, and from outside, even where a filter hides it."""
    page = opened()
    page.locator("#table a", has_text="features.7.conv.1.0").click()
    page.wait_for_selector("#layer-20[open] svg")
    assert page.evaluate("document.activeElement.parentNode.id") == "layer-20"
    page.locator("#graph a[href='#layer-3']").click()
    page.wait_for_selector("#layer-3[open]")
    assert opened(anchor="#layer-53").locator("#layer-53[open]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(opened, scheme):
    """All texts have the contrast of WCAG AA, and dark is dark."""
    page = opened(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate(CONTRAST) == []
    red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red < 40) == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 700, 1400])
def test_the_page_never_scrolls_sideways(opened, width):
    """Wide tables and pictures scroll in their own box, which the keyboard can reach."""
    page = opened(viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = "boxes => boxes.filter(b => b.scrollWidth > b.clientWidth).map(b => b.tabIndex)"
    found = page.eval_on_selector_all(".scroll", boxes)
    assert set(found) == {0}
    outside = "boxes => boxes.filter(b => b.getBoundingClientRect().right > innerWidth).length"
    assert page.eval_on_selector_all("section, figure, .scroll, details, .tiles > div", outside) == 0


def test_the_page_is_complete_without_scripts(opened):
    """Where scripts are forbidden there is everything but the controls."""
    page = opened(java_script_enabled=False)
    assert page.locator("#table tbody tr").count() == LAYERS
    assert not page.locator("#filter").is_visible()


def test_the_page_can_be_printed(opened):
    """On A4 nothing is cut off at a side or by a box that would scroll, and there are no controls."""
    page = opened(viewport={"width": 718, "height": 1000})  # 210 mm less the margins, in pixels of 1/96 inch
    page.emulate_media(media="print")
    assert not page.locator("#filter").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll.tall')).overflow") == "visible"
    assert page.evaluate("document.documentElement.scrollWidth") == 718
