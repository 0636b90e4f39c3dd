"""A real browser at a real server: what tests, the benchmark of strokes and README's picture share."""

import contextlib
import itertools
import shutil

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


def chromium():
    """The path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def started():
    """A headless Chromium of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield browser
        browser.close()


def opened(browser, address, **options):
    """A tab (Playwright's page) of its own session, with the model ready."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    page.goto(address)
    page.wait_for_selector("#sprint-ready:text('Ready')", timeout=120_000)
    page.wait_for_selector("#sprint-draw-text")
    return page


def shown(page):
    """How many pictures the page has shown."""
    return int(page.locator("#sprint-frame").get_attribute("data-shown") or 0)


def wait_for_picture(page, before):
    """Until the page has shown more pictures than `before`."""
    page.wait_for_function(
        "before => Number(document.getElementById('sprint-frame').dataset.shown || 0) > before",
        arg=before,
    )


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def stroke(page, *points, pause=0):
    """Draws through points, each in shares (x, y) of the canvas, ten moves between two of them. pause: ms between moves."""
    canvas = page.locator("#sprint-canvas")
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
