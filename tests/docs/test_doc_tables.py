"""Tables of the pages, against the things they are about."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from doc_pages import DOCS, PAGES, blocks_of, extras, folder_of_its_own, train

from torchmdnet.config import resolve
from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.labels import USUAL_NAMES


def rows(page: str) -> list[list[str]]:
    """Cells of all rows of all tables, without the links around names."""
    lines = re.sub(r"\[(`\w+`)\]\(\S+\)", r"\1", (DOCS / page).read_text(encoding="utf-8")).splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]


def row_of(page: str, name: str) -> str:
    (row,) = [" | ".join(cells) for cells in rows(page) if cells[0] == f"`{name}`"]
    return row.replace("\\*", "*")


#: Sets whose facts are not those of a publication.
OTHERS = ("TinyQM", "ASE", "Custom", "HDF5", "Ace", "AceHF")


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in OTHERS])
def test_the_table_of_data_sets_says_what_the_classes_say(name):
    row, dataset = row_of("data-sets.md", name), DATASETS[name]
    for fact in ("energy_unit", "level_of_theory"):
        stated = getattr(dataset, fact, None)
        assert not isinstance(stated, str) or stated in row, f"{fact} {stated!r}"
    for doi in re.findall(r"doi:(\S+)", getattr(dataset, "citation", None) or ""):
        assert f"https://doi.org/{doi}" in row


@pytest.mark.parametrize("name", OTHERS[1:])
def test_data_of_a_known_layout_have_a_row(name):
    assert row_of("data-sets.md", name)


def test_the_table_of_tinyqm_says_what_the_data_say():
    from torchmdnet.datasets.tinyqm import TinyQM, levels
    from torchmdnet.elements import ATOMIC_NUMBERS

    for level in levels():
        data = TinyQM(level=level)
        _, size, elements, atoms, _ = row_of("data-sets.md", level).split(" | ")
        assert size == f"{len(data):,}"
        assert sorted(ATOMIC_NUMBERS[symbol] for symbol in elements.split()) == data.frames.elements().tolist()
        assert atoms == f"{data.frames.counts.min()} to {data.frames.counts.max()}"


@pytest.mark.parametrize("label", USUAL_NAMES)
def test_the_usual_names_of_labels_are_those_that_are_tried(label):
    (cells,) = [cells for cells in rows("own-data.md") if f"`{label}_key`" in cells]
    assert tuple(re.findall(r"`(\w+)`", cells[2])) == USUAL_NAMES[label]


def test_the_extras_are_those_of_the_project():
    named = [name for cells in rows("install.md") for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(extras())


def test_the_quickstart_has_the_settings_of_the_example():
    (block,) = [b for b in blocks_of(DOCS / "quickstart.md") if b.title == "quickstart.yaml"]
    example = (REPOSITORY / "examples" / "quickstart.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(block.text) == yaml.safe_load(example)


def recipe_of(text, tmp_path):
    """All settings that a file means, without the place where a run writes."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return {key: value for key, value in vars(resolve(["--conf", str(path)])).items() if key not in ("conf", "log_dir")}


def the_recipe(tmp_path):
    (block,) = [b for b in blocks_of(DOCS / "train.md") if b.title == "my.yaml"]
    return recipe_of(block.text, tmp_path)


def test_the_recipe_is_the_same_wherever_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (readme,) = [b.text for b in blocks_of(REPOSITORY / "README.md") if b.language == "yaml"]
    example = (REPOSITORY / "examples" / "own-data.yaml").read_text(encoding="utf-8")
    assert recipe_of(readme, tmp_path) == recipe_of(example, tmp_path) == the_recipe(tmp_path)


#: What the recipe says of training; the size of the network and the number of epochs go with the data.
TRAINING = (
    "y_loss_per_atom", "y_weight", "neg_dy_weight", "batch_size", "lr", "lr_warmup_steps", "lr_schedule",
    "model_ema_decay", "weight_decay", "weight_decay_on", "gradient_clipping",
)  # fmt: skip


@pytest.mark.parametrize(("page", "title"), [("train.md", "train.yaml"), ("own-data.md", "alloy.yaml")])
def test_further_settings_on_the_pages_train_like_the_recipe(page, title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [b for b in blocks_of(DOCS / page) if b.title == title]
    expected, found = the_recipe(tmp_path), recipe_of(block.text, tmp_path)
    assert {key: found[key] for key in TRAINING} == {key: expected[key] for key in TRAINING}


#: Measured with the loss of whole energies, for molecules of similar size.
OF_TINYQM = ("quickstart.yaml", "several-properties.yaml")


def test_everything_for_data_of_ones_own_has_a_loss_per_atom():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "examples").glob("*.yaml")}
    texts = {name: text for name, text in texts.items() if not name.startswith(("ET-", "TensorNet-"))}  # as published
    texts |= {
        b.title or b.place: b.text
        for page in PAGES
        for b in blocks_of(page)
        if b.language == "yaml" and "lr:" in b.text
    }
    texts = {name: text for name, text in texts.items() if name not in OF_TINYQM}
    assert len(texts) >= 5
    for place, text in texts.items():
        settings = yaml.safe_load(text)
        assert not settings.get("derivative") or settings["y_loss_per_atom"], place


def test_a_run_writes_the_files_and_columns_that_the_page_lists(tmp_path):
    sizes = [
        "--embedding-dimension",
        "8",
        "--num-layers",
        "0",
        "--num-rbf",
        "8",
        "--train-size",
        "32",
        "--val-size",
        "8",
    ]
    words = ["--dataset", "TinyQM", "--dataset-arg", "level=wB97X", "--model", "tensornet", "--derivative", *sizes]
    words += ["--test-size", "8", "--num-epochs", "2", "--test-interval", "1", "--save-interval", "1", "--redirect"]
    with folder_of_its_own(tmp_path):
        train([*words, "--log-dir", "run"], only_resolve=False)
        files = {path.name for path in Path("run").iterdir()}
        with open("run/metrics.csv") as file:
            columns = next(csv.reader(file))
        with open("run/errors.csv") as file:
            errors = next(csv.reader(file))
    listed = [name for cells in rows("train.md") for name in re.findall(r"`([^`]+)`", cells[0])]
    patterns = [re.sub(r"=([A-Z])\b", "=*", name) for name in listed]
    for name in files:
        assert any(Path(name).match(pattern) for pattern in patterns), f"{name} is not on the page"
    for name in listed:
        if name.endswith("_loss"):
            assert name in columns
        elif "." in name and "=" not in name:
            assert name in files, f"{name} is not written"
    assert set(columns) - set(listed) == {"epoch", "lr", "step"}
    text = (DOCS / "train.md").read_text(encoding="utf-8")
    assert all(f"`{column}`" in text for column in errors)
