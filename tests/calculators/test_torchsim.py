"""torch-sim, with the real program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from checkpoint_files import write_checkpoint

from torchmdnet.build import ARCHITECTURES
from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.testing import tiny_model

ts = pytest.importorskip("torch_sim", reason="torch-sim-atomistic is not installed; it needs Python 3.12")

from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from torchmdnet.calculators.torchsim import TorchMDNetModel  # noqa: E402

CPU, F64 = torch.device("cpu"), torch.float64


def model_of(name="tensornet", *, dtype=F64, **options):
    model = tiny_model(name, max_z=30, **options)
    return TorchMDNetModel(model, CPU, dtype, units="eV"), model


def crystals():
    """Crystals of different elements and shapes, a cell smaller than the cutoff, and a molecule in a box."""
    found = [bulk("Si", "diamond", a=5.43), bulk("Mg", "hcp", a=3.2, c=5.2), bulk("Fe", "bcc", a=2.87, cubic=True)]
    found.append(molecule("CH3OH", cell=[[6, 0, 0], [1, 7, 0], [-1, 0.5, 8]], pbc=True))
    for number, atoms in enumerate(found):
        atoms.rattle(0.05, seed=number)
    return found


def expect_what_ase_sees(output, systems, model, rel=1e-9):
    forces = output["forces"].split([len(atoms) for atoms in systems])
    for number, atoms in enumerate(systems):
        alone = atoms.copy()
        alone.info = atoms.info
        alone.calc = TMDNETCalculator(model, dtype="float64", units="eV")
        assert output["energy"][number].item() == pytest.approx(alone.get_potential_energy(), rel=rel)
        np.testing.assert_allclose(forces[number], alone.get_forces(), rtol=100 * rel, atol=10 * rel)
        if alone.cell.rank == 3:
            stress = alone.get_stress(voigt=False)
            np.testing.assert_allclose(output["stress"][number], stress, rtol=100 * rel, atol=10 * rel)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_sim_finds_nothing_to_object_to(name, dtype):
    """Away from perfect crystals: norms of vectors that vanish there have no gradient, which float32 shows."""
    validate_model_outputs(model_of(name, dtype=dtype)[0], CPU, dtype, state_modifier=rattled)


def rattled(state):
    """Each atom moved by its place in its system."""
    first = torch.searchsorted(state.system_idx, state.system_idx)
    place = (torch.arange(state.n_atoms) - first)[:, None] + torch.tensor([1, 2, 4])
    state.positions = state.positions + 0.05 * torch.sin(place.to(state.dtype))
    return state


def test_a_batch_has_the_numbers_of_its_systems_alone():
    ours, model = model_of()
    systems = crystals()
    state = ts.initialize_state(systems, CPU, F64)
    before = state.clone()
    output = ours(state)
    expect_what_ase_sees(output, systems, model)
    torch.testing.assert_close(output["energies"].sum(), output["energy"].sum())
    for name in ("positions", "cell", "atomic_numbers", "system_idx"):
        assert torch.equal(getattr(state, name), getattr(before, name))
    assert not any(value.requires_grad for value in output.values())


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, True), (False, False, False)])
def test_each_axis_may_be_open(pbc):
    ours, model = model_of()
    systems = crystals()
    for atoms in systems:
        atoms.pbc = pbc
    expect_what_ase_sees(ours(ts.initialize_state(systems, CPU, F64)), systems, model)


def test_molecules_without_a_cell_have_no_stress():
    ours, model = model_of()
    systems = [molecule("CH3OH"), molecule("H2O")]
    output = ours(ts.initialize_state(systems, CPU, F64))
    expect_what_ase_sees(output, systems, model)
    assert output["stress"].isnan().all()
    ours.compute_stress = ours.compute_forces = False
    assert {"forces", "stress"}.isdisjoint(ours(ts.initialize_state(systems, CPU, F64)))


@pytest.mark.parametrize(("key", "shift"), [("spin", 0), ("spin_multiplicity", 1)])
def test_charges_and_spins_are_read_from_the_extras(key, shift):
    ours, model = model_of(charge=True, spin=True, system_embedding="charge+spin")
    ours.potential._is_read = {"charge": True, "spin": True}
    model.hyper_parameters.update(charge=True, spin=True)
    systems = [molecule("CH3O"), molecule("CH2_s3B1d"), molecule("OH")]
    for atoms, charge, spin in zip(systems, (-1, 0, 1), (0, 2, 0), strict=True):
        atoms.info = {"charge": charge, "spin": spin}
    state = ts.initialize_state(systems, CPU, F64)
    with pytest.raises(ValueError, match="spin: the model was trained with spin"):
        ours(state)
    extras = {"charge": torch.tensor([-1.0, 0, 1]), key: torch.tensor([0.0, 2, 0]) + shift}
    for name, value in extras.items():
        state.system_extras[name] = value.to(F64)
    expect_what_ase_sees(ours(state), systems, model)


def test_units_of_the_file_are_converted(tmp_path):
    facts = {"units": {"energy": "Hartree", "length": "Bohr"}}
    file = write_checkpoint(tmp_path / "model.ckpt", facts=facts, cutoff_upper=7.0)
    ours = TorchMDNetModel(file, CPU, "float64")
    assert ours.cutoff == pytest.approx(7 * 0.529177210903)
    atoms = molecule("CH3OH", cell=[6, 7, 8], pbc=True)
    output = ours(ts.initialize_state([atoms], CPU, F64))
    atoms.calc = TMDNETCalculator(file, dtype="float64")
    assert output["energy"].item() == pytest.approx(atoms.get_potential_energy(), rel=1e-9)
    np.testing.assert_allclose(output["forces"], atoms.get_forces(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(output["stress"][0], atoms.get_stress(voigt=False), rtol=1e-7, atol=1e-9)


def test_an_ensemble_tells_its_spread(tmp_path):
    facts = {"units": {"energy": "eV", "length": "Å"}}
    files = [write_checkpoint(tmp_path / f"{seed}.ckpt", facts=facts, seed=seed) for seed in (0, 1, 2)]
    atoms = molecule("CH3OH")
    output = TorchMDNetModel(files, CPU, F64)(ts.initialize_state([atoms], CPU, F64))
    atoms.calc = TMDNETCalculator(files, dtype="float64")
    assert output["energy"].item() == pytest.approx(atoms.get_potential_energy(), rel=1e-9)
    assert output["energy_std"].item() == pytest.approx(atoms.calc.results["energy_std"], rel=1e-8)
    np.testing.assert_allclose(output["forces_std"], atoms.calc.results["forces_std"], rtol=1e-7, atol=1e-9)


def test_dynamics_in_a_batch_conserves_energy_and_is_that_of_each_system():
    ours, _ = model_of()
    systems = crystals()
    options = {"integrator": ts.Integrator.nve, "n_steps": 20, "temperature": 0.0, "timestep": 0.0005}
    state = ts.initialize_state(systems, CPU, F64)
    start = ours(state)["energy"]
    final = ts.integrate(state, ours, **options)
    kinetic = ts.calc_kinetic_energy(masses=final.masses, momenta=final.momenta, system_idx=final.system_idx)
    assert (kinetic > 1e-6).all()
    drift = (final.energy + kinetic - start).abs()
    assert (drift < 0.02 * kinetic).all()
    alone = ts.integrate([systems[3]], ours, **options)
    torch.testing.assert_close(final[3].positions, alone.positions, rtol=1e-9, atol=1e-9)


def test_relaxation_with_autobatching_swaps_systems_and_relaxes_cells():
    ours, model = model_of(num_layers=1)
    systems = [bulk("C", "diamond", a=a) for a in (3.5, 3.6, 3.7)]
    for number, atoms in enumerate(systems):
        atoms.rattle(0.02, seed=number)
    scalers = ts.autobatching.calculate_memory_scalers(ts.initialize_state(systems, CPU, F64))
    batcher = ts.InFlightAutoBatcher(
        ours, memory_scales_with=ours.memory_scales_with, max_memory_scaler=1.5 * max(scalers)
    )
    final = ts.optimize(
        ts.initialize_state(systems, CPU, F64),
        ours,
        optimizer=ts.Optimizer.fire,
        init_kwargs={"cell_filter": ts.CellFilter.frechet},
        convergence_fn=ts.generate_force_convergence_fn(1e-3, include_cell_forces=True),
        autobatcher=batcher,
        max_steps=15,
    )
    start = ours(ts.initialize_state(systems, CPU, F64))
    assert (final.energy < start["energy"]).all()
    assert not torch.equal(final.cell, ts.initialize_state(systems, CPU, F64).cell)
    expect_what_ase_sees(ours(final), final.to_atoms(), model, rel=1e-8)


def test_static_calculations_in_bins_keep_their_order():
    ours, _ = model_of()
    systems = crystals() * 2
    state = ts.initialize_state(systems, CPU, F64)
    scalers = ts.autobatching.calculate_memory_scalers(state)
    batcher = ts.BinningAutoBatcher(ours, max_memory_scaler=1.1 * max(scalers))
    found = ts.static(state, ours, autobatcher=batcher)
    expected = ours(state)
    for number, one in enumerate(found):
        assert one["potential_energy"].item() == pytest.approx(expected["energy"][number].item(), rel=1e-12)


def test_what_does_not_fit_is_refused():
    ours, model = model_of()
    state = ts.initialize_state([bulk("Si", "diamond", a=5.43)], CPU, torch.float32)
    with pytest.raises(ValueError, match=r"The state is torch.float32, but the model computes in torch.float64"):
        ours(state)
    with pytest.raises(ValueError, match="ends at"):
        ours(ts.initialize_state([bulk("Au", "fcc", a=4.08)], CPU, F64))
    with pytest.raises(ValueError, match="cell: forward takes a state alone"):
        ours(state, cell=None)
    with pytest.raises(ValueError, match="dtype: 'single' is not available"):
        TorchMDNetModel(model, CPU, "single")
