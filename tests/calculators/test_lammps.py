"""Models for LAMMPS on several domains of one box, against the undivided system."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import sys
import threading
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from daily import daily
from lammps_stand_in import Data, in_threads, owners

from torchmdnet.build import ARCHITECTURES
from torchmdnet.calculators import lammps
from torchmdnet.calculators.lammps import MLIAPModel, export_lammps
from torchmdnet.models.base import set_radial_mode
from torchmdnet.testing import tiny_model

EV = {"units": {"energy": "eV", "length": "Å"}}
CHARGE = -1.0


def model_of(name: str, **options):
    model = tiny_model(name, charge=True, **options)
    model.provenance = dict(EV)
    return model


def box_of_atoms(seed: int = 0) -> Atoms:
    """A triclinic box, along one axis shorter than the cutoff."""
    rng = np.random.default_rng(seed)
    cell = np.array([[9.0, 0, 0], [1.5, 8.0, 0], [-0.7, 0.4, 3.6]])
    grid = np.stack(np.meshgrid([0, 1, 2, 3], [0, 1, 2], [0], indexing="ij"), axis=-1).reshape(-1, 3)
    places = (grid + 0.3 + 0.1 * rng.random(grid.shape)) / [4, 3, 1]
    return Atoms(rng.choice(["H", "C", "N", "O"], len(places)), scaled_positions=places, cell=cell, pbc=True)


def undivided(model, atoms: Atoms) -> dict[str, torch.Tensor]:
    z, pos = torch.tensor(atoms.numbers), torch.tensor(atoms.positions, dtype=model.dtype)
    box, q = torch.tensor(atoms.cell.array, dtype=model.dtype), torch.tensor([CHARGE], dtype=model.dtype)
    found = model(z, pos, box=box, q=q, stress=True)
    return {
        "energy": found.energy[0, 0],
        "forces": found.forces,
        "virial": found.stress[0] * abs(np.linalg.det(atoms.cell.array)),
        "atomic": model.per_atom(z, pos, box=box, q=q)[:, 0],
    }


def divided(ours: MLIAPModel, atoms: Atoms, owner: np.ndarray, num_domains: int, monkeypatch):
    """Results and the number of exchanges."""

    def work(rank, total):
        by_thread[threading.get_ident()] = total
        data = Data(atoms, ours.element_types, 2 * ours.rcutfac, owner, rank, total)
        pickle.loads(content).compute_forces(data)
        return data.results(), data.num_exchanges

    content, by_thread = pickle.dumps(ours), {}
    monkeypatch.setattr(lammps, "_sum_over_ranks", lambda x: by_thread[threading.get_ident()](x))
    return in_threads(num_domains, work)


def expect_same(found, expected, tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value), value, rtol=tolerance, atol=tolerance)


#: Architectures with options that decide whether they run in loops or by their definitions, and what is exchanged.
CASES = [
    ("tensornet", {}),
    ("tensornet", {"equivariance_invariance_group": "SO(3)", "num_layers": 3}),
    ("tensornet2", {}),
    ("tensornet2", {"repulsion": True, "num_layers": 1}),
    ("equivariant-transformer", {}),
    ("equivariant-transformer", {"neighbor_embedding": False, "vector_cutoff": False}),
    ("graph-network", {}),
    ("graph-network", {"aggr": "mean", "system_embedding": "charge"}),
    ("transformer", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("num_domains", daily([1, 2, 4], 2))
def test_domains_have_the_numbers_of_the_whole(name, options, num_domains, monkeypatch):
    model, atoms = model_of(name, **options), box_of_atoms()
    ours = MLIAPModel(model, charge=CHARGE)
    expected = undivided(model, atoms)
    for found, _ in divided(ours, atoms, owners(atoms, num_domains), num_domains, monkeypatch):
        expect_same(found, expected)
        torch.testing.assert_close(found["atomic"].sum(), found["energy"])


def test_all_architectures_are_among_the_cases():
    names = {name for name, _ in CASES}
    assert {ARCHITECTURES[name] for name in names} == set(ARCHITECTURES.values())


def test_one_exchange_serves_each_layer_after_the_first(monkeypatch):
    """Two layers of TensorNet exchange once each: 9 x 8 numbers for an atom, 3 at a time."""
    model, atoms = model_of("tensornet"), box_of_atoms()
    for _, num in divided(MLIAPModel(model), atoms, owners(atoms, 2), 2, monkeypatch):
        assert num == 2 * 9 * 8 // 3


@pytest.mark.parametrize("name", ["tensornet", "tensornet2"])
def test_a_domain_may_be_empty(name, monkeypatch):
    model, atoms = model_of(name), box_of_atoms()
    ours = MLIAPModel(model, charge=CHARGE)
    for found, _ in divided(ours, atoms, np.zeros(len(atoms), dtype=int), 2, monkeypatch):
        expect_same(found, undivided(model, atoms))


def test_an_exchange_that_is_left_out_is_noticed(monkeypatch):
    model, atoms = model_of("tensornet"), box_of_atoms()
    monkeypatch.setattr(Data, "forward_exchange", lambda self, x, out, columns: None)
    found, _ = divided(MLIAPModel(model, charge=CHARGE), atoms, owners(atoms, 2), 2, monkeypatch)[0]
    assert abs(found["energy"] - undivided(model, atoms)["energy"]) > 1e-5


@pytest.mark.parametrize("name", ["tensornet", pytest.param("tensornet2", marks=pytest.mark.slow)])
def test_two_processes_over_gloo_have_the_numbers_of_the_whole(name, tmp_path: Path):
    model, atoms = model_of(name), box_of_atoms()
    export_lammps(model, tmp_path / "model.pkl", charge=CHARGE)
    ase.io.write(tmp_path / "box.json", atoms)
    script = str(Path(__file__).with_name("lammps_stand_in.py"))
    files = [str(tmp_path / "model.pkl"), str(tmp_path / "box.json"), str(tmp_path)]
    root = str(Path(lammps.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, script, *files, str(rank), "2"], env=environment, cwd=tmp_path)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for rank in range(2):
        expect_same(torch.load(tmp_path / f"results{rank}"), undivided(model, atoms))


def test_single_precision_is_close(monkeypatch):
    model, atoms = model_of("tensornet"), box_of_atoms()
    ours = MLIAPModel(model_of("tensornet"), dtype="float32", charge=CHARGE)
    for found, _ in divided(ours, atoms, owners(atoms, 2), 2, monkeypatch):
        expect_same(found, undivided(model, atoms), tolerance=1e-4)


def test_a_build_with_neighbours_of_ghosts_needs_no_exchange():
    """``unified FILE 1``: the energies of the ghosts that own atoms look at are computed here."""
    model = model_of("tensornet", num_layers=1)
    cluster = box_of_atoms()
    cluster.pbc = False
    ours = MLIAPModel(model, charge=CHARGE)
    data = Data(cluster, ours.element_types, 2 * ours.rcutfac, np.zeros(len(cluster), dtype=int), 0, lambda x: x)
    half = len(cluster) // 2
    data.nlocal, data.eatoms = half, np.zeros(half)  # the others are ghosts with neighbours of their own

    class Host:
        """Without exchange, and with energies that can be set, not read."""

        def __init__(self):
            self.__dict__.update({name: getattr(data, name) for name in ("nlocal", "ntotal", "elems")})
            self.rij, self.pair_i, self.pair_j = data.rij, data.pair_i, data.pair_j
            self.update_pair_forces = data.update_pair_forces

        eatoms = property(None, lambda self, value: self.__dict__.update(energies=value))

    host = Host()
    ours.compute_forces(host)
    z, pos = torch.tensor(cluster.numbers), torch.tensor(cluster.positions).requires_grad_()
    atomic = model.per_atom(z, pos, q=torch.tensor([CHARGE]).double())[:half, 0]
    np.testing.assert_allclose(host.energies, atomic.detach(), rtol=1e-10)
    (slope,) = torch.autograd.grad(atomic.sum(), pos)
    np.testing.assert_allclose(data.forces, -slope, rtol=1e-9, atol=1e-10)
    host.pair_i, host.pair_j, host.rij = (x[data.pair_i < half] for x in (data.pair_i, data.pair_j, data.rij))
    with pytest.raises(RuntimeError, match="unified FILE 1"):
        ours.compute_forces(host)


def test_units_of_the_simulation_are_those_of_lammps(monkeypatch):
    atoms, model = box_of_atoms(), model_of("tensornet", cutoff_upper=7.0)
    model.provenance = {"units": {"energy": "Hartree", "length": "Bohr"}}
    metal, real = MLIAPModel(model), MLIAPModel(model, style="real")
    (in_ev, _), (in_kcal, _) = (divided(ours, atoms, owners(atoms, 1), 1, monkeypatch)[0] for ours in (metal, real))
    assert 2 * metal.rcutfac == pytest.approx(7 * 0.529177210903)
    factor = 23.060547830619
    expect_same({name: value / factor for name, value in in_kcal.items()}, in_ev, tolerance=1e-9)
    bohr = Atoms(atoms.numbers, atoms.positions / 0.529177210903, cell=atoms.cell / 0.529177210903, pbc=True)
    z, pos = torch.tensor(bohr.numbers), torch.tensor(bohr.positions)
    energy, forces = model(z, pos, box=torch.tensor(bohr.cell.array), q=torch.zeros(1).double())
    assert in_ev["energy"].item() == pytest.approx(27.211386245988 * energy.item(), rel=1e-9)
    torch.testing.assert_close(in_ev["forces"], 27.211386245988 / 0.529177210903 * forces, rtol=1e-8, atol=1e-9)


def test_the_file_holds_the_class_and_plain_data(tmp_path: Path):
    export_lammps(model_of("tensornet"), tmp_path / "model.pkl")
    content = (tmp_path / "model.pkl").read_bytes()
    names = [argument for code, argument, _ in pickletools.genops(content) if code.name in ("GLOBAL", "INST")]
    words = [argument for code, argument, _ in pickletools.genops(content) if code.name == "SHORT_BINUNICODE"]
    assert not names
    assert words[:2] == ["torchmdnet.calculators.lammps", "MLIAPModel"]
    assert sum(code.name in ("STACK_GLOBAL", "REDUCE") for code, *_ in pickletools.genops(content)) == 1
    again = pickle.loads(content)
    assert again.element_types[:3] == ["H", "He", "Li"]
    assert again.interface is None
    assert again.rcutfac == 2.0


def test_what_cannot_be_divided_is_refused(tmp_path: Path):
    model = model_of("tensornet")
    with pytest.raises(ValueError, match="units: 'si' is not available"):
        MLIAPModel(model, style="si")
    with pytest.raises(ValueError, match=r"Name it model\.pkl"):
        export_lammps(model, tmp_path / "model.pt")
    model.mean += 1
    with pytest.raises(ValueError, match="no plain sum over atoms"):
        MLIAPModel(model)
    with pytest.raises(ValueError, match="AtomFilter hides atoms"):
        MLIAPModel(model_of("tensornet", atom_filter=1, derivative=False))
    unknown = model_of("tensornet")
    unknown.provenance = {}
    with pytest.raises(ValueError, match="does not state them"):
        MLIAPModel(unknown)
    with pytest.raises(ValueError, match="ZBL needs the positions"):
        MLIAPModel(
            model_of(
                "tensornet",
                prior_model=[{"ZBL": {"cutoff_distance": 4.0, "distance_scale": 1e-10, "energy_scale": 1.6e-19}}],
            )
        )


def test_a_sum_over_ranks_needs_mpi4py(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(RuntimeError, match=r"There are 2 ranks.* Install mpi4py"):
        lammps._sum_over_ranks(torch.ones(2))
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    assert torch.equal(lammps._sum_over_ranks(torch.ones(2)), torch.ones(2))


def test_grids_of_radial_functions_serve_too(monkeypatch):
    model, atoms = model_of("tensornet"), box_of_atoms()
    set_radial_mode(model, "grid")
    for found, _ in divided(MLIAPModel(model, charge=CHARGE), atoms, owners(atoms, 2), 2, monkeypatch):
        expect_same(found, undivided(model, atoms), tolerance=1e-7)
