"""The whole book as one PDF: `make pdf`.

Sphinx writes the book as a single page, Chromium prints it. That keeps the equations as MathJax sets them and the
Chinese in a font that has it, with nothing of TeX to install. Needs Chromium, its driver and a font with Chinese
(Debian: chromium, chromium-driver, fonts-noto-cjk).
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "_build" / "pdf"
OUT = WORK / "teach-a-llama-chinese.pdf"
PAPER = {
    "paperWidth": 8.27,
    "paperHeight": 11.69,
    "marginTop": 0.6,
    "marginBottom": 0.7,
    "marginLeft": 0.7,
}  # A4, inches
FOOTER = '<div style="font-size:8px;width:100%;text-align:center"><span class="pageNumber"></span></div>'
WAIT = """
const done = arguments[0];
for (const image of document.images) image.loading = "eager";
const pictures = [...document.images].map((image) => image.decode().catch(() => 0));
const ready = () => window.MathJax?.startup?.promise
  ? Promise.all([MathJax.startup.promise, ...pictures]).then(() => done(true)) : setTimeout(ready, 50);
ready();
"""


def main() -> int:
    if not shutil.which("chromedriver"):
        print(
            "pdf: no chromedriver; install it: apt-get install chromium chromium-driver fonts-noto-cjk", file=sys.stderr
        )
        return 2
    shutil.rmtree(WORK, ignore_errors=True)
    program = Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", str(ROOT), "--builder", "singlehtml", "--path-output", str(WORK), "-q"]
    built = subprocess.run(command, capture_output=True, text=True)
    page = WORK / "_build" / "singlehtml" / "book" / "intro.html"
    if built.returncode or not page.exists():
        print(built.stderr or built.stdout, file=sys.stderr)
        return 1
    page = page.replace(page.parent.parent / "index.html")  # its own links start at the top, and are broken below it
    OUT.write_bytes(printed(page))
    print(f"the PDF: {OUT}, {OUT.stat().st_size / 1e6:.1f} MB")
    return 0


def printed(page: Path) -> bytes:
    """The page as Chromium prints it, once its equations are set and its pictures are there; the network is off."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(f"--{flag}")
    options.page_load_strategy = "eager"  # the text is enough; WAIT waits for the rest
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(900)
        driver.set_script_timeout(900)
        driver.command_executor.client_config.timeout = 900
        driver.get(f"file://{page}")
        driver.execute_script("document.documentElement.dataset.theme = 'light'")
        driver.execute_async_script(WAIT)
        settings = PAPER | {
            "marginRight": PAPER["marginLeft"],
            "printBackground": True,
            "generateDocumentOutline": True,
        }
        footer = {"displayHeaderFooter": True, "headerTemplate": "<span></span>", "footerTemplate": FOOTER}
        done = driver.execute_cdp_cmd("Page.printToPDF", settings | footer)
    finally:
        driver.quit()
    return base64.b64decode(done["data"])


if __name__ == "__main__":
    sys.exit(main())
