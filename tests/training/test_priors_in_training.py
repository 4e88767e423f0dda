"""Priors of every origin are trained beside a network, stored, and found again."""

from __future__ import annotations

import pytest
import torch
from toy_data import Toy
from toy_runs import one_thread, train_toy  # noqa: F401 (fixture)

from torchmdnet.checkpoint import load_model, read_checkpoint

OWN = '''
from torchmdnet.graph import sum_to_systems
from torchmdnet.priors.base import BasePrior


class Tether(BasePrior):
    """A harmonic pull towards the origin."""

    def __init__(self, k=0.1, dataset=None):
        super().__init__(dataset)
        self.k = k
        self.unit = None if dataset is None else dataset.energy_unit

    def get_init_args(self):
        return {"k": self.k}

    def per_system(self, graph):
        return sum_to_systems(0.5 * self.k * graph.pos.square().sum(dim=1, keepdim=True), graph)


class FromLongAgo(BasePrior):
    """Written for release 2, with the hooks of that time."""

    def __init__(self, shift, dataset=None):
        super().__init__()
        self.shift = shift

    def get_init_args(self):
        return {"shift": self.shift}

    def pre_reduce(self, x, z, pos, batch, extra_args=None):
        return x + self.shift * z[:, None].to(x)

    def post_reduce(self, y, z, pos, batch, box=None, extra_args=None):
        return 2 * y
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> None:
    (tmp_path / "priors_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_own_and_built_in_priors_are_trained_together_and_come_back(tmp_path) -> None:
    priors = [
        "LearnableAtomref",
        {"D3": {"functional": "pbe", "cutoff_distance": 8.0}},
        {"ZBL": {"cutoff_distance": 2.0}},
        {"priors_of_mine:Tether": {"k": 0.3}},
        {"priors_of_mine:FromLongAgo": {"shift": 0.01}},
    ]
    folder = train_toy(tmp_path / "run", prior_model=priors, num_epochs=2, precision=64)
    stored = read_checkpoint(folder / "best.ckpt")["hyper_parameters"]
    kept = stored["prior_args"]
    assert [sorted(entry) for entry in kept[3:]] == [["k"], ["shift"]]
    assert kept[1]["s8"] == 0.7875
    assert kept[1]["energy_scale"] == pytest.approx(1.602176634e-19)  # the toy data are in eV
    model = load_model(folder / "best.ckpt")
    assert [type(prior).__name__ for prior in model.prior_model] == [
        "LearnableAtomref",
        "D3",
        "ZBL",
        "Tether",
        "FromLongAgo",
    ]
    table, start = model.prior_model[0].atomref.weight, model.prior_model[0].initial_atomref
    assert not torch.equal(table, start)
    assert torch.equal(start, torch.zeros_like(start))

    sample = Toy()[0]
    z, pos = sample.z, sample.pos.double()
    energy, _ = model(z, pos)
    bare = load_model(folder / "best.ckpt", derivative=False)
    bare.prior_model = None
    expected = bare(z, pos)[0] + table[z].sum() + 0.01 * float(z.sum())
    for prior in list(model.prior_model)[1:4]:
        zero = torch.zeros(1, 1, dtype=torch.float64)
        expected = expected + prior.post_reduce(zero, z, pos, torch.zeros_like(z))
    torch.testing.assert_close(energy, 2 * expected, rtol=1e-10, atol=1e-10)


def test_delta_learning_beside_a_prior_gives_totals_when_asked(tmp_path) -> None:
    folder = train_toy(
        tmp_path / "run", num_epochs=1, remove_ref_energy=True, prior_model={"ZBL": {"cutoff_distance": 2.0}}
    )
    sample = Toy()[0]
    relative, total = (
        load_model(folder / "best.ckpt", derivative=False, **options)(sample.z, sample.pos.float())[0].detach()
        for options in ({}, {"remove_ref_energy": False})
    )
    table = load_model(folder / "best.ckpt").prior_model[-1].initial_atomref
    assert (total - relative).item() == pytest.approx(table[sample.z].sum().item(), rel=1e-5)
