"""TorchScript of a model gives its numbers, also where this package is not imported."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from daily import daily
from torch import Tensor, nn

from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.models import ARCHITECTURES
from torchmdnet.models.base import set_radial_mode
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.scripting import export_torchscript
from torchmdnet.testing import Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model
from torchmdnet.units import energy_factor, length_factor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
#: Making one takes seconds, so one of the architectures is for every day.
NAMES = [
    name if name == "tensornet" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(ARCHITECTURES))
]
READER = """
import sys, torch
calls = torch.load(sys.argv[1])
script = torch.jit.load(sys.argv[3])
torch.save([script(*call) for call in calls], sys.argv[2])
assert not any(name.startswith("torchmdnet") for name in sys.modules)
"""


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def structures() -> list[Systems]:
    """One system and several, open, periodic, mixed, and a single atom without edges and with images alone."""
    molecules = small_molecules(charges=True)
    cells = [cell_of_atoms(7), cell_of_atoms(1, 3.0)]
    return [molecules, molecules.system(0), molecules.system(2), *cells, mixed_boxes()]


def expect_same(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


class Models(dict[str, tuple[nn.Module, torch.jit.ScriptModule]]):
    """Small models and their scripts, made when they are asked for."""

    def __missing__(self, name: str) -> tuple[nn.Module, torch.jit.ScriptModule]:
        model = tiny_model(name, num_layers=1)
        set_radial_mode(model, "exact")
        self[name] = model, scripted(model)
        return self[name]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.mark.parametrize("name", NAMES)
def test_a_scripted_model_gives_the_numbers_of_the_model(name: str, models) -> None:
    model, script = models[name]
    for _ in range(2):  # the second time TorchScript has optimised what it saw
        for z, pos, batch, box, q in structures():
            expect_same(script(z, pos, batch=batch, box=box, q=q), model(z, pos, batch, box, q))
    z, pos, *_ = small_molecules().system(1)
    expect_same(script(z, pos), model(z, pos))
    expect_same(script(z.int(), pos, num_systems=2), model(z, pos, num_systems=2))


@pytest.mark.parametrize("name", NAMES)
def test_scripted_files_need_no_other_package(name: str, models, tmp_path: Path) -> None:
    model, script = models[name]
    calls = [tuple(systems) for systems in structures()]
    torch.save(calls, tmp_path / "calls")
    script.save(str(tmp_path / "script"))
    files = [str(tmp_path / file) for file in ("calls", "answers", "script")]
    subprocess.run([sys.executable, "-c", READER, *files], check=True, cwd=tmp_path)
    for call, answer in zip(calls, torch.load(tmp_path / "answers"), strict=True):
        expect_same(answer, model(*call))


@pytest.mark.parametrize("name", NAMES)
def test_a_scripted_model_can_be_trained_with_forces(name: str, models) -> None:
    model, script = (copy.deepcopy(module).train() for module in models[name])
    weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    others = dict(script.named_parameters())
    z, pos, batch, *_ = small_molecules()
    found = []
    for module, by_name in ((model, weights), (script, others), (script, others)):
        place = pos.clone().requires_grad_()
        energy, forces = module(z, place, batch=batch)
        loss = energy.square().sum() + forces.square().sum()
        wanted = [place, *(by_name[key] for key in weights)]
        found.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for again in found[1:]:
        for x, y in zip(again, found[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


class ForceModule(nn.Module):
    """What OpenMM-Torch is given: positions in nm, energy in kJ/mol, forces by its own backward pass."""

    def __init__(self, model: nn.Module, z: Tensor) -> None:
        super().__init__()
        self.model = model
        self.z = nn.Parameter(z, requires_grad=False)

    def forward(self, positions: Tensor, boxvectors: Tensor | None = None) -> Tensor:
        box = None if boxvectors is None else boxvectors.to(torch.float32) * 10.0
        return self.model(self.z, positions.to(torch.float32) * 10.0, box=box)[0] * 96.4853


@pytest.mark.slow
def test_a_module_around_a_loaded_model_is_scripted_frozen_and_copied(tmp_path: Path) -> None:
    save_model(tiny_model("graph-network", num_layers=1, precision=32), tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors", derivative=False)
    module = ForceModule(copy.deepcopy(model), cell_of_atoms(7).z)
    script = scripted(module)
    frozen = torch.jit.freeze(script.eval())
    forms = [script, copy.deepcopy(script), frozen, torch.jit.optimize_for_inference(frozen), module]
    pos, box = cell_of_atoms(7).pos / 10, cell_of_atoms(7).box / 10
    for lattice in (None, box):
        place = pos.clone().requires_grad_()
        expected = ForceModule(model, module.z)(place, lattice)
        (slope,) = torch.autograd.grad(expected, place)
        for form in forms:
            for _ in range(3):
                place = pos.clone().requires_grad_()
                energy = form(place, lattice)
                torch.testing.assert_close(energy, expected, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(torch.autograd.grad(energy, place)[0], slope, rtol=1e-4, atol=1e-2)


def test_what_is_scripted_shares_its_weights_under_their_names(models) -> None:
    model, script = models["tensornet"]
    own, shared = dict(model.named_parameters()), dict(script.named_parameters())
    assert own.keys() == shared.keys()
    assert all(own[name].data_ptr() == shared[name].data_ptr() for name in own)
    assert model.state_dict().keys() <= script.state_dict().keys()


def test_a_shape_that_does_not_fit_is_named(models) -> None:
    script, (z, pos, batch, *_) = models["tensornet"][1], small_molecules()
    with pytest.raises(torch.jit.Error, match="batch holds 3 systems"):
        script(z, pos, batch, torch.eye(3).expand(2, 3, 3))
    with pytest.raises(torch.jit.Error, match="batch holds 3 systems"):
        script(z, pos, batch, q=torch.zeros(2))


def expect_same_pairs(found, expected) -> None:
    """Pairs come in any order, so each column is compared in its own."""
    (index, dist, vec), (other, other_dist, other_vec) = found, expected
    columns, others = ([x] if y is None else [x, *y.T] for x, y in ((dist, vec), (other_dist, other_vec)))
    for column, another in zip(columns, others, strict=True):
        x, y = (
            torch.tensor(sorted(zip(i.tolist(), j.tolist(), values.tolist(), strict=True)), dtype=dist.dtype)
            for (i, j), values in ((index, column), (other, another))
        )
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"return_vecs": True}, marks=pytest.mark.slow),
        {"loop": True, "include_transpose": False, "resize_to_fit": False, "cutoff_lower": 1.0, "strategy": "cell"},
        pytest.param(
            {"return_vecs": True, "max_num_pairs": 3000, "resize_to_fit": False, "box": 5.1 * torch.eye(3)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_scripted_neighbour_list_finds_the_same_pairs(options: dict, tmp_path: Path) -> None:
    distance = OptimizedDistance(cutoff_upper=4.0, **{"max_num_pairs": -400, **options})
    scripted(distance).save(str(tmp_path / "distance.pt"))
    script = torch.jit.load(tmp_path / "distance.pt")
    for systems in structures():
        for dtype in (torch.float32, torch.float64):
            _, pos, batch, box, _ = systems.to(dtype)
            expect_same_pairs(script(pos, batch, box), distance(pos, batch, box))
    with pytest.raises(torch.jit.Error, match="Found num_pairs > max_num_pairs"):
        script(3 * torch.rand(1200, 3))


@pytest.mark.slow
def test_a_scripted_neighbour_list_is_differentiable_twice() -> None:
    script = scripted(OptimizedDistance(cutoff_upper=4.0, return_vecs=True))
    _, pos, batch, *_ = small_molecules()

    def values(pos: Tensor) -> tuple[Tensor, Tensor]:
        _, dist, vec = script(pos, batch)
        return dist, vec

    place = pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(values, place)
    assert torch.autograd.gradgradcheck(values, place)


PARTS = [
    ("equivariant-transformer", {"output_model": "DipoleMoment"}),
    ("equivariant-transformer", {"output_model": "VectorOutput"}),
    ("tensornet", {"output_model": "ElectronicSpatialExtent", "equivariance_invariance_group": "SO(3)"}),
    ("graph-network", {"aggr": "max", "reduce_op": "mean", "rbf_type": "gauss", "cutoff_lower": 0.6}),
    (
        "transformer",
        {"neighbor_embedding": False, "distance_influence": "none", "atom_filter": 1, "derivative": False},
    ),
    ("tensornet", {"prior_model": ["Atomref", "ZBL", "D2"], "prior_args": [{"max_z": 20}, *2 * [{}]]}),
    ("tensornet2", {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5], "repulsion": True}),
    ("tensornet2", {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5], "coulomb_cutoff": 6.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), PARTS)
def test_heads_priors_and_options_are_scripted(name: str, options: dict) -> None:
    if "prior_model" in options:
        scales = {"cutoff_distance": 4.0, "distance_scale": 1e-10, "energy_scale": 1.602e-19}
        pairs = [{**scales, "atomic_number": list(range(20))}] * 2
        options = {**options, "prior_args": [{"max_z": 20}, *pairs]}
    model = tiny_model(name, num_layers=1, **options)
    set_radial_mode(model, "exact")
    script = scripted(model)
    for systems in structures():
        z, pos, batch, box, q = systems
        has_all_pairs = name == "tensornet2" and "coulomb_cutoff" not in options
        heaviest = [int(z[batch == system].max()) for system in batch.unique()]
        is_hidden = "atom_filter" in options and min(heaviest) <= options["atom_filter"]
        if (has_all_pairs and box is not None) or is_hidden:
            continue
        expect_same(script(z, pos, batch, box, q), model(z, pos, batch, box, q))


ASKER = """
import sys, torch
folder, interface = sys.argv[1:]
script, (z, pos, box) = torch.jit.load(folder + "/force.pt"), torch.load(folder + "/system")
pos = (pos / 10).requires_grad_()
if interface == "openmm":
    energies = [script(pos), script(pos, box / 10)]
