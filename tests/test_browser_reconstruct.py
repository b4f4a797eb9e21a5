"""The reconstruction desk in a real browser: a photograph is chosen, its head appears, and a slider moves its face."""
import nbformat
import pytest
from playwright.sync_api import sync_playwright

from emoca_nb.faces import detectors
from test_browser import CHROMIUM, FLAGS, TOKEN, changed, jupyter_lab, settled, show_viewer

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
              pytest.mark.skipif(all(detectors().values()), reason="needs a face detector: pip install emoca-nb[dlib]")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser page in which a notebook shows the desk."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "text.png").write_text("no picture")
    cell = nbformat.v4.new_code_cell("from emoca_nb.reconstruct import Reconstructor, Studio\nstudio = Studio(work=Reconstructor('fit', 'none', 'cpu'))\nstudio")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "desk.ipynb")
    with jupyter_lab(folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(folder / "browser", executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                                viewport=dict(width=1280, height=900))
        page = browser.pages[0]
        page.set_default_timeout(90_000)
        page.goto(f"{url}/lab/tree/desk.ipynb?token={TOKEN}")
        show_viewer(page)
        page.bad = str(folder / "text.png")
        yield page
        browser.close()


def test_choosing_a_photograph_shows_its_head_and_a_slider_moves_it(page):
    before = settled(page)
    page.get_by_label("photograph").select_option("astronaut")
    page.get_by_text("astronaut: error").wait_for()
    assert changed(page, before) > .02, "another head, in another skin"
    sheet = page.locator(".jp-OutputArea img").first
    assert sheet.evaluate("i => i.naturalWidth") == 896
    page.get_by_role("button", name="Mouth").click()
    slider = page.locator(".widget-slider", has_text="mouth smile left").locator(".noUi-handle")
    assert float(slider.get_attribute("aria-valuenow")) > .3, "she smiles"
    before = settled(page)
    slider.focus()
    for _ in range(20): page.keyboard.press("PageDown")
    assert changed(page, before) > .001, "her smile goes"


def test_a_file_that_is_no_picture_is_named(page):
    with page.expect_file_chooser() as chooser: page.locator("button.widget-upload").click()
    chooser.value.set_files(page.bad)
    page.get_by_text("text.png: not an image").wait_for()
