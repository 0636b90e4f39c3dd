"""The page in a real browser: prompt, upload, sketch, messages, two tabs, no other sites.

SPRINT_JAX_ARTEFACTS names a folder that keeps the screenshots.
"""

import base64
import contextlib
import io
import os
import pathlib
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers import browser
from helpers.runs import free_port
from helpers.servers import paint, run_server, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)"
    ),
]
SAVE = """(image) => {
  const c = document.createElement('canvas');
  c.width = image.naturalWidth;
  c.height = image.naturalHeight;
  c.getContext('2d').drawImage(image, 0, 0);
  return c.toDataURL('image/png');
}"""


@pytest.fixture(scope="module")
def address(command, finished):
    """Return the address of the real command with an untrained model."""
    port = free_port()
    process = command(
        "sprint_jax", "serve", f"--model={finished}", f"--port={port}", background=True
    )
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health").json()["ready"]:
                break
        time.sleep(0.3)
    yield address
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def chromium():
    """Return the browser of the module."""
    with browser.launch() as started:
        yield started


@pytest.fixture
def page(chromium, address):
    """Return a page.

    `page.asked` has its requests as (method, address, JSON). A script error fails the test.
    """
    errors, page = [], chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.asked = []
    page.on(
        "request",
        lambda request: page.asked.append((request.method, request.url, request.post_data)),
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None,
    )
    page.goto(address)
    browser.wait_until_ready(page, 60)
    yield page
    page.context.close()
    assert not errors


@pytest.fixture
def keep(tmp_path):
    """Return keep(page, name), which saves a screenshot."""
    folder = pathlib.Path(os.environ.get("SPRINT_JAX_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")


def posts(page):
    """Return the requests of a page that ask for an image."""
    return [data for method, url, data in page.asked if method == "POST"]


def shown_image(page):
    """Return the image that the page shows, uint8 [H, W, 3]."""
    url = page.locator("#frame img").evaluate(SAVE)
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    )


