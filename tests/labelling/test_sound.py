"""Structures that no calculator can answer for."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.labelling.methods import Method
from torchmdnet.labelling.sample import Sampling, _Sampler
from torchmdnet.labelling.sound import check_structure

NAN_POSITION = Atoms("H2", [[0, 0, 0], [0, 0, np.nan]])
UNSOUND = [
    (Atoms(), "no atoms"),
    (NAN_POSITION, "the position 1 is .*nan"),
    (Atoms("H2", [[0, 0, 0], [0, 0, 1e300]]), "the position 1 is .*1e[+]300"),
    (Atoms("H", [[0, 0, 0]], cell=[5, 5, 1e-3], pbc=True), r"only 0\.001 Å high"),
    (Atoms("H", [[0, 0, 0]], cell=[0.05, 0.05, 0.05], pbc=True), r"periodic images of each atom"),
    (Atoms("H", [[0, 0, 0]], cell=[[5, 0, 0], [5, 0, 0], [0, 0, 5]], pbc=True), "spans no volume"),
    (Atoms("H", [[0, 0, 0]], cell=[[5, 0, 0], [0, 0, 0], [0, 0, 5]], pbc=True), "spans no volume"),
    (Atoms("H2", [[0, 0, 0], [0, 0, 1e-9]]), r"atom 0 \(H\) and atom 1 \(H\) are 1e-09 Å apart, nearer than 5e-05 Å"),
    (Atoms("H2", [[0, 0, 0], [0, 0, 5]], cell=[5, 5, 5], pbc=True), r"an image of atom 1 \(H\) are 0 Å apart"),
    (Atoms("H", [[0, 0, 0]], cell=[5, 5, np.inf], pbc=True), "lattice vector 2 is .*inf"),
]


@pytest.mark.parametrize(("atoms", "message"), UNSOUND, ids=[message for _, message in UNSOUND])
def test_it_is_refused_before_a_calculator_sees_it(atoms, message):
    with pytest.raises(DataError, match=message):
        check_structure(atoms)
    with pytest.raises(DataError, match=message):
        Method("lj").prepare().evaluate(atoms.copy())
    with pytest.raises(DataError, match=message):
        _Sampler(Sampling("rattle"), None).prepare()((atoms.copy(), [0], 300.0))


@pytest.mark.parametrize("atoms", [molecule("H2O"), bulk("Cu"), Atoms("H", cell=[0, 0, 3], pbc=[False, False, True])])
def test_ordinary_structures_pass(atoms):
    check_structure(atoms)


@pytest.mark.parametrize(("options", "message"), [
    ({"stdev": float("nan")}, "stdev: nan"), ({"temperatures": (300.0, float("nan"))}, "temperatures: "),
    ({"timestep": float("inf")}, "timestep: inf"), ({"timestep": 1e-300}, "more than 1e[+]09"),
    ({"count": 10**12}, "more than 1e[+]09"), ({"interval": 1e300}, "more than 1e[+]09"), ({"count": 0}, "count: 0"),
])  # fmt: skip
def test_numbers_with_which_sampling_would_not_end_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling("md", **options)


@pytest.mark.parametrize("number", [119, 127, 200])
def test_atomic_numbers_that_no_element_has_are_refused(number):
    atoms = Atoms(positions=[[0, 0, 0], [0, 0, 1.5]], numbers=[6, number])
    with pytest.raises(DataError, match=f"atom 1 has the atomic number {number}, which no element has"):
        check_structure(atoms)


def test_types_of_beads_are_shown_by_their_number():
    from torchmdnet.viewer import looks_of

    assert looks_of([6, 6, 127]) == {
        6: {"r": 0.76, "c": looks_of([6])[6]["c"], "s": "C"},
        127: {"r": 1.5, "c": "#d889c8", "s": "127"},
    }
