"""Time from the end of a stroke to its image on the screen, in a real browser; and README's image.

    python -m benchmarks.strokes --model=runs/sprint [--strokes=100] [--steps=2]
    python -m benchmarks.strokes --model=runs/sprint --screenshot=docs/images/page.png

Starts `sprint-jax serve` and a headless Chromium, and draws strokes with the mouse. The browser's
own clock takes the time from lifting the pen to the frame after the image is decoded and in place.
Needs requirements-dev.txt and an installed Chromium. Browser and server share the machine's cores.
"""

import argparse
import pathlib
import random
import sys

import numpy as np

from benchmarks import serving

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

# Marks the lifting of the pen, and the second frame after an image is in place: by then it shows.
WATCH = """() => {
  window.times = [];
  let lifted = null;
  const canvas = document.getElementById('canvas'), frame = document.getElementById('frame');
  const watched = { attributes: true, attributeFilter: ['data-shown'] };
  canvas.addEventListener('pointerup', () => { lifted = performance.now(); }, true);
  new MutationObserver(() => {
    if (lifted === null) return;
    const from = lifted;
    lifted = null;
    const seen = () => window.times.push(performance.now() - from);
    requestAnimationFrame(() => requestAnimationFrame(seen));
  }).observe(frame, watched);
}"""


def main():
    from helpers import browser  # pyright: ignore[reportMissingImports] of tests/

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--strokes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--screenshot", help="Only take README's image, and write it here.")
    options = parser.parse_args()
    with serving.server(options.model) as (port, _), browser.launch() as chromium:
        page = browser.open_page(chromium, f"http://127.0.0.1:{port}")
        if options.screenshot:
            return screenshot(browser, page, options.screenshot)
        page.locator("#steps label", has_text=str(options.steps)).click()
        browser.open_tab(page, "Sketch")
        page.wait_for_selector("#canvas")
        page.evaluate(WATCH)
        point, rng = (lambda: (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9))), random.Random(0)
        for number in range(options.strokes):
            if number % 10 == 0:
                page.click("#clear")
            browser.draw_stroke(page, point(), point(), pause=5)
            browser.wait_for(page, "count => window.times.length > count", number)
        times = page.evaluate("window.times")
    p50, p95 = np.percentile(times, (50, 95))
    print(
        f"{len(times)} strokes at {options.steps} steps: p50 {p50:.0f} ms, p95 {p95:.0f} ms, most "
        f"{max(times):.0f} ms"
    )


def screenshot(browser, page, path):
    """Draw some images from prompts, then a sketch of a circle and a square."""
    for number in range(3):
        before = browser.count_shown(page)
        page.locator("#examples button").nth(number).click()
        browser.wait_for_image(page, before)
    page.fill("#prompt", "a red circle left of a blue square")
    page.locator("#steps label", has_text="4").click()
    browser.open_tab(page, "Sketch")
    page.wait_for_selector("#canvas")
    colours = page.locator("#colors button")
    steered = colours.count() == 2  # white lines on black, for a ControlNet
    if not steered:
        page.click("#fill")  # with black: the embedded model's images are on black by default
    turn = [
        (0.32 + 0.12 * np.cos(a), 0.6 + 0.12 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 25)
    ]
    square = [(0.7, 0.48), (0.94, 0.48), (0.94, 0.72), (0.7, 0.72), (0.7, 0.48)]
    # colour, then the outline and a stroke that fills it
    for colour, strokes in (
        (1, [turn, [(0.28, 0.6), (0.36, 0.6)]]),
        (3, [square, [(0.78, 0.6), (0.86, 0.6)]]),
    ):
        colours.nth(0 if steered else colour).click()
        page.locator("#widths button", has_text="Fine" if steered else "Brush").click()
        strokes = strokes[:1] if steered else strokes  # outlines alone
        for points in strokes:
            before = browser.count_shown(page)
            browser.draw_stroke(page, *points)
            browser.wait_for_image(page, before)
    page.wait_for_timeout(700)
    page.mouse.move(5, 5)
    page.screenshot(path=path)


if __name__ == "__main__":
    main()
