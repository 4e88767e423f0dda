"""A simulation is the same however often it is interrupted, in every ensemble."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk, molecule

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.errors import DataError
from torchmdnet.simulation import dynamics
from torchmdnet.simulation.dynamics import GROWING, Simulation, prepared, read_log
from torchmdnet.simulation.ensembles import ENSEMBLES, Protocol, degrees_of_freedom, ramped
from torchmdnet.simulation.state import State
from torchmdnet.testing import tiny_model


@pytest.fixture(scope="module")
def calculator() -> TMDNETCalculator:
    return TMDNETCalculator(tiny_model("tensornet", precision=32), units="eV")


def structure(ensemble: str):
    if ENSEMBLES[ensemble].has_barostat:
        atoms = bulk("Si", cubic=True) * (2, 2, 2)
        atoms.rattle(0.03, seed=1)
    else:
        atoms = molecule("CH3CH2OH")
        atoms.positions += 47.0  # far enough to be moved before it is rounded to single precision
    return atoms


class Killed(BaseException):
    """The end of a process, without anything being tidied up."""


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_an_interrupted_simulation_gives_the_same_files(ensemble, calculator, tmp_path, monkeypatch) -> None:
    is_ramped = ENSEMBLES[ensemble].set_temperature is not None
    protocol = Protocol(ensemble, 24, temperature=(300.0, 350.0 if is_ramped else 300.0), interval=4, log_interval=3,
                        velocity_interval=2, max_force=1e4, max_temperature=1e6)  # fmt: skip
    atoms = prepared(structure(ensemble), calculator)

    def start(name: str) -> Simulation:
        (tmp_path / name).mkdir(exist_ok=True)
        copy = atoms.copy()
        copy.calc = calculator
        return Simulation(tmp_path / name, copy, protocol)

    whole = start("whole")
    assert whole.run()
    monkeypatch.setattr(dynamics, "SAVE_SECONDS", 0.0)  # after every step
    record, calls = Simulation._record, []

    def dying(self: Simulation) -> None:
        calls.append(self.step)
        record(self)
        if self.step in (6, 7, 16) and calls.count(self.step) == 1:
            self._files["log.csv"].write(b"half a ro")
            self._files["trajectory.extxyz"].write(b"9\nProp")
            raise Killed

    monkeypatch.setattr(Simulation, "_record", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            start("parts").run()
    last = start("parts")
    assert last.step > 10
    assert last.run()
    for name in GROWING:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    np.testing.assert_array_equal(last.atoms.positions, whole.atoms.positions)
    np.testing.assert_array_equal(last.atoms.get_momenta(), whole.atoms.get_momenta())
    rows = read_log(tmp_path / "whole" / "log.csv")
    assert [row["step"] for row in rows] == list(range(0, 25, 3))
    assert ENSEMBLES[ensemble].has_barostat == (rows[0].get("volume_A3") != rows[-1].get("volume_A3"))


def test_a_state_is_read_as_it_was_written(tmp_path) -> None:
    rng = np.random.default_rng(1)
    state = State(7, rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), np.eye(3), {"a.b": np.array(0.1)},
                  {"counts": np.ones((2, 3))}, dict(rng.bit_generator.state), {"log.csv": 3}, 1.5, True)  # fmt: skip
    state.write(tmp_path / "state.npz")
    found = State.read(tmp_path / "state.npz")
    assert (found.step, found.random, found.sizes, found.seconds, found.done) == (
        7, state.random, {"log.csv": 3}, 1.5, True,
    )  # fmt: skip
    np.testing.assert_array_equal(found.positions, state.positions)
    np.testing.assert_array_equal(found.integrator["a.b"], 0.1)
    (tmp_path / "state.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="cannot be read"):
        State.read(tmp_path / "state.npz")


def test_files_that_lost_something_are_refused(calculator, tmp_path) -> None:
    protocol = Protocol("nve", 4, interval=1, log_interval=1, max_force=1e4)
    assert Simulation(tmp_path, prepared(molecule("H2O"), calculator), protocol).run()
    log = tmp_path / "log.csv"
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"log.csv has .* bytes, but had"):
        Simulation(tmp_path, prepared(molecule("H2O"), calculator), protocol)


def test_velocities_are_at_the_temperature_and_without_motion_of_the_whole(calculator, tmp_path) -> None:
    atoms = prepared(molecule("C6H6"), calculator)
    simulation = Simulation(tmp_path, atoms, Protocol("nve", 4, temperature=(200.0, 200.0)))
    assert simulation.temperature == pytest.approx(200.0)
    momenta = simulation.atoms.get_momenta()
    np.testing.assert_allclose(momenta.sum(axis=0), 0, atol=1e-9)
    arms = simulation.atoms.positions - simulation.atoms.get_center_of_mass()
    np.testing.assert_allclose(np.cross(arms, momenta).sum(axis=0), 0, atol=1e-8)
    assert simulation.freedom == 33
    assert degrees_of_freedom(simulation.atoms, ENSEMBLES["langevin"]) == 36


def test_ramps_are_linear() -> None:
    assert [ramped((100.0, 300.0), step, 10) for step in (0, 5, 10, 20)] == [100, 200, 300, 300]


def test_the_two_ends_of_a_pair_of_seeds_differ(calculator, tmp_path) -> None:
    protocol = Protocol("langevin", 2)
    momenta = []
    for number in ((0, 0), (0, 1)):
        folder = tmp_path / str(number[1])
        folder.mkdir()
        simulation = Simulation(folder, prepared(molecule("H2O"), calculator), protocol, number)
        momenta.append(simulation.atoms.get_momenta())
    assert not np.allclose(*momenta)
