"""Geometries that no model can answer for are refused, or give NaN; they never give numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from daily import daily

from torchmdnet.calculators import External, TMDNETCalculator
from torchmdnet.compiled import CompiledPotential
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import DataError
from torchmdnet.export import recorded
from torchmdnet.graph import Inputs
from torchmdnet.models import ARCHITECTURES
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.optimize import optimize
from torchmdnet.testing import tiny_model

Z = torch.tensor([8, 1, 1, 6, 7, 1])
BATCH = torch.tensor([0, 0, 0, 1, 1, 1])
PLACES = torch.tensor(
    [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [3, 0, 0], [4.2, 0.1, 0], [2.8, 1, 0.2]], dtype=torch.float64
)
BOX = torch.diag(torch.tensor([6.0, 7.0, 8.0], dtype=torch.float64))
NOWHERE = [math.nan, math.inf, -math.inf]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


def tiny(name: str, dtype: torch.dtype = torch.float64, **options):
    return tiny_model(name, **options).to(dtype)


def moved(atom: int, value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    pos = PLACES.clone()
    pos[atom, 1] = value
    return pos.to(dtype)


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """As on a GPU: nothing looks at values, and definitions run."""
    for place in ("neighbors.sound", "graph", "optimize", "forces"):
        monkeypatch.setattr(f"torchmdnet.{place}.can_check", lambda _: False)
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")


# ------------------------------------------------------------------------------------------ not finite

FAR = {torch.float32: [1e5, -1e7, 1e30], torch.float64: [1e14, -1e30, 1e300]}


@pytest.mark.parametrize("box", [None, BOX], ids=["open", "periodic"])
@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_positions_that_the_precision_cannot_resolve_are_refused(name: str, dtype: torch.dtype, box) -> None:
    model = tiny(name, dtype, derivative=True)
    box = None if box is None else box.to(dtype)
    for value in FAR[dtype]:
        with pytest.raises(DataError, match=r"pos of atom 4 is .*, counting from 0, farther than .* Å from the origin"):
            model(Z, moved(4, value, dtype), BATCH, box)
    model(Z, moved(4, 1e4, dtype), BATCH, box)


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_they_are_nan_where_values_are_not_looked_at(name: str, dtype: torch.dtype, unchecked) -> None:
    model = tiny(name, dtype, derivative=True)
    for value in FAR[dtype]:
        energy, forces = model(Z, moved(4, value, dtype), BATCH)
        assert energy[0].isfinite().all()
        assert forces[:3].isfinite().all()
        assert energy[1].isnan().all()
        assert forces[3:].isnan().all()


@pytest.mark.parametrize("box", [None, BOX], ids=["open", "periodic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_positions_that_are_not_finite_are_refused_by_atom(name: str, dtype: torch.dtype, box) -> None:
    model = tiny(name, dtype)
    box = None if box is None else box.to(dtype)
    for value in NOWHERE:
        for call in (model, model.train(), model.eval().representation_model):
            with pytest.raises(ValueError, match=r"pos of atom 4 is \[4.*(nan|inf)"):
                call(Z, moved(4, value, dtype), BATCH, box)
    model.derivative = False
    with pytest.raises(ValueError, match="pos of atom 4"):
        model(Z, moved(4, math.nan, dtype), BATCH, box)


@pytest.mark.parametrize("box", [None, BOX], ids=["open", "periodic"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_values_are_not_looked_at_such_a_system_is_nan_and_no_other(name: str, box, unchecked) -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny(name, dtype)
        lattice = None if box is None else box.to(dtype)
        expected = model(Z, PLACES.to(dtype), BATCH, lattice)
        for value in NOWHERE:
            energy, forces = model(Z, moved(4, value, dtype), BATCH, lattice)
            assert energy[1].isnan().all()
            assert forces[3:].isnan().all()
            torch.testing.assert_close(energy[0], expected.energy[0])
            torch.testing.assert_close(forces[:3], expected.forces[:3])


def test_an_atom_without_neighbours_is_nan_where_it_is_not_finite(unchecked) -> None:
    energy, forces = tiny("graph-network")(torch.tensor([8]), torch.tensor([[0.0, math.nan, 0.0]]).double())
    assert energy.isnan().all()
    assert forces.isnan().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_of_edges_that_are_not_finite_are_refused(name: str) -> None:
    vec = torch.tensor([[1.0, 0, 0], [-1.0, math.nan, 0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="edge_vec of edge 1 is"):
        tiny(name).from_edges(Z[:2], torch.tensor([[0, 1], [1, 0]]), vec)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_of_edges_make_their_system_nan_where_values_are_not_looked_at(name: str, unchecked) -> None:
    vec = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [1.0, math.inf, 0], [-1.0, 0, 0]], dtype=torch.float64)
    index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    found = tiny(name).from_edges(Z[:4], index, vec, torch.tensor([0, 0, 1, 1]))
    assert found.energy[0].isfinite()
    assert found.energy[1].isnan()
    assert found.forces[:2].isfinite().all()
    assert found.forces[2:].isnan().all()


def test_total_charges_and_spins_that_are_not_finite_are_refused_by_system() -> None:
    model = tiny("tensornet", charge=True, spin=True)
    with pytest.raises(ValueError, match="q of system 1 is nan"):
        model(Z, PLACES, BATCH, q=torch.tensor([0.0, math.nan]), s=torch.zeros(2))
    with pytest.raises(ValueError, match="s of system 0 is inf"):
        model(Z, PLACES, BATCH, q=torch.zeros(2), s=torch.tensor([math.inf, 0.0]))


def test_total_charges_make_their_system_nan_where_values_are_not_looked_at(unchecked) -> None:
    energy, forces = tiny("graph-network")(Z, PLACES, BATCH, q=torch.tensor([0.0, math.nan]))
    assert energy.isnan()[:, 0].tolist() == [False, True]
    assert forces.isnan().all(dim=1).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("value", NOWHERE)
def test_boxes_that_are_not_finite_are_refused(value: float) -> None:
    box = BOX.clone()
    box[1, 1] = value
    for model in (tiny("tensornet"), tiny("graph-network", cutoff_lower=0.5)):
        with pytest.raises(ValueError, match="box 0 spans no volume"):
            model(Z, PLACES, torch.zeros_like(Z), box)


@pytest.mark.parametrize("skin", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_calculators_refuse_positions_that_are_not_finite_and_go_on_afterwards(dtype: torch.dtype, skin: float) -> None:
    external = External(tiny("tensornet"), Z[None], dtype=dtype, skin=skin)
    calculator = TMDNETCalculator(tiny("tensornet"), dtype=dtype, skin=skin, units="eV")
    far = PLACES + 50  # which are brought near the origin before they are rounded
    for box in (None, BOX):
        atoms = Atoms(Z.numpy(), far.numpy(), cell=None if box is None else box.numpy(), pbc=box is not None)
        atoms.calc = calculator
        expected, _ = external.calculate(far, box)
        for value in NOWHERE:
            broken = far.clone()
            broken[2, 0] = value
            with pytest.raises(ValueError, match="pos of atom 2 is"):
                external.calculate(broken, box)
            atoms.positions = broken.numpy()
            with pytest.raises(ValueError, match="position of atom 2"):
                atoms.get_forces()
        again, _ = external.calculate(far, box)
        torch.testing.assert_close(again, expected)
        atoms.positions = far.numpy()
        assert np.isfinite(atoms.get_forces()).all()


def test_neighbour_lists_and_ensembles_refuse_them_too() -> None:
    with pytest.raises(ValueError, match="pos of atom 1 is"):
        OptimizedDistance(0.0, 4.0)(moved(1, math.nan))
    with pytest.raises(ValueError, match="pos of atom 1 is"):
        Ensemble([tiny("tensornet", seed=seed) for seed in range(2)])(Z, moved(1, math.nan), BATCH)


def test_a_scripted_model_returns_nan() -> None:
    model = tiny("graph-network")
    script = torch.jit.script(model)
    energy, forces = script(Z, moved(4, math.nan), BATCH)
    expected = model(Z, PLACES, BATCH)
    assert energy[1].isnan()
    assert forces[3:].isnan().all()
    torch.testing.assert_close(energy[0], expected.energy[0])
    torch.testing.assert_close(forces[:3], expected.forces[:3])

    flat = torch.stack([BOX, torch.diag(torch.tensor([6.0, 6.0, 1e-7], dtype=torch.float64))])
    energy, forces = script(Z, PLACES, BATCH, flat)
    assert energy.isnan()[:, 0].tolist() == [False, True]
    assert forces.isnan().all(dim=1).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", daily(ARCHITECTURES, "graph-network"))
def test_what_was_compiled_returns_nan_for_that_system_alone(name: str, unchecked, monkeypatch) -> None:
    monkeypatch.setattr("torchmdnet.compiled.device_kind", lambda _: "cuda")
    model = tiny(name).eval()
    quick = CompiledPotential(model, backend="aot_eager")
    expected = quick.evaluate(Inputs(Z, PLACES, BATCH))
    for value in (math.nan, 1e30):
        found = quick.evaluate(Inputs(Z, moved(4, value), BATCH))
        assert not quick.is_given_up
        assert found.energy[1].isnan().all()
        assert found.forces[3:].isnan().all()
        torch.testing.assert_close(found.energy[0], expected.energy[0])
        torch.testing.assert_close(found.forces[:3], expected.forces[:3])


def test_what_was_compiled_refuses_them_and_stays_compiled() -> None:
    quick = CompiledPotential(tiny("graph-network").eval(), backend="aot_eager")
    with pytest.raises(DataError, match="pos of atom 4 is"):
        quick.evaluate(Inputs(Z, moved(4, math.nan), BATCH))
    quick.evaluate(Inputs(Z, PLACES, BATCH))
    assert not quick.is_given_up


@pytest.mark.parametrize("entry", ["edges", "positions"])
def test_what_is_exported_returns_nan_for_that_system_alone(entry: str) -> None:
    model = tiny("graph-network", num_layers=1).requires_grad_(False).eval()
    graph, _ = recorded(model, entry)
    index = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 5], [1, 0, 2, 1, 4, 3, 5, 4]])
    nothing = torch.zeros(2, dtype=torch.float64)

    def answer(pos: torch.Tensor):
        vec = pos[index[0]] - pos[index[1]]
        places = (index, vec) if entry == "edges" else (pos, index, torch.zeros_like(vec))
        return graph(Z, *places, BATCH, nothing, nothing)

    energy, forces, *_ = answer(PLACES)
    assert energy.isfinite().all()
    for value in NOWHERE:
        found, pushes, *_ = answer(moved(4, value))
        assert found[1].isnan()
        assert pushes[3:].isnan().all()
        torch.testing.assert_close(found[0], energy[0])
        torch.testing.assert_close(pushes[:3], forces[:3])


# ------------------------------------------------------------------------------------------ almost the same place

CLOSE = [5e-324, 1e-200, 1e-160, 1e-155, 1e-100, 1e-30, 1e-20, 1e-12, 1e-8, 1e-6, 1e-5]
APART = [0.0, 1e-4, 3e-4, 1e-3]


def beside(distance: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A molecule with one more atom beside the first, which is at the origin."""
    pos = torch.cat([PLACES[:3], torch.tensor([[0.0, distance, 0.0]], dtype=torch.float64)])
    return torch.tensor([8, 1, 1, 1]), pos.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_atoms_that_all_but_coincide_are_refused(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    for distance in CLOSE:
        z, pos = beside(distance, dtype)
        if not pos[3, 1]:  # rounded to the same place
            continue
        for box in (None, BOX.to(dtype)):
            with pytest.raises(ValueError, match=r"atoms (0 and 3|3 and 0), counting from 0, are .* Å apart"):
                model(z, pos, box=box)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forces_at_the_same_place_and_just_beyond_are_those_of_the_energy(name: str) -> None:
    model = {dtype: tiny(name, dtype) for dtype in (torch.float64, torch.float32)}
    for distance in APART:
        wide, single = (model[dtype](*beside(distance, dtype)) for dtype in model)
        assert wide.forces.isfinite().all()
        torch.testing.assert_close(single.energy.double(), wide.energy, rtol=1e-4, atol=1e-4)
        ours, theirs = single.forces.double(), wide.forces
        if not distance:  # there is no direction along which the two could push each other: only their sum has a value
            ours, theirs = ours[1:3], theirs[1:3]
        rounding = 1e-5 / distance if distance else 1e-4  # of a direction, in single precision
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=rounding)
        if distance:
            along, step = torch.zeros(4, 3, dtype=torch.float64), 1e-3 * distance
            along[3, 1] = step
            z, pos = beside(distance, torch.float64)
            slope = (model[torch.float64](z, pos + along).energy - model[torch.float64](z, pos - along).energy) / step
            assert float(-slope.detach() / 2) == pytest.approx(float(wide.forces[3, 1]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_atoms_that_all_but_coincide_are_nan_where_values_are_not_looked_at(name: str, unchecked) -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny(name, dtype)
        for distance in CLOSE:
            z, pos = beside(distance, dtype)
            if pos[3, 1]:
                assert model(z, pos).energy.isnan().all()
        for distance in APART:
            energy, forces = model(*beside(distance, dtype))
            assert energy.isfinite().all()
            assert forces.isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_edges_that_have_almost_no_length_are_refused(name: str) -> None:
    index = torch.tensor([[0, 1], [1, 0]])
    for distance in CLOSE:
        vec = torch.tensor([[distance, 0, 0], [-distance, 0, 0]], dtype=torch.float64)
        with pytest.raises(ValueError, match="atoms 0 and 1"):
            tiny(name).from_edges(Z[:2], index, vec)


def test_the_optimized_network_refuses_them_as_well() -> None:
    pytest.importorskip("NNPOps")
    model = optimize(tiny("graph-network", torch.float32, rbf_type="gauss", activation="ssp"))
    with pytest.raises(ValueError, match="pos of atom 1 is"):
        model(Z, moved(1, math.nan, torch.float32))


def test_what_is_wrong_with_a_structure_is_told_by_commands_in_one_line() -> None:
    """They tell errors of data so, and others with a traceback."""
    model = tiny_model("tensornet")
    z, pos = torch.tensor([8, 1]), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    flat, none = torch.diag(torch.tensor([1e-5, 1.0, 1.0])).double(), torch.ones(3, 3, dtype=torch.float64)
    for wrong in ({"pos": pos * torch.nan}, {"pos": pos * 1e-7}, {"box": flat}, {"box": none}):
        with pytest.raises(DataError):
            model(z, **{"pos": pos, **wrong})
