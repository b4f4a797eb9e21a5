"""Parameterised notebooks run through papermill with their tiny profile, and refuse a parameter that they do not know."""
from pathlib import Path

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
def test_misspelt_parameter_stops_the_run(name, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no_such_parameter"):
        run(name, tmp_path / "stopped.ipynb", no_such_parameter=1)
