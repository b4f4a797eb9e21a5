"""Notebooks, library, README and profiles say the same thing, and the notebooks are fit to be committed."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "emoca_nb"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in LIB.glob("*.py") if not p.name.startswith("_"))
STEPS = {"build_open_head"}  # modules that are read from top to bottom as a recipe; their functions are steps of it, not an interface
PROFILES = sorted((NBS / "profiles").rglob("*.yaml"))


def name(path): return path.relative_to(ROOT).as_posix()


def cells(path, kind="code"):
    """Source and metadata of the notebook's cells of one kind."""
    found = json.loads(path.read_text())["cells"]
    return [("".join(c["source"]), c["metadata"]) for c in found if c["cell_type"] == kind]


def parameters(path):
    """What the notebook's `parameters` cell declares."""
    source = "\n".join(s for s, m in cells(path) if "parameters" in m.get("tags", []))
    return {t.id for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))
            for t in (node.targets if isinstance(node, ast.Assign) else [node.target])}


def tree(folder):
    """Every text file of nbs/ and emoca_nb/, by path."""
    return {p.relative_to(folder).as_posix(): p.read_text() for top in ("nbs", "emoca_nb") for p in sorted((folder / top).rglob("*"))
            if p.suffix in {".ipynb", ".py"} and not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A copy of the repository, cleaned and exported anew."""
    copy = tmp_path_factory.mktemp("copy")
    junk = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "files")
    for folder in ("nbs", "emoca_nb"): shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "nbs/99_probe.ipynb").write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        dict(cell_type="code", id="a", source="steps = 1", outputs=[], execution_count=7,
             metadata=dict(tags=["parameters"], collapsed=True))])))
    for command in ("nbdev-clean", "nbdev-export"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    return copy


def test_library_is_what_the_notebooks_export(exported):
    before, after = tree(ROOT), tree(exported)
    after.pop("nbs/99_probe.ipynb")
    assert sorted(after) == sorted(before), "a module without its notebook, or a notebook never exported: make export"
    changed = [path for path in before if before[path] != after[path]]
    assert not changed, f"{changed} are not what `make export` writes"


def test_cleaning_keeps_the_parameters_tag(exported):
    [(_, metadata)] = cells(exported / "nbs/99_probe.ipynb")
    assert metadata == dict(tags=["parameters"])


def test_readme_is_rendered_from_index():
    sys.path.insert(0, str(ROOT / "scripts"))
    try: from readme import render
    finally: sys.path.pop(0)
    text, pictures = render()
    assert (ROOT / "README.md").read_text() == text, "README.md is stale: make export"
    for path, data in pictures.items(): assert (ROOT / path).read_bytes() == data, f"{path} is stale: make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_fit_to_commit(path):
    text = path.read_text()
    assert len(text) <= 300_000, f"{len(text) / 1e3:.0f} kB: smaller or fewer pictures"
    assert "widget-state" not in text and "widget-view" not in text and "widgets" not in json.loads(text)["metadata"], "widgets are stored: make export"
    assert '"output_type": "error"' not in text, "an output is a traceback"
    assert cells(path, "markdown")[0][0].startswith("# "), "the first text cell is the title"


def test_notebooks_import_only_from_lower_ones():
    home = {m[1]: p for p in NOTEBOOKS for s, _ in cells(p) if (m := re.search(r"^#\s*\|\s*default_exp\s+(\w+)", s, re.M))}
    for path in home.values():
        for source, _ in cells(path):
            for used in re.findall(r"^\s*(?:from|import)\s+emoca_nb\.(\w+)", source, re.M):
                assert used in home, f"{name(path)} imports emoca_nb.{used}, which no notebook exports"
                assert home[used].name <= path.name, f"{name(path)} imports from {home[used].name}"


@pytest.mark.parametrize("path", PROFILES, ids=name)
def test_profile_names_declared_parameters(path):
    notebook = NBS / path.parent.relative_to(NBS / "profiles").with_suffix(".ipynb")
    assert notebook.exists(), f"{name(path)} is no notebook's profile"
    unknown = set(yaml.safe_load(path.read_text()) or {}) - parameters(notebook)
    assert not unknown, f"{sorted(unknown)} are not parameters of {name(notebook)}"


def public_functions(path):
    """The module's public functions and methods, apart from commands of the command line."""
    for node in ast.parse(path.read_text()).body:
        for f in [node] + (node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []):
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"): yield f


def is_hook(function): return function.name in dir(LightningModule) or function.name in dir(Callback)


def is_command(function): return any("command" in ast.unparse(d) or "group" in ast.unparse(d) for d in function.decorator_list)


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem not in STEPS], ids=name)
def test_public_functions_are_documented(path):
    lines, missing = path.read_text().splitlines(), []
    for f in public_functions(path):
        if is_hook(f) and any(w in path.read_text() for w in ("LightningModule", "Callback")): continue
        if not ast.get_docstring(f): missing.append(f"{f.name}: docstring")
        if is_command(f): continue
        for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
            comment = lines[a.end_lineno - 1].partition("#")[2] or lines[a.lineno - 1].partition("#")[2]
            if a.arg not in ("self", "cls") and not comment.strip(): missing.append(f"{f.name}({a.arg}): comment")
    assert not missing, "\n".join(missing)


# A path of one machine, or a note that something is unfinished. Written so that this file does not find itself.
UNFIT = re.compile(r"/(?:home|root|work|Users)/\w|/tm[p]/\w|\bTO[D]O\b|\bFIX[M]E\b|\bXX[X]\b|\bfor [n]ow\b")


def test_no_machine_paths_nor_unfinished_notes():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / p for p in listed.stdout.splitlines()] if listed.returncode == 0 else [*NOTEBOOKS, *MODULES, *ROOT.glob("*.md")]
    found = []
    for path in (p for p in paths if p.is_file() and p.suffix not in {".npz", ".png", ".jpg", ".pt"}):
        found += [f"{name(path)}: {m[0]}" for line in path.read_text().splitlines() for m in UNFIT.finditer(line)
                  if not line.lstrip().startswith(('"image/png"', '"image/jpeg"'))]
    assert not found, "\n".join(found)
