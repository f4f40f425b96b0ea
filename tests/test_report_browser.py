"""The report in headless Chromium: it asks nobody, says nothing to the console, and fits a laptop and a phone.

Needs Playwright (`pip install .[browser]`) and a browser: Chromium in PATH, or what `playwright
install chromium` brings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import RUN, files

from offload.report import page, read_run, read_trace

__all__ = ["files"]

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
WINDOWS = {"laptop": (1280, 800), "phone": (390, 844), "small phone": (320, 568)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install .[browser]")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    with library.sync_playwright() as playwright:
        try:
            shown = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except library.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield shown
        shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
def test_it_fits_and_asks_nobody(
    browser: Any, files: tuple[Path, Path], tmp_path: Path, window: str, scheme: str
) -> None:
    width, height = WINDOWS[window]
    out = tmp_path / "report.html"
    out.write_text(page(read_run(str(files[0])), read_trace(str(files[1]))))
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    shown = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.goto(out.as_uri())
    assert asked == [out.as_uri()]
    assert said == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    kind, other = ("narrow", "wide") if width < 672 else ("wide", "narrow")
    assert shown.locator(f"svg.{kind}:visible").count() == 9
    assert shown.locator(f"svg.{other}:visible").count() == 0
    # Text of pictures is as large as it is drawn, or nearly: a picture is not shrunk until nobody can read it.
    for box in shown.locator(f"svg.{kind} text.label").evaluate_all(
        "all => all.map(t => t.getBoundingClientRect().height)"
    ):
        assert box >= 8.5
    # Nothing that a picture says is cut off by the window.
    edges = shown.locator(f"svg.{kind} text").evaluate_all(
        "all => all.map(t => [t.getBoundingClientRect().left, t.getBoundingClientRect().right])"
    )
    assert min(left for left, _ in edges) >= 0
    assert max(right for _, right in edges) <= width
    paper, ink = shown.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (_light(paper) > _light(ink)) == (scheme == "light")
    stall = shown.locator(f"svg.{kind} rect.stall").first.evaluate("r => getComputedStyle(r).fill")
    red, green, blue = _channels(stall)
    assert red > 2 * max(green, blue)
    context.close()


def test_hostile_text_does_nothing(browser: Any, tmp_path: Path) -> None:
    evil = "</title></style><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    out = tmp_path / "report.html"
    out.write_text(page(RUN | {"model": evil, "fallbacks": [evil]}))
    shown = browser.new_page()
    dialogs: list[str] = []
    shown.on("dialog", lambda dialog: dialogs.append(dialog.message))
    shown.goto(out.as_uri())
    assert shown.title().startswith("offload: ")
    assert shown.locator("script, img").count() == 0
    assert dialogs == []
    shown.close()


def _channels(color: str) -> tuple[int, int, int]:
    """Of "rgb(1, 2, 3)"."""
    red, green, blue = (int(part) for part in color.split("(")[1].rstrip(")").split(",")[:3])
    return red, green, blue


def _light(color: str) -> int:
    return sum(_channels(color))
