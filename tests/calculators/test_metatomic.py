"""metatomic, with the real program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.testing import cell_of_atoms, tiny_model

metatomic = pytest.importorskip("metatomic.torch", reason="metatomic-torch is not installed")
pytest.importorskip("metatomic_ase", reason="metatomic-ase is not installed")

from metatensor.torch import Labels  # noqa: E402
from metatomic_ase import MetatomicCalculator  # noqa: E402

from torchmdnet.calculators.metatomic import export_metatomic  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
NAMES = [
    name if name == "tensornet" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("tensornet", "tensornet2", "equivariant-transformer", "graph-network")
]


def model_of(name: str, *, energy: str = "eV", length: str = "Å", **options):
    model = tiny_model(name, num_layers=1, charge=True, **options)
    model.provenance = {"units": {"energy": energy, "length": length}}
    return model


def crystal() -> Atoms:
    z, pos, _, box, _ = cell_of_atoms(7)
    return Atoms(z.numpy(), pos.numpy(), cell=box.numpy(), pbc=True)


def expect_the_same(file: Path, model, atoms: Atoms) -> None:
    ours, theirs = atoms.copy(), atoms.copy()
    ours.info["charge"] = 1
    ours.calc = TMDNETCalculator(model, dtype="float64")
    theirs.calc = MetatomicCalculator(str(file), device="cpu")
    assert theirs.get_potential_energy() == pytest.approx(ours.get_potential_energy(), rel=1e-7)
    np.testing.assert_allclose(theirs.get_forces(), ours.get_forces(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(theirs.get_potential_energies(), ours.get_potential_energies(), rtol=1e-7)
    if atoms.cell.rank == 3:
        np.testing.assert_allclose(theirs.get_stress(), ours.get_stress(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_energies_forces_stress_and_atoms_are_those_of_the_model(name, tmp_path: Path):
    model = model_of(name)
    export_metatomic(model, tmp_path / "model.pt", charge=1)
    for atoms in (crystal(), molecule("CH3OH"), Atoms("N")):
        expect_the_same(tmp_path / "model.pt", model, atoms)


def test_units_are_declared(tmp_path: Path):
    model = model_of("tensornet", energy="Hartree", length="Bohr", cutoff_upper=7.0)
    written = export_metatomic(model, tmp_path / "model.pt", charge=1)
    capabilities = written.capabilities()
    assert (capabilities.length_unit, capabilities.dtype) == ("bohr", "float64")
    assert capabilities.outputs["energy"].unit == "Hartree"
    assert capabilities.interaction_range == 14.0
    assert 8 in capabilities.atomic_types
    expect_the_same(tmp_path / "model.pt", model, crystal())


def test_selected_atoms_are_those_that_count(tmp_path: Path):
    model, atoms = model_of("tensornet"), molecule("CH3OH")
    export_metatomic(model, tmp_path / "model.pt", charge=1)
    loaded = metatomic.load_atomistic_model(str(tmp_path / "model.pt"))
    systems = metatomic.systems_to_torch([atoms, molecule("H2O")], dtype=torch.float64)
    from vesin.metatomic import compute_requested_neighbors

    compute_requested_neighbors(systems, "angstrom", loaded)
    chosen = Labels(["system", "atom"], torch.tensor([[0, 1], [0, 3], [1, 0]], dtype=torch.int32))
    found = {}
    for kind in ("atom", "system"):
        output = metatomic.ModelOutput(unit="eV", sample_kind=kind)
        options = metatomic.ModelEvaluationOptions("angstrom", {"energy": output}, chosen)
        found[kind] = loaded(systems, options, check_consistency=True)["energy"].block().values[:, 0]
    z, pos = torch.tensor(atoms.numbers), torch.tensor(atoms.positions)
    expected = model.per_atom(z, pos, q=torch.ones(1, dtype=torch.float64))[[1, 3], 0].detach()
    torch.testing.assert_close(found["atom"][:2].detach(), expected)
    torch.testing.assert_close(found["system"], torch.stack([found["atom"][:2].sum(), found["atom"][2]]))


def test_the_file_needs_no_other_package(tmp_path: Path):
    export_metatomic(model_of("tensornet"), tmp_path / "model.pt")
    code = (
        "import sys, ase.build; from metatomic_ase import MetatomicCalculator; atoms = ase.build.molecule('H2O');"
        "atoms.calc = MetatomicCalculator(sys.argv[1], device='cpu'); print(atoms.get_potential_energy());"
        "assert not any(name.startswith('torchmdnet') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, cwd=tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    model = model_of("tensornet")
    with pytest.raises(ValueError, match=r"Name it model\.pt"):
        export_metatomic(model, tmp_path / "model.pt2")
    with_pairs = model_of(
        "tensornet", prior_model=[{"ZBL": {"cutoff_distance": 4.0, "distance_scale": 1e-10, "energy_scale": 1.6e-19}}]
    )
    with pytest.raises(ValueError, match="no plain sum over atoms"):
        export_metatomic(with_pairs, tmp_path / "model.pt")
    model.provenance = {}
    with pytest.raises(ValueError, match="does not state them"):
        export_metatomic(model, tmp_path / "model.pt")
