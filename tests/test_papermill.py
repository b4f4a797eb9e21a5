"""Parameterised notebooks run through papermill with their tiny profile, and refuse a parameter that they do not know."""
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

NBS = Path(__file__).resolve().parent.parent / "nbs"


PARAMETERISED = sorted(p.parent.relative_to(NBS / "profiles").as_posix() for p in (NBS / "profiles").rglob("tiny.yaml"))


def test_every_benchmark_and_experiment_has_a_tiny_profile():
    assert {p.relative_to(NBS).with_suffix("").as_posix() for folder in ("benchmarks", "paper") for p in (NBS / folder).glob("*.ipynb")} <= set(PARAMETERISED)


def run(name, output, **parameters):
    """Execute the notebook as `make bench` does."""
    return papermill.execute_notebook(NBS / f"{name}.ipynb", output, parameters, cwd=NBS, progress_bar=False, kernel_name="python3")


@pytest.mark.parametrize("name", PARAMETERISED)
def test_tiny_profile_runs(name, tmp_path):
    tiny = yaml.safe_load((NBS / f"profiles/{name}/tiny.yaml").read_text())
    done = run(name, tmp_path / "done.ipynb", **tiny)
    assert all(c.execution_count for c in done.cells if c.cell_type == "code" and c.source.strip()), "a cell was not run"


@pytest.mark.parametrize("name", PARAMETERISED)
def test_misspelt_parameter_stops_the_run(name):
    """The cells that build the configuration, in this process, with a parameter put where papermill puts it."""
    cells = [c for c in nbformat.read(NBS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    [at] = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", ())]
    sources = [c.source for c in cells[:at + 1]] + ["no_such_parameter = 1"] + [c.source for c in cells[at + 1:at + 6]]
    space = dict(__name__="__main__")
    with pytest.raises(Exception, match="no_such_parameter"):
        for source in sources: exec(source, space)
