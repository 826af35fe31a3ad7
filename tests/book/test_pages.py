"""The built pages as a reader meets them: in a browser, with the network off.

`make test` builds `_build/html` first. Needs Chromium and its driver (Debian: chromium, chromium-driver); the tests of
accessibility fetch axe-core through npm once and say so when they cannot.
"""

import html.parser
import shutil
import sys
import urllib.parse
from functools import cache
from pathlib import Path

import pytest
import yaml

from cvlib import ROOT

sys.path.insert(0, str(ROOT / "book"))
import npm

PAGES = ROOT / "_build" / "html"
NAMES = sorted(
    path.relative_to(PAGES).as_posix() for folder in ("book", "notebooks") for path in (PAGES / folder).rglob("*.html")
)
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
every_page = pytest.mark.parametrize("name", NAMES)

TYPESET = """
const done = arguments[0], asked = document.querySelectorAll(".math").length;
const count = () => done([asked, document.querySelectorAll(".math mjx-container").length,
  [...document.querySelectorAll("[data-mjx-error]")].map((wrong) => wrong.dataset.mjxError)]);
const ready = () => window.MathJax?.startup?.promise ? MathJax.startup.promise.then(count) : setTimeout(ready, 50);
asked ? ready() : count();
"""
AXE = """
const done = arguments[arguments.length - 1], rules = arguments[0];
axe.run({exclude: [["mjx-container"]]}, {resultTypes: ["violations"], ...(rules && {runOnly: rules})}).then((found) =>
  done(found.violations.filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${one.id}: ${one.nodes.slice(0, 3).map((node) => node.target.join(" ")).join(", ")}`)));
"""
STILL = "document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')"
THEME = "document.documentElement.dataset.theme = document.documentElement.dataset.mode = arguments[0]"


class Page(html.parser.HTMLParser):
    """Links, anchors and images of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.classes, self.ids, self.images = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
            self.classes.append(found.get("class") or "")
        if tag == "img":
            self.images.append(found)


@cache
def page(path: Path) -> Page:
    return Page(path)


#: Equations of which a part lies outside their column and cannot be scrolled to.
CUT = """return [...document.querySelectorAll("div.math mjx-container")].filter(equation => {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(equation).overflowX);
    const hidden = equation.getBoundingClientRect().left < equation.parentElement.getBoundingClientRect().left - 1;
    return hidden || (equation.scrollWidth > equation.clientWidth + 1 && !scrolls);
}).map(equation => equation.textContent.slice(0, 60))"""


@pytest.fixture(scope="session")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1280,1600"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # the network is off
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def axe():
    try:
        return (npm.package("axe-core") / "axe.min.js").read_text(encoding="utf-8")
    except npm.NotAvailable as reason:
        pytest.skip(str(reason))


def order():
    """The pages in the order of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [entry for part in toc["parts"] for entry in part["chapters"]]
    nested = [[entry["file"], *(inner["file"] for inner in entry.get("sections", []))] for entry in chapters]
    return [f"{name}.html" for name in [toc["root"], *(name for names in nested for name in names)]]


def test_the_book_was_built():
    assert (PAGES / "index.html").is_file(), "run: make html"
    assert set(order()) == set(NAMES)


@every_page
def test_every_internal_link_and_anchor_resolves(name):
    path = PAGES / name
    for link in page(path).links:
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        if urllib.parse.urlsplit(link).scheme or target.startswith("//"):
            continue
        there = (path.parent / target.partition("?")[0]).resolve() if target else path
        assert there.exists(), f"{name}: {link}"
        if anchor and there.suffix == ".html":
            assert anchor in page(there).ids, f"{name}: {link}"


@every_page
def test_every_image_has_alt_text(name):
    for image in page(PAGES / name).images:
        alt = image.get("alt", "")
        described = bool(alt) and not alt.endswith((".png", ".svg"))
        assert described, f"{name}: {image.get('src')}"