else:
    energies = [script(pos, z, box / 10, torch.tensor(3 * [periodic])) for periodic in (False, True)]
torch.save([(e.detach(), -torch.autograd.grad(e, pos)[0]) for e in energies], folder + "/answers")
assert not any(name.startswith("torchmdnet") for name in sys.modules)
"""


@pytest.mark.parametrize("interface", daily(["openmm", "gromacs"], "openmm"))
@pytest.mark.parametrize(("energy", "length"), [pytest.param("eV", "Å", marks=pytest.mark.slow), ("Hartree", "Bohr")])
def test_files_for_engines_convert_units_and_need_no_other_package(interface, energy, length, tmp_path: Path) -> None:
    model = tiny_model("tensornet", num_layers=1, charge=True, cutoff_upper=4.0 if length == "Å" else 7.0)
    model.provenance = {"units": {"energy": energy, "length": length}}
    z, pos, _, box, _ = cell_of_atoms(5, 5.0)
    numbers = z.tolist() if interface == "openmm" else None
    export_torchscript(model, tmp_path / "force.pt", interface=interface, numbers=numbers, charge=1)
    torch.save((z, pos, box), tmp_path / "system")
    subprocess.run([sys.executable, "-c", ASKER, str(tmp_path), interface], check=True, cwd=tmp_path)
    in_kj, in_nm = energy_factor(energy, "kJ/mol"), length_factor(length, "nm")
    scale, q = length_factor("Å", length), torch.ones(1, dtype=torch.float64)
    for found, cell in zip(torch.load(tmp_path / "answers"), (None, scale * box), strict=True):
        expected = model(z, scale * pos, box=cell, q=q)
        torch.testing.assert_close(found[0], in_kj * expected[0][0, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], in_kj / in_nm * expected[1], rtol=1e-9, atol=1e-8)


def test_files_for_engines_ask_for_what_they_need(tmp_path: Path) -> None:
    model = tiny_model("tensornet", num_layers=1)
    for options, words in (
        ({"interface": "amber"}, "interface: 'amber' is not available. Choose from model, openmm, gromacs"),
        ({"interface": "openmm"}, "numbers: OpenMM passes positions alone"),
        ({"interface": "gromacs"}, "units: the file of the model does not state them"),
    ):
        with pytest.raises(ValueError, match=words):
            export_torchscript(model, tmp_path / "force.pt", **options)
    with pytest.raises(ValueError, match=r"Name it force\.pt"):
        export_torchscript(model, tmp_path / "force.pth")
    assert not list(tmp_path.iterdir())