def answer(address, body):
    """Return the file and the image that a program gets for a request."""
    reply = httpx.post(
        f"{address}/generate", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 200, reply.text
    return reply.content, np.asarray(Image.open(io.BytesIO(reply.content)))


def test_a_prompt_becomes_an_image(page, address, keep):
    page.fill("#prompt", "a blue circle above a red square")
    page.locator("#steps label").nth(3).click()
    page.fill("#seed", "11")
    page.click("#draw")
    browser.wait_for_image(page, 0)
    sent = posts(page)[-1]
    assert '"prompt":"a blue circle above a red square"' in sent
    assert '"steps":4' in sent
    assert '"seed":11' in sent
    file, expected = answer(address, sent)
    np.testing.assert_array_equal(shown_image(page), expected)
    for stage in ("waiting", "drawing", "encoding", "total"):
        assert f"{stage} " in page.locator("#about").inner_text()
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a_blue_circle_above_a_red_square_seed11_steps4.png"
    assert pathlib.Path(download.value.path()).read_bytes() == file

    page.click("#new-seed")
    browser.wait_for_image(page, 1)
    browser.wait_for(page, "() => document.getElementById('seed').value !== '11'")
    gallery = page.locator("#gallery button")
    assert gallery.count() == 2 and not np.array_equal(shown_image(page), expected)
    gallery.nth(1).click()
    np.testing.assert_array_equal(shown_image(page), expected)
    keep(page, "prompt")
    # Nothing came from elsewhere, and of this server only what the page needs.
    assert all(url.startswith((address, "blob:", "data:")) for _, url, _ in page.asked)
    paths = {url.removeprefix(address) for _, url, _ in page.asked if url.startswith(address)}
    known = {"/", "/page.js", "/page.css", "/options", "/health", "/generate"}
    assert paths == known


def test_wrong_input_becomes_a_message(page, keep):
    page.fill("#prompt", "a zebra")
    page.click("#draw")
    message = page.locator("#message")
    browser.wait_for_message(page, "zebra")
    assert "'zebra'" in message.inner_text() and "circle" in message.inner_text()
    keep(page, "message")
    for prompt, word in (
        ("", "empty"),
        ("x" * 100_000, "100000"),
        ("a <b>circle</b>", "<b>circle</b>"),
    ):
        page.fill("#prompt", prompt)
        page.click("#draw")
        browser.wait_for_message(page, word)
    assert message.locator("b").count() == 0  # shown as text, not run
    page.fill("#prompt", "a circle")
    page.fill("#seed", "-4")
    page.click("#draw")
    browser.wait_for_message(page, "seed is -4")
    page.fill("#seed", "4")
    page.click("#draw")
    browser.wait_for_image(page, 0)
    assert message.inner_text() == ""


def test_an_upload_becomes_an_image(page, address, tmp_path, keep):
    browser.open_tab(page, "Image")
    page.click("#draw")
    browser.wait_for_message(page, "Choose an image")
    start = np.zeros((60, 40, 4), np.uint8)
    start[:30] = (255, 0, 0, 255)
    Image.fromarray(start).save(tmp_path / "start.png")
    page.set_input_files("#file", tmp_path / "start.png")
    browser.wait_for_image(page, 0)
    sent = posts(page)[-1]
    assert '"strength":0.6' in sent and '"image":"data:image/png;base64,' in sent
    np.testing.assert_array_equal(shown_image(page), answer(address, sent)[1])
    keep(page, "upload")
    (tmp_path / "lie.png").write_text("<svg onload='alert(1)'/>")
    page.set_input_files("#file", tmp_path / "lie.png")
    browser.wait_for_message(page, "not a PNG")
    (tmp_path / "large.png").write_bytes(b"x" * (8 * 2**20 + 1))
    page.set_input_files("#file", tmp_path / "large.png")
    browser.wait_for_message(page, "at most")


def test_a_sketch_becomes_an_image_as_it_is_drawn(page, address, keep):
    """Show images during a slow stroke, and at last that of the whole sketch."""
    browser.open_tab(page, "Sketch")
    browser.draw_stroke(page, (0.2, 0.2), (0.8, 0.2), (0.8, 0.8), pause=20)
    browser.wait_until_idle(page)
    sent = posts(page)
    assert len(sent) >= 2 and browser.count_shown(page) >= 1
    canvas = page.evaluate("document.getElementById('canvas').toDataURL('image/png')")
    assert f'"image":"{canvas}"' in sent[-1] and '"strength":0.6' in sent[-1]
    np.testing.assert_array_equal(shown_image(page), answer(address, sent[-1])[1])
    assert page.locator("#gallery button").count() == 1  # the last of one stroke
    keep(page, "sketch")
    # Another prompt draws the same sketch again.
    before = browser.count_shown(page)
    page.fill("#prompt", "a green triangle")
    browser.wait_for_image(page, before)
    assert '"prompt":"a green triangle"' in posts(page)[-1]


def test_fast_moves_are_one_request(page):
    """Send a hundred moves in one go once, when the pen is lifted."""
    browser.open_tab(page, "Sketch")
    page.wait_for_selector("#canvas")
    page.evaluate("""() => {
      const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect();
      canvas.setPointerCapture = () => {};  // these pointers are not real
      const move = (kind, i) => canvas.dispatchEvent(
        new PointerEvent(kind, { clientX: box.left + i, clientY: box.top + i }));
      move('pointerdown', 10);
      for (let i = 10; i < 110; i++) move('pointermove', i);
      move('pointerup', 110);
    }""")
    browser.wait_for_image(page, 0)
    page.wait_for_timeout(300)
    assert len(posts(page)) == 1


def test_the_newest_stroke_wins(page):
    """Hold back the server's first answer until after the second: it must not be shown."""
    browser.open_tab(page, "Sketch")
    page.evaluate("""() => {
      const real = window.fetch; let count = 0; window.held = 0; window.aborted = 0;
      window.fetch = async (url, options) => {
        if (url !== 'generate') return real(url, options);
        const number = ++count;
        options.signal.addEventListener('abort', () => { window.aborted++; });
        const reply = await real(url, { ...options, signal: undefined });
        if (number === 1) { await new Promise((go) => { window.release = go; }); window.held = 1; }
        return reply;
      };
    }""")
    browser.draw_stroke(page, (0.2, 0.2), (0.3, 0.2))
    browser.wait_for(page, "() => !!window.release")
    browser.draw_stroke(page, (0.2, 0.8), (0.8, 0.8))
    browser.wait_for_image(page, 0)
    browser.wait_until_idle(page)
    last, count = shown_image(page), browser.count_shown(page)
    page.evaluate("window.release()")
    browser.wait_for(page, "() => window.held === 1")
    page.wait_for_timeout(200)
    assert page.evaluate("window.aborted") >= 1 and browser.count_shown(page) == count
    np.testing.assert_array_equal(shown_image(page), last)


def test_two_tabs_at_once(chromium, address, keep):
    """Each tab shows its own images, although both draw at the same time."""
    tabs = [browser.open_page(chromium, address) for _ in range(2)]
    expected = []
    for number, page in enumerate(tabs):
        page.fill("#seed", str(100 + number))
        page.wait_for_timeout(300)
        body = page.evaluate(
            "JSON.stringify({prompt: document.getElementById('prompt').value,"
            f" seed: {100 + number}}})"
        )
        expected.append(answer(address, body)[1])
    assert not np.array_equal(*expected)
    for _ in range(3):
        for page in tabs:
            page.evaluate("sprint.draw()")
    for page, right in zip(tabs, expected):
        browser.wait_for(page, "() => !!document.querySelector('#frame img')")
        browser.wait_until_idle(page)
        np.testing.assert_array_equal(shown_image(page), right)
    keep(tabs[1], "two_tabs")
    for page in tabs:
        page.context.close()


def test_the_page_shows_the_progress_of_compiling(chromium):
    """Refuse early requests; ready means ready. Model and compiler are stand-ins."""
    compiled = threading.Event()

    def prepare(say):
        say(3, 8)
        compiled.wait(60)
        say(8, 8)

    with run_server(prepare=prepare) as (address, _):
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#ready:text('3 of 8')")
        assert page.locator("#ready progress").get_attribute("value") == "3"
        page.click("#draw")
        browser.wait_for_message(page, "being compiled")
        compiled.set()
        page.wait_for_selector("#ready:text('Ready')")
        page.click("#draw")
        browser.wait_for_image(page, 0)
        page.close()


def test_a_closed_tab_gives_up_its_place_and_a_password_is_asked_for(chromium, gate):
    with run_server(lambda request: paint(gate(request)), password="secret") as (
        address,
        queue,
    ):
        stranger = chromium.new_page()
        with pytest.raises(Exception, match="ERR_INVALID_AUTH_CREDENTIALS|401"):
            assert stranger.goto(address).status != 401, "401"
        stranger.close()
        tabs = [
            browser.open_page(
                chromium, address, http_credentials={"username": "me", "password": "secret"}
            )
            for _ in range(2)
        ]
        tabs[0].click("#draw")
        wait_until(lambda: gate.seen)
        tabs[1].click("#draw")
        wait_until(lambda: queue.length == 1)
        tabs[1].context.close()
        wait_until(lambda: queue.length == 0)
        gate.open.set()
        browser.wait_for_image(tabs[0], 0)
        tabs[0].context.close()
        assert len(gate.seen) == 1


def slowly(request):
    time.sleep(0.3)
    return paint(request)


def test_a_slow_model_shows_images_on_the_way(chromium):
    """Wait for images that take longer than the pen's next move. Say so when the server ends."""
    with run_server(slowly) as (address, _):
        page = browser.open_page(chromium, address)
        browser.open_tab(page, "Sketch")
        page.wait_for_selector("#canvas")
        browser.draw_stroke(page, (0.1, 0.1), (0.9, 0.1), (0.9, 0.9), pause=100)
        assert browser.count_shown(page) >= 3
        browser.wait_until_idle(page)
    page.wait_for_selector("#ready:text('The server does not answer')", timeout=20_000)
    page.context.close()


def test_one_pen_at_a_time_on_paper_of_the_image_shape(chromium):
    """Ignore a second finger and the right button. Another size reshapes paper and sketch."""
    with run_server() as (address, _):
        page = browser.open_page(chromium, address)
        browser.open_tab(page, "Sketch")
        page.wait_for_selector("#canvas")
        blank, first, second, shape = page.evaluate("""() => {
          const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect();
          canvas.setPointerCapture = () => {};
          const at = (kind, x, more) => canvas.dispatchEvent(new PointerEvent(
            kind, { clientX: box.left + x, clientY: box.top + x, pointerId: 1, ...more }));
          const blank = canvas.toDataURL();
          at('pointerdown', 40, { button: 2 }); at('pointermove', 90, {}); at('pointerup', 90, {});
          const right = canvas.toDataURL();
          at('pointerdown', 40, {}); at('pointermove', 60, {});
          const first = canvas.toDataURL();
          at('pointerdown', 150, { pointerId: 2 });
          at('pointermove', 190, { pointerId: 2 }); at('pointerup', 190, { pointerId: 2 });
          const second = canvas.toDataURL();
          at('pointerup', 60, {});
          return [blank === right, first !== blank, second === first, canvas.width / canvas.height];
        }""")
        assert blank
        assert first
        assert second
        assert shape == 1
        browser.wait_for_image(page, 0)
        before = browser.count_shown(page)
        page.get_by_label("Height × width").select_option("32 × 48")
        browser.wait_for_image(page, before)
        browser.wait_until_idle(page)
        sheet = page.evaluate("document.getElementById('canvas').toDataURL('image/png')")
        drawing = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2]))).convert("L")
        )
        assert (drawing < 128).any() and shown_image(page).shape == (32, 48, 3)
        page.context.close()
