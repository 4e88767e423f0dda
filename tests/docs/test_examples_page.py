"""The page of the examples: every file is on it, with the model and the data that it names, and its code runs."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import REPOSITORY
from doc_pages import Reader, blocks_of, folder_of_its_own, train

PAGE = REPOSITORY / "examples" / "README.md"
MODELS = {"tensornet": "TensorNet", "equivariant-transformer": "equivariant transformer"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_in_the_table_with_its_model_and_data(path) -> None:
    (row,) = re.findall(rf"^\| \[{path.name}\].*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert f"| {MODELS[settings['model']]} |" in row
    assert ("forces" in row) == bool(settings.get("derivative"))
    dataset = "your file" if settings["dataset"] == "ASE" else settings["dataset"]
    assert dataset.lower() in row.lower().replace("-", "")


def test_scripts_and_links_of_the_page_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for script in (REPOSITORY / "examples").glob("*.py"):
        assert f"[{script.name}]({script.name})" in text
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    assert "## Loading checkpoints" in text  # people are sent to examples#loading-checkpoints


def test_loading_a_checkpoint_as_the_page_does_works(tmp_path) -> None:
    words = ["--conf", "examples/quickstart.yaml", "--dataset-arg", "level=wB97X", "--embedding-dimension", "8"]
    words += ["--num-epochs", "1", "--report", "false", "--log-dir", "runs/quickstart"]
    with folder_of_its_own(tmp_path):
        train(words, only_resolve=False)
        reader = Reader()
        for block in blocks_of(PAGE):
            reader.follow(block)
    assert reader.names["forces"].shape == (3, 3)
