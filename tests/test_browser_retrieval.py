"""The browser of neighbours in a real browser: a neighbour clicked and one chosen by keyboard, menus, uploads good and bad."""
import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from test_browser import CHROMIUM, FLAGS, TOKEN, jupyter_lab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
CELL = """
import numpy as np
from emoca_nb.data import image_folder
from emoca_nb.retrieval import FaceBrowser, Space, build_index, given_space
faces = image_folder("faces", size=64)
colour, order = Space("colour", "mean colour", lambda batch: batch.image.mean((2, 3))), given_space("order", np.arange(len(faces))[:, None])
spaces = dict(colour=colour, order=order)
indices = {name: build_index(faces, space, f"index/{name}") for name, space in spaces.items()}
FaceBrowser(faces, indices, dict(colour=colour), k=5, detector="whole")
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser page in which a notebook shows neighbours of thirty squares, each of one colour."""
    folder, r = tmp_path_factory.mktemp("lab"), np.random.default_rng(0)
    for i in range(30):
        (file := folder / f"faces/{('Happy', 'Sad', 'Anger')[i % 3]}/{i:02}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), tuple(r.integers(256, size=3).tolist())).save(file)
    Image.new("RGB", (90, 60), (250, 10, 10)).save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"no picture")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel), folder / "squares.ipynb")
    with jupyter_lab(folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(folder / "browser", executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                                viewport=dict(width=1280, height=800))
        page = browser.pages[0]
        page.set_default_timeout(60_000)
        page.goto(f"{url}/lab/tree/squares.ipynb?token={TOKEN}")
        show(page)
        page.folder = folder
        yield page
        browser.close()


def show(page, attempts=5):
    """Run the notebook until the faces are there: a page that is still connecting to its kernel loses cells and widgets."""
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    for _ in range(attempts):
        page.wait_for_timeout(2000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try: return page.wait_for_function("document.querySelectorAll('.emoca-strip img').length == 11", timeout=40_000)
        except TimeoutError: continue
    raise AssertionError(f"no faces appear; the page says: {page.locator('.jp-Notebook').inner_text()[-2000:]}")


def strip(page, which): return page.locator(".emoca-strip").nth(dict(offer=0, query=1, near=2)[which]).locator("button")
def sources(page, which): return [b.get_attribute("src") for b in strip(page, which).locator("img").all()]


def becomes(page, which, source):
    """Wait until the first picture of a strip is the given one."""
    page.wait_for_function("([i, src]) => document.querySelectorAll('.emoca-strip')[i].querySelector('img')?.src == src",
                           arg=[dict(offer=0, query=1, near=2)[which], source])


def test_faces_are_drawn(page):
    assert [strip(page, s).count() for s in ("offer", "query", "near")] == [5, 1, 5]
    widths = page.evaluate("[...document.querySelectorAll('.emoca-strip img')].map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert all(natural == 96 and shown == 72 for natural, shown in widths)
    texts = strip(page, "near").all_inner_texts()
    distances = [float(t.split()[-1]) for t in texts]
    assert distances == sorted(distances) and all(t.split()[0] in ("Happy", "Sad", "Anger") for t in texts)


def test_a_clicked_neighbour_becomes_the_query(page):
    wanted = sources(page, "near")[2]
    strip(page, "near").nth(2).click()
    becomes(page, "query", wanted)
    page.wait_for_function("src => ![...document.querySelectorAll('.emoca-strip')[2].querySelectorAll('img')].some(i => i.src == src)", arg=wanted)


def test_a_face_chosen_by_keyboard_becomes_the_query(page):
    wanted = sources(page, "offer")[3]
    strip(page, "offer").first.focus()
    for _ in range(3): page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    becomes(page, "query", wanted)


def test_other_faces_and_one_emotion(page):
    before = sources(page, "offer")
    page.get_by_role("button", name="Other faces").click()
    page.wait_for_function("src => document.querySelector('.emoca-strip img').src != src", arg=before[0])
    page.get_by_label("faces", exact=True).select_option("Sad")
    page.wait_for_function("[...document.querySelector('.emoca-strip').querySelectorAll('span')].every(s => s.textContent == 'Sad')")
    page.get_by_label("faces", exact=True).select_option("Contempt")
    page.get_by_text("no face is Contempt").wait_for()
    page.get_by_label("faces", exact=True).select_option("any")
    page.wait_for_function("document.querySelector('.emoca-strip').querySelectorAll('img').length == 5")


def test_space_and_distance(page):
    strip(page, "offer").first.click()
    before = strip(page, "near").all_inner_texts()
    page.get_by_label("distance", exact=True).select_option("cosine")
    page.wait_for_function("text => document.querySelectorAll('.emoca-strip')[2].querySelector('span').textContent != text", arg=before[0])
    page.get_by_label("distance", exact=True).select_option("l2")
    page.get_by_label("space", exact=True).select_option("order")
    page.get_by_text("by order").wait_for()
    page.get_by_label("space", exact=True).select_option("colour")
    page.get_by_text("by colour").wait_for()


def upload(page, name):
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Upload a face").click()
    chooser.value.set_files(page.folder / name)


def test_an_uploaded_picture_finds_neighbours_and_a_broken_one_is_refused(page):
    upload(page, "red.png")
    page.get_by_text("your picture").wait_for()
    assert strip(page, "near").count() == 5
    page.get_by_label("space", exact=True).select_option("order")
    page.get_by_text("pictures from outside have no place in the space 'order'").wait_for()
    assert strip(page, "near").count() == 0
    page.get_by_label("space", exact=True).select_option("colour")
    page.wait_for_function("document.querySelectorAll('.emoca-strip')[2].querySelectorAll('img').length == 5")
    upload(page, "broken.png")
    page.locator("span[style*='176, 0, 0'], span[style*='b00']").wait_for()
    strip(page, "offer").first.click()
    page.get_by_text("5 neighbours from different videos").wait_for()


def test_nothing_overflows(page):
    """At 1280 x 800 menus and faces lie inside the output."""
    output = page.locator(".jp-OutputArea-output").first.bounding_box()
    parts = page.locator(".emoca-strip button:visible, .jp-OutputArea select:visible, .jp-OutputArea .jupyter-button:visible").all()
    boxes = [p.bounding_box() for p in parts]
    assert len(boxes) == 16 and all(b["x"] >= output["x"] - 1 and b["x"] + b["width"] <= output["x"] + output["width"] + 1 for b in boxes)
