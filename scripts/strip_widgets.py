"""Take widgets out of the notebooks: their state weighs megabytes and is dead once the kernel has gone."""
import sys
from pathlib import Path

import nbformat

VIEW = "application/vnd.jupyter.widget-view+json"


def strip(path: Path) -> bool:
    """Remove stored widget state and views from a notebook; whether there were any."""
    notebook = nbformat.read(path, as_version=4)
    found = notebook.metadata.pop("widgets", None) is not None
    for output in (o for c in notebook.cells for o in c.get("outputs", ())):
        found |= output.get("data", {}).pop(VIEW, None) is not None
    if found: path.write_text(nbformat.writes(notebook) + "\n")
    return found


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(Path("nbs").rglob("*.ipynb"))): strip(path)