@every_page
def test_equations_are_typeset_and_a_phone_need_not_scroll_sideways(browser, name):
    browser.get(f"file://{PAGES / name}")
    asked, typeset, errors = browser.execute_async_script(TYPESET)
    assert errors == []
    assert typeset >= asked, f"{typeset} of {asked} equations are typeset"
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    cut = browser.execute_script(CUT)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 390
    assert cut == []


@every_page
def test_no_serious_barrier_in_either_theme(browser, axe, name):
    """axe-core's serious and critical rules in the light theme, contrast again in the dark one."""
    if not browser.current_url.endswith(name):
        browser.get(f"file://{PAGES / name}")
    browser.execute_script(axe)
    browser.execute_script(STILL)  # a colour halfway between two themes has no contrast to speak of
    browser.execute_script(THEME, "light")
    found = browser.execute_async_script(AXE, None)
    browser.execute_script(THEME, "dark")
    found += browser.execute_async_script(AXE, ["color-contrast"])
    assert found == []


def test_one_header_and_one_search_box_a_page(browser):
    browser.get(f"file://{PAGES / 'notebooks/00-first-light.html'}")

    def shown(selector: str) -> int:
        return sum(box.is_displayed() for box in browser.find_elements("css selector", selector))

    assert shown("header.bd-header") <= 1  # today's newest themes draw a second, empty one
    assert shown(".search-button-field, .search-button__button, input[type=search]") == 1
    assert shown("main h1") == 1


def test_dark_mode_switches_and_figures_stand_on_a_card(browser):
    browser.get(f"file://{PAGES / 'notebooks/00-first-light.html'}")
    body = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_script(THEME, "light")
    light = browser.execute_script(body)
    browser.execute_script(THEME, "dark")
    assert browser.execute_script(body) != light
    card = "return getComputedStyle(document.querySelector('.cell_output img')).backgroundColor"
    assert browser.execute_script(card) not in ("rgba(0, 0, 0, 0)", browser.execute_script(body))


def test_the_keyboard_reaches_text_and_search(browser):
    from selenium.webdriver import ActionChains, Keys

    browser.get(f"file://{PAGES / 'book/intro.html'}")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert "skip to main content" in browser.switch_to.active_element.get_attribute("textContent").lower()
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("k").key_up(Keys.CONTROL).perform()
    assert browser.switch_to.active_element.get_attribute("type") == "search"


@pytest.mark.parametrize("asked", ["词表", "NF4", "量化", "文房四宝是什么"])
def test_search_finds_chinese_and_names(browser, asked):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"file://{PAGES / 'search.html'}?q={asked}")
    summary = ".search-summary"
    WebDriverWait(browser, 60).until(lambda b: "search" in b.find_element("css selector", summary).text.lower())
    WebDriverWait(browser, 60).until(lambda b: "Searching" not in b.find_element("css selector", summary).text)
    assert browser.find_elements("css selector", "#search-results li a"), f"nothing found for {asked}"


def test_previous_and_next_follow_the_table_of_contents():
    names = order()
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        found = page(PAGES / name)
        for side, neighbour in (("left-prev", before), ("right-next", after)):
            links = [link for link, css in zip(found.links, found.classes, strict=True) if side in css.split()]
            goes = [((PAGES / name).parent / link).resolve() for link in links]
            assert goes == ([PAGES / neighbour] if neighbour else []), f"{name}: {side}"


@every_page
def test_edit_and_download_buttons_point_at_this_page(name):
    source = next(path for path in (Path(name).with_suffix(end) for end in (".ipynb", ".md")) if (ROOT / path).exists())
    links = page(PAGES / name).links
    edit = f"{REPOSITORY['url']}/edit/{REPOSITORY['branch']}/{source}"
    assert [link for link in links if "/edit/" in link] == [edit]
    downloads = [((PAGES / name).parent / link).resolve() for link in links if "_sources/" in link]
    assert downloads == [PAGES / "_sources" / source]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("notebooks/")])
def test_colab_button_opens_this_notebook(name):
    links = [link for link in page(PAGES / name).links if "colab.research.google.com" in link]
    assert links
    assert all(link.endswith(name.replace(".html", ".ipynb")) for link in links), links
