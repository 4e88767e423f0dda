"""The scripts in ``examples/``."""

from __future__ import annotations

import sys

import pytest
from conftest import REPOSITORY


@pytest.fixture
def ase_md(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.delitem(sys.modules, "ase_md", raising=False)
    import ase_md

    yield ase_md
    sys.modules.pop("ase_md", None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.0000042, "-0.0042 µeV"), (-0.004, "-4 µeV"), (0.0312, "0.031 meV"), (-1.26, "-1.3 meV"),
        (1234.0, "1200 meV"), (0.0, "0 µeV"), (9.96, "10 meV"),
    ],
)  # fmt: skip
def test_small_energies_keep_their_digits_and_have_a_unit(ase_md, value, text):
    assert ase_md.milli(value, "eV") == text


def test_dynamics_tells_time_energy_and_temperature_on_the_way(ase_md, tmp_path, capsys):
    from ase.build import bulk
    from ase.calculators.emt import EMT

    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    ase_md.set_temperature(atoms, 300.0, 1)
    ase_md.simulate(atoms, 20, 1.0, tmp_path / "md.traj")
    lines = capsys.readouterr().out.splitlines()
    assert "T[K]" in lines[0]
    assert len(lines) == 12
