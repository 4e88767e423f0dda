"""Every data set has a page, made from its class, whose example can be written into a configuration."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import yaml
from conftest import REPOSITORY, load_tool

from torchmdnet.datasets import DATASETS

PAGES = REPOSITORY / "docs" / "data-sets"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("build_docs_data_sets.py")


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_of_a_data_set_is_made_from_its_class(tool, name):
    page = (PAGES / tool.file_of(name)).read_text(encoding="utf-8")
    assert page == tool.page(name), "run: python tools/build_docs_data_sets.py"


def test_there_is_a_page_for_every_data_set_and_all_are_in_the_navigation(tool):
    files = {f"data-sets/{tool.file_of(name)}" for name in DATASETS}
    assert {f"data-sets/{path.name}" for path in PAGES.iterdir()} == files
    assert set(re.findall(r"data-sets/\w+\.md", (REPOSITORY / "mkdocs.yml").read_text())) == files
    assert set(re.findall(r"data-sets/\w+\.md", (REPOSITORY / "docs/data-sets.md").read_text())) == files


@pytest.mark.parametrize("name", DATASETS)
def test_the_example_of_a_page_is_a_configuration(tool, name, tmp_path, monkeypatch):
    import inspect

    from torchmdnet.config import resolve

    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"## Use\n\n```yaml\n(.*?)```", tool.page(name), re.DOTALL)
    (tmp_path / "example.yaml").write_text(text)
    args = resolve(["--conf", "example.yaml"])
    assert args.dataset == name
    assert set(yaml.safe_load(text).get("dataset_arg", {})) <= set(inspect.signature(DATASETS[name]).parameters)


@pytest.mark.parametrize("name", [name for name in DATASETS if hasattr(DATASETS[name], "remotes")])
def test_the_addresses_of_a_published_set_are_on_its_page(tool, name):
    page, remotes = tool.page(name), list(tool.remotes_of(DATASETS[name]))
    if not remotes:
        assert name in ("Ace", "QM9q")  # files of yours
    for remote in remotes:
        assert f"`{remote.path}`" in page
        assert all(f"<{url}>" in page for url in remote.urls)
        assert remote.checksum is None or remote.checksum in page


def test_docstrings_become_markdown(tool):
    text = (
        "See :class:`~a.b.C` and ``x``, https://doi.org/10.1/x.\n\n=== ====\na   b\n=== ====\n1   2\n    3\n=== ====\n"
    )
    assert tool.markdown(text) == (
        "See `C` and `x`, <https://doi.org/10.1/x>.\n\n| a | b |\n| --- | --- |\n| 1 | 2 3 |\n"
    )
