"""D3 gives the energies of tad-dftd3 and simple-dftd3, and does in periodic cells what they do in molecules."""

from __future__ import annotations

import itertools
import sys

import pytest
import tad_dftd3
import tad_mctc.data
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.errors import ConfigError
from torchmdnet.graph import bare_graph
from torchmdnet.priors import PRIORS, d3
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

EV = 1.602176634e-19
UNITS = {"distance_scale": 1e-10, "energy_scale": EV}
BOHR, HARTREE = 0.529177210903, 27.211386245988  # Å, eV
FORMAMIDE = Systems(
    torch.tensor([6, 8, 7, 1, 1, 1]),
    BOHR
    * torch.tensor(
        [
            [-0.55569743203406, 1.09030425468557, 0.0],
            [0.51473634678469, 3.15152550263611, 0.0],
            [0.59869690244446, -1.16861263789477, 0.0],
            [-0.45355203669134, -2.74568780438064, 0.0],
            [2.52721209544999, -1.29200800956867, 0.0],
            [-2.63139587595376, 0.96447869452240, 0.0],
        ],
        dtype=torch.float64,
    ),
    torch.zeros(6, dtype=torch.long),
    None,
    None,
)


def energy(prior, systems: Systems, **changes) -> torch.Tensor:
    z, pos, batch, box, _ = systems._replace(**changes)
    return prior.per_system(bare_graph(z, pos, batch, box))


def of_library(functional: str, systems: Systems) -> float:
    parameters = tad_dftd3.param.get_functional_params(functional, damping="bj", dtype=torch.float64)
    parameters["s9"] = torch.tensor(0.0, dtype=torch.float64)
    return HARTREE * float(tad_dftd3.dftd3(systems.z, systems.pos / BOHR, parameters).sum())


@pytest.mark.parametrize("functional", ["pbe", "B3LYP", "r2scan", "wb97m"])
def test_molecules_have_the_energies_of_the_library(functional: str) -> None:
    prior = PRIORS["D3"](functional, **UNITS)
    for systems in (FORMAMIDE, small_molecules().system(0), small_molecules().system(1)):
        assert energy(prior, systems).item() == pytest.approx(of_library(functional, systems), rel=1e-9)


@pytest.mark.parametrize(
    ("damping", "name", "expected"),
    [  # simple-dftd3 1.7.0, PBE, two-body terms, which cuts at 60 Bohr (40 for coordination) without a step
        ("bj", "cell", -0.6531059629481659),
        ("zero", "cell", -0.5599973695897664),
        ("bj", "water", -0.009792492879983418),
        ("zero", "water", -4.121401951844998e-05),
        ("zero", "methanol", -0.0135904199868951),
    ],
)
def test_numbers_of_another_program_are_reproduced(damping: str, name: str, expected: float, monkeypatch) -> None:
    monkeypatch.setattr(d3, "SWITCHED", 1e-9)
    molecules = small_molecules()
    systems = {"cell": cell_of_atoms(), "water": molecules.system(0), "methanol": molecules.system(1)}[name]
    prior = PRIORS["D3"]("pbe", damping, cutoff_distance=60 * BOHR, **UNITS)
    assert energy(prior, systems).item() == pytest.approx(expected, rel=1e-6)


def test_the_forces_and_the_virial_of_another_program_are_reproduced(monkeypatch) -> None:
    """Recorded from simple-dftd3 1.7.0 as above: their norms in eV/Å and eV."""
    monkeypatch.setattr(d3, "SWITCHED", 1e-9)
    cell, prior = cell_of_atoms(), PRIORS["D3"]("pbe", cutoff_distance=60 * BOHR, **UNITS)
    assert cell.box is not None
    pos = cell.pos.clone().requires_grad_()
    strain = torch.eye(3, dtype=torch.float64, requires_grad=True)
    total = energy(prior, cell, pos=pos @ strain, box=cell.box @ strain)
    forces, virial = torch.autograd.grad(total.sum(), [pos, strain])
    assert forces.norm().item() == pytest.approx(0.16569842365197948, rel=1e-6)
    assert virial.norm().item() == pytest.approx(0.9005053299253618, rel=1e-6)


