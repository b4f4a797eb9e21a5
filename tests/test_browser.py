"""The viewer in a real browser: JupyterLab and headless Chromium, a slider moved by keyboard, an emotion chosen by mouse."""
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright

TOKEN = "viewer-test"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
           --disable-sync""".split()
SETTINGS = {"notebook-extension/tracker": dict(autoStartDefaultKernel=True),
            "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False)}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@contextmanager
def jupyter_lab(folder):
    """JupyterLab on the notebooks of a folder, with settings of its own: its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    own["JUPYTERLAB_SETTINGS_DIR"] = str(folder / ".settings")
    for name, values in SETTINGS.items():
        (path := folder / f".settings/@jupyterlab/{name}.jupyterlab-settings").parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    log = open(folder / "lab.log", "w")
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=os.environ | own, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", lab, folder / "lab.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        lab.terminate()
        try: lab.wait(20)
        except subprocess.TimeoutExpired: lab.kill()


def wait_for(url, process, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None: break
        try: return urlopen(url, timeout=5).close()
        except (URLError, OSError): time.sleep(.3)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


def show_viewer(page, attempts=5):
    """Run the notebook until the viewer's canvas is there: a page that is still connecting to its kernel loses cells and widgets."""
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    for _ in range(attempts):
        page.wait_for_timeout(2000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try: return page.wait_for_selector(".jp-OutputArea canvas", timeout=20_000)
        except TimeoutError: continue
    raise AssertionError(f"the viewer does not appear; the page says: {page.locator('.jp-Notebook').inner_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser page in which a notebook shows the viewer."""
    folder = tmp_path_factory.mktemp("lab")
    cell = nbformat.v4.new_code_cell("from emoca_nb.viewer import HeadViewer\nviewer = HeadViewer()\nviewer")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "head.ipynb")
    with jupyter_lab(folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(folder / "browser", executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                                viewport=dict(width=1280, height=800))
        page = browser.pages[0]
        page.set_default_timeout(90_000)
        page.goto(f"{url}/lab/tree/head.ipynb?token={TOKEN}")
        show_viewer(page)
        yield page
        browser.close()


def picture(page):
    """What the browser draws, as float RGB."""
    return np.asarray(Image.open(io.BytesIO(page.locator(".jp-OutputArea canvas").first.screenshot())).convert("RGB"), float) / 255


def settled(page, seconds=30):
    """The picture once it stands still."""
    before, end = picture(page), time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(400)
        now = picture(page)
        if now.shape == before.shape and np.abs(now - before).max() < .02: return now
        before = now
    raise AssertionError("the picture never stands still")


def changed(page, before, seconds=30):
    """The share of pixels that have changed once any has; 0 if none does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        share = (np.abs(picture(page) - before).max(-1) > .05).mean()
        if share > 0: return (np.abs(settled(page) - before).max(-1) > .05).mean()
        page.wait_for_timeout(200)
    return 0.


def test_head_is_drawn(page):
    image = settled(page)
    background = np.abs(image - image[2, 2]).max(-1) < .03
    assert .2 < (~background).mean() < .9, "a head fills a good part of the picture"
    assert image[~background].std() > .03, "it is shaded and textured"


def test_slider_moved_by_keyboard_changes_the_picture(page):
    page.get_by_role("button", name="Mouth").click()
    before = settled(page)
    slider = page.locator(".widget-slider", has_text="mouth smile left").locator(".noUi-handle")
    slider.focus()
    for _ in range(10): page.keyboard.press("PageUp")
    assert changed(page, before) > .002, "the corner of the mouth moves"
    assert slider.get_attribute("aria-valuetext") not in (None, "0.00")


def test_emotion_button_changes_the_picture_and_reset_brings_it_back(page):
    page.get_by_role("button", name="Reset").click()
    neutral = settled(page)
    page.get_by_role("button", name="Surprise").click()
    assert changed(page, neutral) > .01
    page.get_by_role("button", name="Reset").click()
    page.wait_for_timeout(500)
    assert (np.abs(settled(page) - neutral).max(-1) > .05).mean() < .002


def test_saving_from_the_page(page):
    page.get_by_role("button", name="GLB").click()
    page.get_by_text("wrote").wait_for()
    name = page.get_by_label("save as")
    name.fill("no/such/folder/head")
    name.press("Tab")
    page.get_by_role("button", name="PNG").click()
    page.get_by_text("no folder").wait_for()


def test_nothing_overflows(page):
    """At 1280 x 800 the picture is left, the controls right, and neither is cut off."""
    page.evaluate("() => document.querySelector('.jp-OutputArea canvas').scrollIntoView({block: 'end'})")
    output = page.locator(".jp-OutputArea-output").first.bounding_box()
    canvas = page.locator(".jp-OutputArea canvas").first.bounding_box()
    boxes = [b.bounding_box() for b in page.locator(".jp-OutputArea button:visible, .jp-OutputArea .widget-slider:visible").all()]
    right = output["x"] + output["width"]
    assert canvas["width"] > 300 and len(boxes) > 20
    assert all(b["x"] >= canvas["x"] + canvas["width"] - 1 and b["x"] + b["width"] <= right + 1 for b in boxes)
