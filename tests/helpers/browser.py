"""A real browser at a real server: for the tests, the benchmark of strokes and README's image."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from typing import Any

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def launch() -> Iterator[Any]:
    """Launch a headless Chromium and yield Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield browser
        browser.close()


def open_page(browser: Any, address: str, **options: Any) -> Any:
    """Return a page of a session of its own, with the model ready."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    page.goto(address)
    wait_until_ready(page)
    return page


def wait_until_ready(page: Any, seconds: float = 120) -> None:
    """Wait until the model is compiled and the controls are there."""
    page.wait_for_selector("#ready:text('Ready')", timeout=1000 * seconds)
    page.wait_for_selector("#draw")


def wait_for(page: Any, function: str, argument: Any = None, seconds: float = 30) -> None:
    """Wait until a JavaScript function returns true.

    Playwright's own wait needs a page that allows eval.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(function, argument):
        assert time.monotonic() < end, f"it did not happen in time: {function}"
        page.wait_for_timeout(10)


def wait_for_message(page: Any, words: str) -> None:
    """Wait until the page shows a message with the words."""
    wait_for(page, "words => document.getElementById('message').textContent.includes(words)", words)


def wait_until_idle(page: Any) -> None:
    """Wait until no request is on its way."""
    wait_for(page, "() => !document.getElementById('frame').classList.contains('busy')")


def count_shown(page: Any) -> int:
    """Return how many images the page has shown."""
    return int(page.locator("#frame").get_attribute("data-shown") or 0)


def wait_for_image(page: Any, before: int) -> None:
    """Wait until the page has shown more images than `before`."""
    more = "before => Number(document.getElementById('frame').dataset.shown || 0) > before"
    wait_for(page, more, before)


def open_tab(page: Any, name: str) -> None:
    """Change to the tab "Text", "Image" or "Sketch"."""
    page.get_by_role("tab", name=name).click()


def draw_stroke(page: Any, *points: tuple[float, float], pause: float = 0) -> None:
    """Draw through points, with ten mouse moves for each line.

    Points are shares (x, y) of the canvas. `pause` is the time between moves in milliseconds.
    """
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    place = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(*place(*points[0]))
    page.mouse.down()
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        for i in range(1, 11):
            page.mouse.move(*place(x0 + (x1 - x0) * i / 10, y0 + (y1 - y0) * i / 10))
            page.wait_for_timeout(pause)
    page.mouse.up()