@pytest.mark.parametrize("open_direction", [None, 2])
def test_a_cell_has_the_energy_of_an_explicit_sum_over_images(open_direction: int | None) -> None:
    cell, cutoff = cell_of_atoms(num_atoms=4), 16.0  # Bohr
    assert cell.box is not None
    box = cell.box.clone()
    counts = [range(-4, 5)] * 3
    if open_direction is not None:
        box[open_direction], counts[open_direction] = 0, range(1)
    shifts = torch.tensor(list(itertools.product(*counts)), dtype=torch.float64) @ box / BOHR  # (T, 3)
    pos, z = cell.pos / BOHR, cell.z
    vec = pos[:, None, None] - pos[None, :, None] + shifts  # (N, N, T, 3)
    r = vec.norm(dim=-1)
    is_itself = r < 1e-8
    r = torch.where(is_itself, 1.0, r)

    def step(end: float) -> torch.Tensor:
        t = ((r - 0.9 * end) / (0.1 * end)).clamp(0, 1)
        return torch.where(is_itself, 0.0, 1 - 10 * t**3 + 15 * t**4 - 6 * t**5)

    radius = tad_mctc.data.COV_D3(dtype=torch.float64)[z]
    count = tad_dftd3.ncoord.exp_count(r, (radius[:, None] + radius)[..., None].expand_as(r)) * step(cutoff)
    reference = tad_dftd3.reference.Reference(dtype=torch.float64)
    weights = tad_dftd3.model.weight_references(z, count.sum(dim=(1, 2)), reference)
    C_6 = tad_dftd3.model.atomic_c6(z, weights, reference)[..., None]  # (N, N, 1)
    r4r2 = tad_dftd3.data.R4R2(dtype=torch.float64)[z]
    Q = (3 * r4r2[:, None] * r4r2)[..., None].expand_as(r)
    numbers = tad_dftd3.param.get_functional_params("pbe", dtype=torch.float64)
    f_6, f_8 = (tad_dftd3.damping.rational_damping(n, r, Q, numbers) for n in (6, 8))
    pairs = -C_6 * (numbers["s6"] * f_6 + numbers["s8"] * Q * f_8) * step(cutoff)
    prior = PRIORS["D3"]("pbe", cutoff_distance=cutoff * BOHR, **UNITS)
    assert energy(prior, cell, box=box).item() == pytest.approx(HARTREE * pairs.sum().item() / 2, rel=1e-10)


def test_energy_force_and_curvature_are_continuous_through_the_cutoff() -> None:
    prior = PRIORS["D3"]("pbe", cutoff_distance=6.0, **UNITS)

    def derivatives(r: float) -> torch.Tensor:
        x = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        pos = torch.stack([torch.zeros(3, dtype=torch.float64), torch.stack([x, 0 * x, 0 * x])])
        value = prior.per_system(bare_graph(torch.tensor([8, 8]), pos, torch.zeros(2).long())).sum()
        slope, curvature = torch.zeros_like(x), torch.zeros_like(x)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, x)
        return torch.stack([value, slope, curvature]).detach()

    for edge in (5.4, 6.0):
        torch.testing.assert_close(derivatives(edge - 1e-8), derivatives(edge + 1e-8), rtol=1e-5, atol=1e-9)
    assert derivatives(5.7).abs().min() > 1e-5


def test_large_systems_are_summed_piece_by_piece(monkeypatch) -> None:
    cell, prior = cell_of_atoms(), PRIORS["D3"]("pbe", cutoff_distance=8.0, **UNITS)
    assert cell.box is not None
    pos, box = cell.pos.clone().requires_grad_(), cell.box.clone().requires_grad_()

    def everything() -> list[torch.Tensor]:
        total = energy(prior, cell, pos=pos, box=box).sum()
        first = torch.autograd.grad(total, [pos, box], create_graph=True)
        second = torch.autograd.grad(torch.cat(first).pow(3).sum(), [pos, box])
        return [total.detach(), *first, *second]

    at_once = everything()
    monkeypatch.setattr(d3, "PAIRS_AT_ONCE", 100)
    for pairs_to_keep in (10**9, 0):
        monkeypatch.setattr(d3, "PAIRS_TO_KEEP", pairs_to_keep)
        for piecewise, whole in zip(everything(), at_once, strict=True):
            torch.testing.assert_close(piecewise, whole, rtol=1e-10, atol=1e-12)


