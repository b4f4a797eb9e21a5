"""The commands of the Makefile, the environment script where there is no Python, and the web pages."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(*arguments, **variables):
    """What `make` says, without doing it."""
    done = subprocess.run(["make", "-n", "-o", ".venv/.ready", *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(folder, **variables):
    """Run the environment script in a copy of the tree's top."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/environment.sh", folder / "scripts")
    env = dict(PATH=os.environ["PATH"], HOME=str(folder)) | variables
    return subprocess.run(["sh", str(folder / "scripts/environment.sh")], env=env, capture_output=True, text=True)


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("## ")


@pytest.mark.parametrize("target", ["demo", "test", "lab", "docs", "export", "bench", "clean", "help"])
def test_target_exists_and_is_in_the_help(target):
    assert make(target)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"\n{target} " in "\n" + listed


def test_demo_runs_notebooks_that_exist():
    notebooks = [w for w in make("demo").split() if w.startswith("nbs/") and w.endswith(".ipynb")]
    assert len(notebooks) == 2 and all((ROOT / n).exists() for n in notebooks)


def test_bench_takes_the_profile_from_settings_environment_or_command():
    assert ("gpu.yaml" in make("bench", "PROFILE=gpu")) and ("gpu.yaml" in make("bench", EMOCA_NB_PROFILE="gpu"))
    assert "gpu.yaml" not in make("bench", EMOCA_NB_PROFILE="")


@pytest.mark.parametrize("python", ["/no/such/python", shutil.which("false")])
def test_a_python_that_does_not_run_is_refused_with_advice(tmp_path, python):
    done = script(tmp_path, PYTHON=python)
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert python in done.stderr and "apt-get install" in done.stderr


def test_a_shim_that_fails_is_passed_over(tmp_path):
    """A `python3.12` that exists but does not run, as pyenv leaves them, does not hide a Python that does."""
    broken, works = tmp_path / "broken/python3.12", tmp_path / "works/python3.12"
    for shim, does in ((broken, "exit 127"), (works, f'echo used >> "{tmp_path}/used"\nexec "{sys.executable}" "$@"')):
        shim.parent.mkdir()
        shim.write_text(f"#!/bin/sh\n{does}\n")
        shim.chmod(0o755)
    (tmp_path / "tree").mkdir()
    done = script(tmp_path / "tree", PATH=f"{broken.parent}:{works.parent}:/usr/bin:/bin", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert str(works) in done.stdout and (tmp_path / "used").exists()
    assert done.returncode and not (tmp_path / "tree/.venv/.ready").exists(), "nothing to install there: it must not count as ready"


def test_pages_build(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path / "site")], cwd=ROOT,
                          env=os.environ | dict(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "EMOCA workbench" in (tmp_path / "site/index.html").read_text()
    assert (tmp_path / "site/00_core/index.html").exists()
