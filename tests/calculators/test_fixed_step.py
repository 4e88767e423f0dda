"""Arrays of fixed shape give what arrays of any shape give, for every part of a potential, and look at no value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from daily import daily
from torch import Tensor, nn

from torchmdnet.calculators import External
from torchmdnet.calculators.fixed import FixedStep, _Recording, with_ghosts
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.ensemble import Ensemble
from torchmdnet.graph import Inputs
from torchmdnet.models import ARCHITECTURES
from torchmdnet.neighbors import FixedSearch
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model
from torchmdnet.tracing import as_if_on

pytestmark = pytest.mark.filterwarnings("ignore:The transformer is deprecated")

SYSTEMS = {"molecules": small_molecules(charges=True), "cell": cell_of_atoms(), "boxes": mixed_boxes()}
SCALES = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19, "atomic_number": list(range(20))}
PRIORS: dict[str, dict[str, Any]] = {
    "Atomref": {"max_z": 20},
    "ZBL": {"cutoff_distance": 3.0, **SCALES},
    "D2": {"cutoff_distance": 5.0, **SCALES},
}


class Replay:
    """Repeats a function on arrays of its own, as a CUDA graph does."""

    def __init__(self, function, inputs, warmup_steps) -> None:
        self.function = function
        self.inputs = tuple(None if x is None else x.clone() for x in inputs)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for ours, theirs in zip(self.inputs, inputs, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                ours.copy_(theirs)
        return tuple(output.clone() for output in self.function(*self.inputs))

    def release(self) -> None:
        self.function = None


def first(model: nn.Module, record: Any, **options: Any) -> FixedStep:
    """Records at the first call."""
    return FixedStep(model, record, plain_calls=0, **options)


def inputs_of(systems: Systems, *, has_charges: bool = True) -> Inputs:
    box = None if systems.box is None else systems.box.reshape(-1, 3, 3)
    q = systems.q if has_charges else None
    return Inputs(systems.z, systems.pos, systems.batch, box, q, num_systems=systems.num_systems)


def expect_equal(found: list[Answer], expected: list[Answer]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in ours._asdict().items():
            other = getattr(theirs, name)
            torch.testing.assert_close(value, other, rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def expect_the_same_step(model: nn.Module, inputs: Inputs, **options: Any) -> FixedStep:
    step = first(model, Replay, **options)
    expect_equal(step(inputs), predict_members(model, inputs, **options))
    moved = inputs._replace(pos=inputs.pos + 0.02 * torch.sin(torch.arange(inputs.pos.numel())).view(-1, 3))
    expect_equal(step(moved), predict_members(model, moved, **options))
    assert step.num_recordings == 1
    return step


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("systems", daily(SYSTEMS, "molecules"))
def test_every_architecture_answers_the_same(name: str, systems: str) -> None:
    model = tiny_model(name, cutoff_lower=0.4 if systems == "molecules" else 0.0)
    options = {"with_virial": systems == "cell", "by_atom": model.is_sum_of_atoms}
    expect_the_same_step(model, inputs_of(SYSTEMS[systems]), **options)


@pytest.mark.parametrize("aggr", ["mean", "max", "average", "maximum"])
def test_every_way_of_gathering_answers_the_same(aggr: str) -> None:
    expect_the_same_step(tiny_model("graph-network", aggr=aggr), inputs_of(SYSTEMS["cell"]))


@pytest.mark.parametrize(
    "head", ["Scalar", "EquivariantScalar", "DipoleMoment", "EquivariantDipoleMoment", "ElectronicSpatialExtent"]
)
def test_every_head_for_one_number_answers_the_same(head: str) -> None:
    expect_the_same_step(tiny_model("equivariant-transformer", output_model=head), inputs_of(SYSTEMS["molecules"]))


@pytest.mark.parametrize("reduce_op", ["mean", "max", "average", "minimum"])
def test_every_reduction_answers_the_same(reduce_op: str) -> None:
    expect_the_same_step(tiny_model("tensornet", reduce_op=reduce_op), inputs_of(SYSTEMS["molecules"]))


@pytest.mark.parametrize("cutoff", [None, 4.5])
def test_charges_that_see_further_than_the_edges_answer_the_same(cutoff: float | None) -> None:
    options = {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.2], "coulomb_cutoff": cutoff}
    systems = "molecules" if cutoff is None else "boxes"
    expect_the_same_step(tiny_model("tensornet2", **options), inputs_of(SYSTEMS[systems]))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("systems", SYSTEMS)
def test_every_prior_answers_the_same(prior: str, systems: str) -> None:
    model = tiny_model("tensornet", prior_model={prior: PRIORS[prior]})
    expect_the_same_step(model, inputs_of(SYSTEMS[systems]), with_virial=systems == "cell")


def test_dispersion_that_depends_on_neighbours_answers_the_same() -> None:
    pytest.importorskip("tad_dftd3")
    options = {"functional": "pbe", "cutoff_distance": 6.0, **SCALES}
    model = tiny_model("tensornet", prior_model={"D3": options})
    expect_the_same_step(model, inputs_of(SYSTEMS["boxes"]))


def test_hidden_atoms_stay_hidden_and_ghosts_do_not_mind() -> None:
    hydrogen_first = SYSTEMS["molecules"]._replace(z=torch.tensor([1, 8, 1, 6, 8, 1, 1, 1, 1, 7]))
    expect_the_same_step(tiny_model("tensornet", atom_filter=1, derivative=False), inputs_of(hydrogen_first))


def test_properties_and_members_are_told_apart() -> None:
    names = ["dipole", "charges", "polarizability"]
    members = [tiny_model("tensornet", seed=seed, properties=dict.fromkeys(names)) for seed in range(3)]
    expect_the_same_step(Ensemble(members), inputs_of(SYSTEMS["molecules"]), with_properties=True)


def test_tensors_of_atoms_and_systems_that_came_with_the_data_are_extended() -> None:
    inputs = inputs_of(SYSTEMS["molecules"])._replace(
        extra={"partial_charges": torch.ones(10), "field": torch.ones(3, 2)}
    )
    longer = with_ghosts(inputs, 4, 3.0)
    assert longer.extra is not None
    assert longer.extra["partial_charges"].tolist() == [1.0] * 10 + [0.0] * 4
    assert longer.extra["field"].tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
    assert longer.num_systems == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_room_grows_by_itself_and_nothing_changes(name: str) -> None:
    model, cell = tiny_model(name), cell_of_atoms(30, 12.0)
    step = first(model, Replay)
    shapes = []
    for scale in (1.0, 0.95, 0.7, 0.55, 1.1):
        assert cell.box is not None
        inputs = inputs_of(cell)._replace(pos=scale * cell.pos, box=scale * cell.box[None])
        expect_equal(step(inputs), predict_members(model, inputs))
        assert step._search is not None
        shapes.append(next(iter(step._search.plans.values())).capacity)
    assert shapes[0] == shapes[1] < shapes[2] < shapes[3] == shapes[4]
    assert step.num_recordings == 3


def test_whatever_a_recording_cannot_know_makes_a_new_one() -> None:
    model = tiny_model("tensornet")
    step = first(model, Replay)
    molecules, boxes = inputs_of(SYSTEMS["molecules"]), inputs_of(SYSTEMS["boxes"])
    one = molecules._replace(q=None)
    for number, inputs in enumerate((molecules, one, boxes, molecules), start=1):
        expect_equal(step(inputs), predict_members(model, inputs))
        assert step.num_recordings == number
    with torch.no_grad():
        model.representation_model.linear.weight.mul_(1.5)
    expect_equal(step(molecules), predict_members(model, molecules))
    assert step.num_recordings == 5
    swapped = molecules._replace(z=molecules.z.flip(0))
    expect_equal(step(swapped), predict_members(model, swapped))
    assert step.num_recordings == 5


class Recorder:
    """Records as a device does, and counts; tells which recordings hold memory."""

    def __init__(self) -> None:
        self.calls = 0
        self.alive: list[Counted] = []

    def __call__(self, function, inputs, warmup_steps) -> Counted:
        assert not self.alive, "the recording before holds memory"
        for _ in range(warmup_steps):
            function(*inputs)
        self.alive.append(Counted(self, function, inputs))
        return self.alive[-1]


class Counted(Replay):
    def __init__(self, recorder: Recorder, function, inputs) -> None:
        super().__init__(function, inputs, 0)
        self.recorder = recorder

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        assert self in self.recorder.alive
        self.recorder.calls += 1
        return super().__call__(*inputs)

    def release(self) -> None:
        self.recorder.alive.remove(self)


def test_a_step_is_recorded_at_the_third_call_of_a_kind_and_replayed_from_then_on() -> None:
    model, recorder, inputs = tiny_model("tensornet"), Recorder(), inputs_of(SYSTEMS["molecules"])
    step = FixedStep(model, recorder)
    for number in range(6):
        moved = inputs._replace(pos=inputs.pos + 0.01 * number * torch.cos(torch.arange(30.0)).view(10, 3))
        expect_equal(step(moved), predict_members(model, moved))
        assert step.num_recordings == (number >= 2)
    assert recorder.calls == 2 + 3  # two when it was made: elsewhere, for the comparison, and for the answer


def test_a_set_of_different_molecules_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder, asked = tiny_model("tensornet"), Recorder(), []
    step = FixedStep(model, recorder)
    monkeypatch.setattr(
        "torchmdnet.calculators.fixed.predict_members", lambda *args, **_: asked.append(args) or ["answer"]
    )
    whole = inputs_of(SYSTEMS["molecules"], has_charges=False)
    for number in range(200):
        count = 2 + (number * 7) % 9
        batch = torch.zeros(count, dtype=torch.long)
        one = whole._replace(z=whole.z[:count], pos=whole.pos[:count], batch=batch, num_systems=1)
        assert step(one) == ["answer"]
    assert step.num_recordings == 0
    assert len(asked) == 200  # and nothing was calculated besides


def test_another_kind_is_answered_plainly_until_it_is_worth_a_recording_and_memory_is_released() -> None:
    model, recorder = tiny_model("tensornet"), Recorder()
    step = FixedStep(model, recorder)
    molecules, boxes = inputs_of(SYSTEMS["molecules"]), inputs_of(SYSTEMS["boxes"])

    def ask(inputs: Inputs, times: int) -> None:
        for _ in range(times):
            expect_equal(step(inputs), predict_members(model, inputs))

    ask(molecules, 3)
    (of_molecules,) = recorder.alive
    ask(boxes, 2)
    ask(molecules, 1)
    ask(boxes, 2)
    assert recorder.alive == [of_molecules]
    assert step.num_recordings == 1
    ask(boxes, 1)
    assert step.num_recordings == 2
    assert recorder.alive != [of_molecules]
    step.release()
    assert recorder.alive == []


def test_a_recording_that_fails_leaves_no_memory_behind() -> None:
    class Failing(Counted):
        def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
            raise RuntimeError("CUDA out of memory")

    recorder = Recorder()

    def record(function, inputs, warmup_steps):
        recorder.alive.append(Failing(recorder, function, inputs))
        return recorder.alive[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        first(tiny_model("tensornet"), record)(inputs_of(SYSTEMS["molecules"]))
    assert recorder.alive == []


def test_room_that_grew_stays_for_smaller_systems_of_the_same_kind() -> None:
    """Otherwise a set of molecules of one size would be recorded again and again."""
    model, cell, recorder = tiny_model("tensornet"), cell_of_atoms(30, 12.0), Recorder()
    step = first(model, recorder)
    for scale in (1.0, 0.6, 1.0, 0.6, 1.0, 0.6, 1.0, 0.6):
        assert cell.box is not None
        inputs = inputs_of(cell)._replace(pos=scale * cell.pos, box=scale * cell.box[None])
        expect_equal(step(inputs), predict_members(model, inputs))
    assert step.num_recordings <= 4
    assert len(recorder.alive) == 1


def test_weights_that_take_the_place_of_others_are_noticed() -> None:
    model, inputs = tiny_model("tensornet"), inputs_of(SYSTEMS["molecules"])
    step, layer = first(model, Replay), model.representation_model.linear
    step(inputs)
    for _ in range(3):  # the memory of one before the last is free to be used again
        layer.weight = nn.Parameter(1.5 * layer.weight.detach())
        expect_equal(step(inputs), predict_members(model, inputs))
    for _ in range(3):
        layer.weight.data = 0.8 * layer.weight.detach()
        expect_equal(step(inputs), predict_members(model, inputs))
    assert step.num_recordings == 7


def test_modules_that_are_no_potentials_are_recorded_as_they_are() -> None:
    class Springs(nn.Module):
        def forward(self, z: Tensor, pos: Tensor, batch: Tensor, box: Tensor | None) -> Tensor:
            return pos.new_zeros(3).index_add(0, batch, pos.square().sum(dim=1))

    expect_the_same_step(Springs(), inputs_of(SYSTEMS["molecules"], has_charges=False))


def test_a_replay_that_does_not_follow_is_refused() -> None:
    class Frozen(Replay):
        def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
            return self.function(*self.inputs)

    with pytest.raises(RuntimeError, match="differs from the plain call"):
        first(tiny_model("tensornet"), Frozen)(inputs_of(SYSTEMS["molecules"]))


# --------------------------------------------------------------------------------- as a GPU does it, interpreted


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES])
def test_a_step_whose_kernels_search_equals_a_plain_call_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ghosts take all spare edges, and nothing of them reaches an atom."""
    pytest.importorskip("triton.language")
    tiles = {"atoms": 32, "candidates": 16, "edges": 512, "others": 16, "block": 128}
    monkeypatch.setattr("torchmdnet.neighbors.device.TILES", tiles)
    cell = cell_of_atoms(3, 3.0)
    assert cell.box is not None
    inputs = inputs_of(cell)._replace(q=None)
    model = tiny_model(name, cutoff_upper=2.0).eval()
    step = FixedStep(model, Replay, skin=0.3, with_virial=True)
    with as_if_on("cuda"):
        step.make_room(inputs)
        results = step.step(inputs)
    assert step._search is not None
    assert step._search.num_ghosts == 2
    found = step._answers(results, _Recording(None, Replay(None, (), 0), step._search, step._like), inputs)
    expect_close(found, predict_members(model, inputs, with_virial=True))


