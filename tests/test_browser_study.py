"""The perceptual study in a real browser: the web page of a task, on a disk and on the platform, and the rating desk in JupyterLab."""
import re
from urllib.parse import parse_qs

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import TimeoutError, expect, sync_playwright
from test_browser import CHROMIUM, FLAGS, TOKEN, jupyter_lab

from emoca_nb import perceptual_study as ps
from emoca_nb.open_head import EMOTIONS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
N = 5  # questions of the small task: two photographs, two renderings, one photograph again


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study of two pictures."""
    folder, rows = tmp_path_factory.mktemp("study"), []
    for i in range(2):
        files = {k: str(folder / f"{k}{i}.png") for k in ("real", "method")}
        for j, path in enumerate(files.values()): Image.new("RGB", (300, 300), (120 * i, 120 * j, 200)).save(path)
        rows.append(dict(picture=str(i), emotion=i + 1, easy=i == 0, **files))
    key = ps.make_key(pd.DataFrame(rows))
    ps.write_study(key, folder)
    key.to_csv(folder / "key.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def key(study): return ps.read_key(study / "key.csv")


@pytest.fixture(scope="module")
def address(study): return next(study.glob("task-*.html")).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(tmp_path_factory.mktemp("browser"), executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                                viewport=dict(width=1280, height=800), accept_downloads=True)
        yield context
        context.close()


@pytest.fixture
def page(browser):
    """A page whose errors fail the test."""
    page, errors = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    page.close()
    assert not errors


def at(page, text): expect(page.locator(".rating-count")).to_have_text(text)


def begin(page, address, code):
    page.goto(address)
    page.get_by_label("participant code").fill(code)
    page.get_by_role("button", name="Begin").click()
    at(page, f"1 of {N}")


def test_page_from_first_key_to_results_file(page, address, key, tmp_path):
    begin(page, address, "ada")
    expect(page.get_by_role("button", name=re.compile("Neutral|Happy|Sad|Surprise|Fear|Disgust|Anger|Contempt"))).to_have_count(8)
    page.keyboard.press("2")
    at(page, f"2 of {N}")
    page.get_by_role("button", name="Fear").click()
    page.keyboard.press("9")
    page.keyboard.press("Control+3")
    at(page, f"3 of {N}")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("button", name="Fear")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("3")
    for digit in "856": page.keyboard.press(digit)
    at(page, f"all {N} answered")
    with page.expect_download() as download: page.get_by_role("button", name="Save the results").click()
    download.value.save_as(tmp_path / "results.csv")
    found = ps.read_results(tmp_path / "results.csv", key)
    assert not found.problems and found.table.worker.eq("ada").all()
    assert found.table.sort_values("position").answer.tolist() == [1, 2, 7, 4, 5]


def test_page_goes_on_where_it_was_left(page, address):
    begin(page, address, "bob")
    page.keyboard.press("1")
    page.keyboard.press("4")
    at(page, f"3 of {N}")
    page.goto(address)
    page.get_by_label("participant code").fill("bob")
    page.keyboard.press("Enter")
    at(page, f"3 of {N}")
    page.get_by_role("button", name="back").click()
    expect(page.get_by_role("button", name=EMOTIONS[3])).to_have_attribute("aria-pressed", "true")


def test_page_shows_each_picture_in_its_turn(page, address, key):
    begin(page, address, "cleo")
    for path in key.image:
        page.wait_for_function("() => { const i = document.querySelector('.rating img'); return i && i.complete && i.naturalWidth }")
        colour = page.evaluate("""() => { const i = document.querySelector('.rating img'), c = document.createElement('canvas').getContext('2d');
                                          c.drawImage(i, 0, 0); return [...c.getImageData(5, 5, 1, 1).data.slice(0, 3)] }""")
        assert np.abs(np.array(colour) - Image.open(path).getpixel((5, 5))).max() <= 4
        page.keyboard.press("1")


def test_strange_codes_and_strange_stores(page, address):
    page.goto(address)
    page.get_by_label("participant code").fill("a b;")
    page.get_by_role("button", name="Begin").click()
    expect(page.get_by_text("letters, digits")).to_be_visible()
    task = re.search(r"task-(\w+)", address)[1]
    for stored in ("{", "null", '{"answers": [99]}', '{"answers": "x"}'):
        page.evaluate("([name, value]) => localStorage.setItem(name, value)", [f"emoca-study/{task}/dan", stored])
        begin(page, address, "dan")


def test_page_on_the_platform_submits_its_answers(page, address):
    sent = []
    page.route("https://platform.example/**", lambda route: (sent.append(route.request), route.fulfill(body="thank you")))
    page.goto(address + "?assignmentId=A1&workerId=W1&turkSubmitTo=https://platform.example")
    page.get_by_role("button", name="Begin").click()
    for digit in "12345": page.keyboard.press(digit)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("thank you")).to_be_visible()
    [request] = sent
    assert request.method == "POST" and request.url == "https://platform.example/mturk/externalSubmit"
    assert parse_qs(request.post_data) == {"assignmentId": ["A1"]} | {f"answer_{i}": [EMOTIONS[i - 1]] for i in range(1, 6)}


def test_preview_on_the_platform_takes_no_answers(page, address):
    page.goto(address + "?assignmentId=ASSIGNMENT_ID_NOT_AVAILABLE")
    page.get_by_role("button", name="Begin").click()
    page.keyboard.press("1")
    page.get_by_role("button", name="Sad").click()
    at(page, f"1 of {N}")
    expect(page.get_by_text("Accept the task")).to_be_visible()


def test_picture_that_does_not_load_cannot_be_answered(page, tmp_path):
    (tmp_path / "form.html").write_text(ps.fill(ps.form(1), dict(task="t", image_1="nowhere.jpg")))
    page.goto((tmp_path / "form.html").as_uri())
    page.get_by_label("participant code").fill("eve")
    page.get_by_role("button", name="Begin").click()
    expect(page.get_by_text("cannot be loaded")).to_be_visible()
    page.keyboard.press("1")
    at(page, "1 of 1")


def test_forced_choice_page(page, study, tmp_path):
    pictures = pd.DataFrame(dict(picture=["0", "1"], set="a", real=[str(study / f"real{i}.png") for i in range(2)], ours=[str(study / f"method{i}.png") for i in range(2)],
                                 x=[str(study / f"real{i}.png") for i in range(2)]))
    key = ps.make_choices(pictures, "ours", 1, 2)
    folder = ps.write_study(key, tmp_path, question="Which face has the expression of the photograph?", choices=ps.SIDES, names=("photograph", "left", "right"))
    page.goto(next(folder.glob("task-*.html")).as_uri())
    page.get_by_label("participant code").fill("fay")
    page.get_by_role("button", name="Begin").click()
    expect(page.locator(".rating img")).to_have_count(3)
    xs = [i.bounding_box()["x"] for i in page.locator(".rating img").all()]
    assert xs == sorted(xs) and len({i.bounding_box()["y"] for i in page.locator(".rating img").all()}) == 1
    page.keyboard.press("1")
    page.keyboard.press("2")
    with page.expect_download() as download: page.get_by_role("button", name="Save the results").click()
    download.value.save_as(tmp_path / "results.csv")
    assert ps.read_results(tmp_path / "results.csv", key, ps.side_number).table.answer.tolist() == [0, 1]


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_everything_is_in_sight(page, address, size):
    page.set_viewport_size(dict(width=size[0], height=size[1]))
    begin(page, address, f"wide{size[0]}")
    page.wait_for_function("() => document.querySelector('.rating img').naturalWidth")
    boxes = [b.bounding_box() for b in page.locator(".rating button:visible, .rating img").all()]
    assert len(boxes) == 9 and all(b["x"] >= 0 and b["x"] + b["width"] <= size[0] and b["y"] + b["height"] <= size[1] for b in boxes)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]


# ---- the desk in JupyterLab

CELL = "from emoca_nb.perceptual_study import RatingDesk, read_key\nkey = read_key('key.csv')\nRatingDesk(key, key.task[0], 'ada', 'pilot')"


def show_desk(page, attempts=5):
    """Run the notebook until the desk is there: a page that is still connecting to its kernel loses cells and widgets."""
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    for _ in range(attempts):
        page.wait_for_timeout(1500)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try: return page.wait_for_selector(".jp-OutputArea .rating img", timeout=30_000)
        except TimeoutError: continue
    raise AssertionError(f"the desk does not appear; the page says: {page.locator('.jp-Notebook').inner_text()[-2000:]}")


def test_desk_in_jupyterlab(study, key, browser, tmp_path):
    """Digits answer, and do not turn the cell into a heading; each answer is on the disk before the next picture; a new kernel goes on."""
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel), study / "desk.ipynb")
    file = study / f"pilot/{key.task[0]}-ada.csv"
    with jupyter_lab(study) as url:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{url}/lab/tree/desk.ipynb?token={TOKEN}")
        show_desk(page)
        page.locator(".rating img").click()
        page.keyboard.press("3")
        at(page, f"2 of {N}")
        assert pd.read_csv(file)["Answer.answer_1"].tolist() == ["Sad"]
        page.locator(".rating").get_by_role("button", name="Anger").click()
        at(page, f"3 of {N}")
        page.keyboard.press("1")
        at(page, f"4 of {N}")
        assert page.locator(".jp-CodeCell").count() == 1 and page.locator(".jp-MarkdownCell").count() == 0, "digits are headings in JupyterLab"
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        page.wait_for_timeout(3000)
        show_desk(page)
        at(page, f"4 of {N}")
        for digit in "22":
            page.locator(".rating").focus()
            page.keyboard.press(digit)
            page.wait_for_timeout(600)
        at(page, f"all {N} answered")
        page.close()
    assert ps.read_results(file, key).table.sort_values("position").answer.tolist() == [2, 6, 0, 1, 1]
