"""Render nbs/index.ipynb as README.md.

usage: readme.py      writes README.md and reports/figures/readme-*.png
"""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
HIDE, DIRECTIVE = re.compile(r"^#\s*\|\s*hide\b", re.M), re.compile(r"^#\s*\|.*\n?", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")


def render(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    """README's text and the pictures it shows, by path from the root."""
    notebook = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not (c.cell_type == "code" and HIDE.search(c.source))]
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.source = DIRECTIVE.sub("", cell.source)
        else: cell.source = LINK.sub(lambda m: m[1] + from_root(m[2], root) + m[3], cell.source)
    notebook.metadata["language_info"] = {"name": "python"}
    exporter = MarkdownExporter()
    resources = {"output_files_dir": "reports/figures", "unique_key": "readme"}
    text, resources = exporter.from_notebook_node(notebook, resources)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"
    return text, dict(resources.get("outputs", {}))


def from_root(link: str, root: Path) -> str:
    """A link from nbs/ as a link from the root."""
    target = (root / "nbs" / link.split("#")[0]).resolve()
    if not target.exists(): raise SystemExit(f"nbs/index.ipynb links to {link}, which does not exist")
    return target.relative_to(root).as_posix() + ("#" + link.split("#")[1] if "#" in link else "")


if __name__ == "__main__":
    text, pictures = render()
    for old in (ROOT / "reports/figures").glob("readme_*"): old.unlink()
    for path, data in pictures.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(data)
    (ROOT / "README.md").write_text(text)