def expect_close(found: list[Answer], expected: list[Answer]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------- what a CUDA graph asks of a step


def on_meta(search: FixedSearch) -> FixedSearch:
    """The same plans where tensors have shapes and no values."""
    moved = FixedSearch(search.num_ghosts)
    for key, plan in search.plans.items():
        tensors = {name: value.to("meta") for name, value in plan._asdict().items() if isinstance(value, Tensor)}
        moved.plans[key] = plan._replace(**tensors)
    return moved


def expect_no_value_to_be_looked_at(model: TorchMD_Net, inputs: Inputs, monkeypatch, **options: Any) -> None:
    step = first(model, Replay, **options)
    expected = step(inputs)
    assert step._search is not None
    there = FixedStep(copy.deepcopy(model).to("meta"), Replay, **options)
    there._search = on_meta(step._search)
    monkeypatch.setattr("torchmdnet.nn.distance.OptimizedDistance.stored_box", None)  # looked at beforehand
    for ours, theirs in zip(
        [part for part in model.modules() if hasattr(part, "radial") and hasattr(part, "check_elements")],
        [part for part in there.model.modules() if hasattr(part, "radial") and hasattr(part, "check_elements")],
        strict=True,
    ):  # tables are at hand after the calls that go before a recording
        engine: Any = ours.radial
        tables = [table.values.to("meta") for table in engine.tables.values()]

        def chosen(self, r, basis, envelope, functions, training, spline=engine.spline, tables=tables):
            known = [type("Table", (), {"tensor": lambda self, table=table: table})() for table in tables]
            self.tables = dict(zip(functions, known, strict=True))
            return spline

        theirs_engine: Any = theirs.radial
        monkeypatch.setattr(type(theirs_engine), "_choose", chosen)
    tensors = {name: value.to("meta") for name, value in inputs._asdict().items() if isinstance(value, Tensor)}
    results = there.step(inputs._replace(**tensors))
    found = there._answers(results, _Recording(None, results, there._search, there._like), inputs)  # type: ignore[arg-type]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.forces.shape == theirs.forces.shape
        assert ours.energy.shape == theirs.energy.shape


@pytest.mark.parametrize("systems", ["molecules", "boxes"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_waits_for_the_device(name: str, systems: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to wait for: reading a value, or a shape that depends on one, is an error."""
    model = tiny_model(name, cutoff_lower=0.3)
    expect_no_value_to_be_looked_at(model, inputs_of(SYSTEMS[systems]), monkeypatch, with_virial=systems == "boxes")


@pytest.mark.parametrize("prior", PRIORS)
def test_no_prior_waits_for_the_device(prior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("tensornet", prior_model={prior: PRIORS[prior]})
    expect_no_value_to_be_looked_at(model, inputs_of(SYSTEMS["boxes"]), monkeypatch)


def test_no_pair_of_charges_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.2]}
    model = tiny_model("tensornet2", **options)
    expect_no_value_to_be_looked_at(model, inputs_of(SYSTEMS["molecules"]), monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("is_periodic", [True, False])
def test_captured_steps_on_the_gpu_equal_those_on_the_cpu(name: str, is_periodic: bool, caplog) -> None:
    systems = cell_of_atoms(24, 9.0)
    model = tiny_model(name)
    quick = External(copy.deepcopy(model), systems.z, device="cuda", dtype="float64", use_cuda_graph=True)
    plain = External(model, systems.z, dtype="float64")
    for scale in (1.0, 1.01, 0.6, 1.0):
        assert systems.box is not None
        call = (scale * systems.pos, scale * systems.box if is_periodic else None)
        for ours, theirs in zip(quick.calculate(*call), plain.calculate(*call), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)
    assert "cannot be captured" not in caplog.text
    assert quick.cuda_graph is not None
    assert quick.cuda_graph.num_recordings == 2
