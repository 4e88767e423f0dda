"""Calculators capture what comes again and again, and go on plainly where that fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.calculators.batches import BatchPotential
from torchmdnet.testing import small_molecules, tiny_model

SYSTEMS = small_molecules()


class Replay:
    """Stands for a CUDA graph: calls the function it was given."""

    made: list[Replay] = []
    replays = 0

    def __init__(self, function, inputs, warmup_steps) -> None:
        self.function = function
        Replay.made.append(self)

    def __call__(self, *inputs):
        Replay.replays += 1
        return self.function(*inputs)

    def release(self) -> None:
        Replay.made.remove(self)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr("torchmdnet.calculators.captured.CudaGraph", Replay)
    monkeypatch.setattr(Replay, "made", [])
    monkeypatch.setattr(Replay, "replays", 0)


def ask(potential: BatchPotential, **options):
    return potential(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, num_systems=int(SYSTEMS.batch.max()) + 1, **options)


def test_batches_are_captured_at_the_third_call_of_a_kind_whatever_their_size():
    plain = BatchPotential(tiny_model("tensornet"), dtype="float64")
    quick = BatchPotential(tiny_model("tensornet"), dtype="float64")
    quick.captured.wanted = True
    numbers = []
    for _ in range(4):
        found, expected = ask(quick), ask(plain)
        torch.testing.assert_close(found.energy, expected.energy)
        torch.testing.assert_close(found.forces, expected.forces)
        numbers.append(len(Replay.made))
    assert numbers == [0, 0, 1, 1]
    assert Replay.replays >= 2
    before = Replay.replays
    ask(quick, with_virial=True)  # another kind, which is called plainly at first
    assert Replay.replays == before
    assert len(quick.captured.steps) == 2


def test_nothing_is_captured_on_the_cpu_unless_asked_to():
    potential = BatchPotential(tiny_model("tensornet"))
    for _ in range(4):
        ask(potential)
    assert Replay.made == []


@pytest.mark.parametrize("kind", ["ase", "batches"])
def test_a_model_that_cannot_be_captured_runs_plainly_and_says_so_once(kind, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("torchmdnet.calculators.captured.CudaGraph", refuse)
    atoms, found = molecule("H2O"), []
    calculator = TMDNETCalculator(tiny_model("tensornet"))
    potential = BatchPotential(tiny_model("tensornet"))
    for each in (calculator, potential):
        each.captured.wanted = True
    for _ in range(5):
        if kind == "ase":
            atoms.positions[0, 0] += 0.01
            found.append(calculator.get_property("energy", atoms))
        else:
            found.append(float(ask(potential).energy[0]))
    assert np.isfinite(found).all()
    assert caplog.text.count("cannot be captured (operation not permitted when stream is capturing)") == 1
    assert (calculator if kind == "ase" else potential).captured.wanted is False


def test_compiled_calculators_are_not_captured():
    calculator = TMDNETCalculator(tiny_model("tensornet"), compile=True)
    assert calculator.captured.wanted is False
