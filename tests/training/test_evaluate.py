import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from toy_data import Toy

from torchmdnet.training.evaluate import composition_baseline, facts_of, read_batches


def systems(*samples):
    """(atomic numbers, energy, forces) each."""
    data = [
        Data(
            z=torch.tensor(z),
            pos=torch.zeros(len(z), 3),
            y=torch.tensor([[energy]], dtype=torch.float64),
            neg_dy=torch.tensor(forces, dtype=torch.float64).reshape(len(z), 3),
        )
        for z, energy, forces in samples
    ]
    return facts_of([Batch.from_data_list(data)])


ZERO = [0.0] * 3


def test_a_known_composition_gets_the_mean_energy_of_its_training_systems():
    train = systems(([1, 1], -2.0, ZERO * 2), ([1, 1], -4.0, ZERO * 2), ([8], -50.0, ZERO))
    test = systems(([1, 1], -2.5, ZERO * 2), ([8], -50.0, ZERO))
    baseline = composition_baseline(train, test)
    assert baseline.y_mae == pytest.approx(0.25)  # 0.5 for hydrogen, 0 for oxygen
    assert baseline.y_mae_per_atom == pytest.approx(0.125)


def test_an_unknown_composition_gets_the_sum_of_its_elements():
    train = systems(([1, 1], -2.0, ZERO * 2), ([8], -50.0, ZERO))
    assert composition_baseline(train, systems(([8, 1, 1], -52.0, ZERO * 3))).y_mae == pytest.approx(0.0, abs=1e-9)


def test_the_trivial_force_is_zero():
    test = systems(([1, 1], 0.0, [3.0, 0, 0, -3.0, 0, 0]))
    baseline = composition_baseline(None, test)
    assert baseline.neg_dy_mae == pytest.approx(1.0)
    assert baseline.neg_dy_rms == pytest.approx(np.sqrt(3.0))
    assert np.isnan(baseline.y_mae)


def test_facts_count_elements_sizes_and_fields():
    facts = facts_of(read_batches(Toy(size=9), np.arange(9), size=4))
    assert facts.elements == [1, 6, 7, 8]
    assert facts.atoms.tolist() == [3, 5, 4] * 3
    assert {"z", "pos", "y", "neg_dy"} == set(facts.fields)
    assert facts.num_force_components == 3 * 36


def test_of_many_systems_an_even_selection_is_read():
    batches = list(read_batches(Toy(size=30), np.arange(30), max_systems=4, size=3))
    assert [batch.num_graphs for batch in batches] == [3, 1]
    first, last = Toy(size=30)[0], Toy(size=30)[29]
    torch.testing.assert_close(batches[0].pos[: len(first.pos)], first.pos)
    torch.testing.assert_close(batches[1].pos, last.pos)


def test_an_empty_split_has_no_facts():
    assert facts_of(read_batches(Toy(size=3), np.arange(0))) is None
