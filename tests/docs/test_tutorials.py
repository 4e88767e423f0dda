"""The notebooks run, and their pages show the code that they hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import REPOSITORY
from doc_pages import DOCS, folder_of_its_own, listening

NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))


def cells_of(path) -> list[tuple[str, str]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with folder_of_its_own(tmp_path), listening() as heard:
        for kind, source in cells_of(path):
            if kind == "code":
                exec(compile(source, path.name, "exec"), names)
    expected = {
        "own-data-to-dynamics": ["errors of best.ckpt on the test set", "total energy within"],
        "data-doctor": ["error force sign []", "error close contacts [9]", "warning duplicates [60]"],
    }
    for words in expected[path.stem]:
        assert words in heard.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_shows_its_cells(path) -> None:
    page = (DOCS / "tutorials" / f"{path.stem}.md").read_text(encoding="utf-8")
    at = 0
    for _, source in cells_of(path):
        at = page.find(source, at)
        assert at >= 0, f"run: python tools/build_docs_tutorials.py\n{source}"
    assert f"tutorials/{path.stem}.md" in (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
