"""The learning curves of ``benchmarks/learning.py`` and the page that shows them."""

import json
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import learning

from torchmdnet.models import ARCHITECTURES

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*-learning.json"))


def test_every_architecture_has_a_curve_that_falls_below_the_trivial_error():
    runs = json.loads(RESULTS[-1].read_text())["runs"]
    assert set(runs) == set(ARCHITECTURES)
    for run in runs.values():
        assert min(run["force_mae"]) < 0.5 * run["force_mae"][0]
        assert run["test"]["neg_dy_mae"] < 0.25 * run["trivial"]["neg_dy_mae"]


def test_the_page_shows_the_latest_result():
    page = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    assert learning.table(json.loads(RESULTS[-1].read_text())) in page


@pytest.mark.slow
def test_a_run_writes_errors_of_each_epoch_and_a_figure(tmp_path, monkeypatch):
    small = {"splits": None, "train_size": 32, "val_size": 16, "test_size": 16}
    monkeypatch.setattr(learning, "SHARED", {**learning.SHARED, **small})
    monkeypatch.setitem(learning.ARCHITECTURES, "graph-network", {"embedding_dimension": 8, "num_layers": 1})
    figure = tmp_path / "curves.png"
    arguments = ["--epochs", "2", "--only", "graph-network", "--out", str(tmp_path), "--figure", str(figure)]
    assert learning.main(arguments) == 0
    (path,) = tmp_path.glob("*-learning.json")
    run = json.loads(path.read_text())["runs"]["graph-network"]
    assert len(run["force_mae"]) == 2
    assert run["trivial"]["neg_dy_mae"] == pytest.approx(0.95, abs=0.35)
    assert figure.stat().st_size > 5_000
