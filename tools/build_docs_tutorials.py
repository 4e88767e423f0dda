"""Run the notebooks of examples/notebooks and write docs/tutorials/, a page for each with its output.

python tools/build_docs_tutorials.py

Needs nbconvert and ipykernel.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from nbformat.v4 import new_output

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PAGES = ROOT / "docs" / "tutorials"


def main() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            ExecutePreprocessor(timeout=1200).preprocess(notebook, {"metadata": {"path": folder}})
            folder = os.path.realpath(folder)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.execution_count = None
                    text = printed(cell.outputs).replace(f"{folder}/", "")
                    cell.outputs = [new_output("stream", name="stdout", text=text)] if text.strip() else []
        text, _ = MarkdownExporter().from_notebook_node(notebook)
        (PAGES / f"{path.stem}.md").write_text(text.strip() + "\n", encoding="utf-8")


def printed(outputs: list[Any]) -> str:
    """What a cell printed, without what went to standard error, colours and markup."""
    parts = [
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in outputs
        if output.get("name") != "stderr"
    ]
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", "".join(part.rstrip("\n") + "\n" for part in parts))


if __name__ == "__main__":
    main()