def test_units_are_those_of_the_data() -> None:
    in_ev = energy(PRIORS["D3"]("pbe", **UNITS), FORMAMIDE).item()
    atomic = PRIORS["D3"]("pbe", distance_scale=BOHR * 1e-10, energy_scale=HARTREE * EV)
    in_hartree = energy(atomic, FORMAMIDE, pos=FORMAMIDE.pos / BOHR).item()
    assert in_hartree * HARTREE == pytest.approx(in_ev, rel=1e-12)
    assert atomic.cutoff_distance == pytest.approx(50.0)


def test_single_precision_has_the_same_constants() -> None:
    prior, cell = PRIORS["D3"]("pbe", **UNITS), cell_of_atoms()
    exact = energy(prior, cell)
    single = energy(prior.to(torch.float32), cell.to(torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(energy(prior.to(torch.float64), cell), exact)


def test_numbers_come_before_those_of_the_functional_and_do_without_it() -> None:
    named = PRIORS["D3"]("pbe", **UNITS)
    kept = named.get_init_args()
    assert (kept["functional"], kept["s6"], kept["s8"], kept["a1"], kept["a2"]) == ("pbe", 1.0, 0.7875, 0.4289, 4.4407)
    by_number = PRIORS["D3"](s8=0.7875, a1=0.4289, a2=4.4407, **UNITS)
    assert torch.equal(energy(by_number, FORMAMIDE), energy(named, FORMAMIDE))
    assert PRIORS["D3"]("pbe", s8=0.5, **UNITS).get_init_args()["s8"] == 0.5
    of_a_file = PRIORS["D3"](**{**kept, "functional": "a name that is not known here"})
    assert torch.equal(energy(of_a_file, FORMAMIDE), energy(named, FORMAMIDE))


def test_atoms_at_one_place_have_finite_energies_and_forces() -> None:
    for damping in ("bj", "zero"):
        pos = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        value = PRIORS["D3"]("pbe", damping, **UNITS).per_system(
            bare_graph(torch.tensor([6, 8]), pos, torch.zeros(2).long())
        )
        (slope,) = torch.autograd.grad(value.sum(), pos)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"D3: s8, a1, a2 missing. Name the functional"),
        ({"s8": 1.0, "a1": 0.4}, "D3: a2 missing"),
        ({"functional": "pbee"}, "no parameters for functional='pbee'"),
        ({"functional": "wb97m", "damping": "zero"}, "no 'zero' parameters for functional='wb97m'"),
        ({"functional": "pbe", "damping": "exact"}, "Choose from bj, bjm, zero"),
        ({"functional": "pbe", "damping": "zero", "a1": 0.4}, "a1=0.4 has no meaning with damping='zero'"),
        ({"functional": "pbe", "cutoff_distance": 0}, "cutoff_distance=0 is not valid"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PRIORS["D3"](**options, **UNITS)


def test_without_the_library_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tad_dftd3", None)
    with pytest.raises(ConfigError, match=r'pip install "torchmd-net\[d3\]"'):
        PRIORS["D3"]("pbe", **UNITS)


def test_elements_without_reference_data_are_refused_by_name() -> None:
    prior = PRIORS["D3"]("pbe", **UNITS)
    with pytest.raises(ValueError, match=r"1 \(H\) to 103 \(Lr\), but there is an atom of 104 \(Rf\)"):
        energy(prior, FORMAMIDE, z=torch.tensor([6, 8, 7, 1, 1, 104]))


def test_a_saved_model_loads_with_its_parameters(tmp_path) -> None:
    dispersion = {"functional": "pbe", "cutoff_distance": 8.0, **UNITS}
    model = tiny_model("graph-network", prior_model={"D3": dispersion})
    options = {
        **TINY,
        "model": "graph-network",
        "prior_model": "D3",
        "prior_args": [model.prior_model[0].get_init_args()],
    }
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": options, "state_dict": state}, tmp_path / "model.ckpt")
    systems = cell_of_atoms()
    for expected, found in zip(
        model(systems.z, systems.pos, box=systems.box),
        load_model(tmp_path / "model.ckpt")(systems.z, systems.pos, box=systems.box),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
