"""The built pages as a reader meets them: in a browser, with the network off.

`make test` builds `_build/html` first. Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import html.parser
import shutil
import urllib.parse
from pathlib import Path

import pytest

from cvlib import ROOT

PAGES = ROOT / "_build" / "html"
NAMES = sorted(
    path.relative_to(PAGES).as_posix() for folder in ("book", "notebooks") for path in (PAGES / folder).rglob("*.html")
)


class Page(html.parser.HTMLParser):
    """Links, anchors and images of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.images = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.images.append(found)


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
    yield driver
    driver.quit()


def test_the_book_was_built():
    assert (PAGES / "index.html").is_file(), "run: make html"
    assert "book/intro.html" in NAMES
    assert "notebooks/00-first-light.html" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_internal_link_and_anchor_resolves(name):
    path = PAGES / name
    for link in Page(path).links:
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        if urllib.parse.urlsplit(link).scheme or target.startswith("//"):
            continue
        there = (path.parent / target.partition("?")[0]).resolve() if target else path
        assert there.exists(), f"{name}: {link}"
        if anchor and there.suffix == ".html":
            assert anchor in Page(there).ids, f"{name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_alt_text(name):
    for image in Page(PAGES / name).images:
        alt = image.get("alt", "")
        described = bool(alt) and not alt.endswith((".png", ".svg"))
        assert described, f"{name}: {image.get('src')}"


@pytest.mark.parametrize("name", NAMES)
def test_equations_are_typeset_with_the_network_off(browser, name):
    browser.get(f"file://{PAGES / name}")
    wanted = len(browser.find_elements("css selector", ".math"))
    browser.set_script_timeout(20)
    browser.execute_async_script(
        "const done = arguments[0];"
        "const ready = () => (window.MathJax && MathJax.startup && MathJax.startup.promise)"
        " ? MathJax.startup.promise.then(() => done(true)) : setTimeout(ready, 50);"
        + ("ready();" if wanted else "done(true);")
    )
    typeset = len(browser.find_elements("css selector", ".math mjx-container"))
    assert typeset >= wanted, f"{name}: {typeset} of {wanted} equations are typeset"


def test_one_header_and_one_search_box_a_page(browser):
    browser.get(f"file://{PAGES / 'notebooks/00-first-light.html'}")

    def shown(selector: str) -> int:
        return sum(box.is_displayed() for box in browser.find_elements("css selector", selector))

    assert shown("header.bd-header") <= 1  # today's newest themes draw a second, empty one
    assert shown(".search-button-field, .search-button__button, input[type=search]") == 1
    assert shown("main h1") == 1


def test_dark_mode_switches(browser):
    browser.get(f"file://{PAGES / 'book/intro.html'}")
    body = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_script("document.documentElement.dataset.theme = 'light'")
    light = browser.execute_script(body)
    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
    assert browser.execute_script(body) != light


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("notebooks/")])
def test_colab_button_opens_this_notebook(name):
    links = [link for link in Page(PAGES / name).links if "colab.research.google.com" in link]
    assert links
    assert all(link.endswith(name.replace(".html", ".ipynb")) for link in links), links
