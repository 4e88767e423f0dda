"""Energies of elements by least squares, against NumPy on the full system of equations."""

from __future__ import annotations

import numpy as np
import pytest

from torchmdnet.datasets.reference_energies import fit_energies, isolated_atom_energies

ELEMENTS = np.array([1, 6, 7, 8])


def compositions(count=200, seed=0):
    return np.random.default_rng(seed).integers(0, 5, (count, 4))


def values(table):
    return np.array(list(table.values()))


def test_the_fit_is_the_least_squares_solution():
    counts = compositions()
    energies = counts @ [-13.0, -1030.0, -1485.0, -2042.0] + np.random.default_rng(1).normal(size=200)
    expected = np.linalg.lstsq(counts.astype(float), energies, rcond=None)[0]
    table = fit_energies(counts, ELEMENTS, energies)
    assert list(table) == ELEMENTS.tolist()
    np.testing.assert_allclose(values(table), expected, rtol=1e-12)


def test_repeated_compositions_count_as_often_as_they_occur():
    counts = np.repeat([[2, 0, 0, 1], [4, 1, 0, 0], [0, 1, 0, 1]], [50, 3, 1], axis=0)
    energies = np.random.default_rng(0).normal(size=54)
    expected = np.linalg.lstsq(counts[:, [0, 1, 3]].astype(float), energies, rcond=None)[0]
    np.testing.assert_allclose(values(fit_energies(counts, ELEMENTS, energies)), expected, rtol=1e-10)


def test_undetermined_energies_are_the_smallest_that_fit():
    counts = np.tile([2, 0, 0, 1], (10, 1))
    assert values(fit_energies(counts, ELEMENTS, np.full(10, 50.0))) == pytest.approx([20.0, 10.0])
    proportional = np.array([[2, 0, 0, 1], [4, 0, 0, 2], [8, 0, 0, 4]])
    assert values(fit_energies(proportional, ELEMENTS, np.array([50.0, 100.0, 200.0]))) == pytest.approx([20.0, 10.0])


def test_elements_that_do_not_occur_have_no_energy():
    assert set(fit_energies(np.array([[2, 0, 0, 1]]), ELEMENTS, np.array([1.0]))) == {1, 8}


def test_settled_energies_stay():
    counts = compositions()
    energies = counts @ [-13.0, -1030.0, -1485.0, -2042.0]
    table = fit_energies(counts, ELEMENTS, energies, {8: -2042.0, 16: -1.0})
    assert table[8] == -2042.0
    np.testing.assert_allclose(values(table), [-13.0, -1030.0, -1485.0, -2042.0], rtol=1e-10)
    only = dict(zip(ELEMENTS.tolist(), [1.0, 2.0, 3.0, 4.0], strict=True))
    assert fit_energies(counts, ELEMENTS, energies, only) == only


def test_large_energies_lose_nothing():
    counts = compositions(5000)
    truth = np.array([-13.587223, -1029.511141, -1485.014758, -2042.009526]) * 100
    np.testing.assert_allclose(values(fit_energies(counts, ELEMENTS, counts @ truth)), truth, rtol=1e-12)


def test_neutral_atoms_go_before_ions_and_low_states_before_high():
    z = np.array([1, 1, 8, 8, 8, 17])
    energies = np.array([-13.6, -13.0, -2060.0, -2042.0, -2040.0, -500.0])
    charges = np.array([0, 0, -1, 0, 0, -1])
    assert isolated_atom_energies(z, energies, charges) == {1: -13.6, 8: -2042.0, 17: -500.0}
