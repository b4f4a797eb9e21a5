"""Every notebook runs from top to bottom, and its own assertions hold. Those with a tiny profile run with it, in test_papermill.py."""
import json
import os
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

NBS = Path(__file__).resolve().parent.parent / "nbs"
TINY = {p.parent.relative_to(NBS / "profiles").as_posix() + ".ipynb" for p in (NBS / "profiles").rglob("tiny.yaml")}
NOTEBOOKS = sorted({p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts} - TINY)


@pytest.fixture(autouse=True)
def own_environment():
    """Notebooks run in this process: what one sets in the environment is not for the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    passed, _ = run_notebook(NBS / name, skip_flags=["slow"], basepath=NBS.parent)
    assert passed, f"nbs/{name} fails: its traceback is in the captured stderr"


def test_a_failing_notebook_is_seen(tmp_path):
    (tmp_path / "pyproject.toml").write_text((NBS.parent / "pyproject.toml").read_text())
    cell = dict(cell_type="code", source="assert 1 == 2", metadata={}, outputs=[], execution_count=None, id="a")
    broken = tmp_path / "broken.ipynb"
    broken.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    assert run_notebook(broken, showerr=False)[0] is False
