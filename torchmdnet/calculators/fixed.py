"""Steps in arrays whose shapes never change, which can be recorded once and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchmdnet.calculators.loading import members_of
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.graph import Inputs
from torchmdnet.neighbors import FixedSearch

__all__ = ["FixedStep", "with_ghosts", "without_ghosts"]

log = logging.getLogger(__name__)

#: Atoms for each pair of ghosts: the more there are, the fewer spare edges each of them receives.
ATOMS_PER_GHOSTS = 64

#: What changes from step to step, or is recorded along with it.
_TENSORS = ("z", "pos", "batch", "box", "q", "s")


class Recorder(Protocol):
    """Records a function of tensors, such as :class:`torchmdnet.calculators.cuda_graph.CudaGraph`."""

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], warmup_steps: int
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Returns what replays it."""
        ...


def with_ghosts(inputs: Inputs, num_ghosts: int, distance: float) -> Inputs:
    """The same systems and one more, of ghosts that lie apart two by two, for spare pairs to join.

    Args:
        inputs: With ``batch`` and ``num_systems``; per-atom and per-system tensors in ``extra`` are extended by zeros.
        num_ghosts: An even number.
        distance: Between the two ghosts of a pair, in the unit of the positions.
    """
    z, pos, batch, box, q, s, extra, num_systems, *_ = inputs
    assert batch is not None
    assert num_systems is not None
    apart = torch.zeros_like(pos[:1]).expand(num_ghosts // 2, 3)
    ghosts = torch.stack([apart, apart + distance * 3**-0.5], dim=1).view(num_ghosts, 3)
    if box is not None:
        boxes = box.expand(num_systems, 3, 3)
        box = torch.cat([boxes, torch.zeros_like(boxes[:1])])

    def extended(value: Tensor) -> Tensor:
        more = num_ghosts if value.shape[:1] == z.shape else 1
        return torch.cat([value, value.new_zeros(more, *value.shape[1:])])

    return inputs._replace(
        z=torch.cat([z, z.max().expand(num_ghosts)]),  # an element that every part knows, and no filter hides
        pos=torch.cat([pos, ghosts]),
        batch=torch.cat([batch, batch.new_full((num_ghosts,), num_systems)]),
        box=box,
        q=None if q is None else torch.cat([q.reshape(-1), q.new_zeros(1)]),
        s=None if s is None else torch.cat([s.reshape(-1), s.new_zeros(1)]),
        extra=None if extra is None else {name: extended(value) for name, value in extra.items()},
        num_systems=num_systems + 1,
    )


def without_ghosts(answer: Answer, num_atoms: int, num_systems: int) -> Answer:
    """The description of the systems before."""

    def cut(value: Tensor) -> Tensor:  # there are more atoms than systems
        return value[: num_systems if value.shape[0] == num_systems + 1 else num_atoms]

    return Answer(
        answer.energy[:num_systems],
        answer.forces[:num_atoms],
        None if answer.virial is None else answer.virial[:num_systems],
        None if answer.atomic is None else answer.atomic[:num_atoms],
        {name: cut(value) for name, value in answer.properties.items()},
    )


class FixedStep:
    """Asks a model again and again, with everything from the search for neighbours on recorded.

    The recording is repeated when it no longer fits: when there are more neighbours than its capacity, when shapes
    or what is given change, or when the model does. So is the room for neighbours, which grows by itself. Nothing
    between the positions and the results waits for the device; one look at the notes of the search follows.

    Modules that are no potentials find their own neighbours and are recorded as they are.

    Args:
        model: In evaluation mode.
        record: Records a function of tensors.
        warmup_steps: Plain calls before a recording.
        **options: For :func:`torchmdnet.calculators.predict.predict_members`.
    """

    def __init__(self, model: nn.Module, record: Recorder, warmup_steps: int = 12, **options: Any) -> None:
        self.model, self.record, self.warmup_steps, self.options = model, record, warmup_steps, options
        self.weights = [*model.parameters(), *model.buffers()]
        parts = [getattr(member, "representation_model", None) for member in members_of(model)]
        self.is_potential = all(hasattr(part, "encode") for part in parts)
        #: Recordings made so far.
        self.num_recordings = 0
        self._made_for: Any = None
        self._replay: Callable[..., tuple[Tensor, ...]] | None = None
        self._search: FixedSearch | None = None
        self._like: list[Answer] = []

    def __call__(self, inputs: Inputs) -> list[Answer]:
        """Answers of the model's members, as :func:`predict_members` gives them.

        Raises:
            RuntimeError: If the model cannot be recorded, or replays to something else.
        """
        kind = self._kind(inputs)
        if kind != self._made_for:
            self.make_room(inputs)
            self._replay, self._made_for = None, kind
        tensors = _tensors(inputs)
        while True:
            if self._replay is None:
                self._replay = self._recorded(inputs)
            found = self._replay(*tensors)
            if self._search is None or not self._search.outgrown():
                return self._answers(found, inputs)
            log.debug("There are more neighbours than the capacity; the step is recorded again.")
            self._replay = None

    def make_room(self, inputs: Inputs) -> None:
        """Prepare a search for systems of this size; the next call of :meth:`step` chooses its capacity."""
        num_ghosts = 2 * (1 + inputs.z.shape[0] // ATOMS_PER_GHOSTS)
        self._search = FixedSearch(num_ghosts) if self.is_potential else None

    def _kind(self, inputs: Inputs) -> Any:
        """What a recording is made for."""
        shapes = [None if x is None else (x.shape, x.dtype, x.device) for x in _tensors(inputs)]
        return shapes, inputs.num_systems, [(weight.data_ptr(), weight._version) for weight in self.weights]

    def _recorded(self, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
        def step(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return self.step(inputs._replace(**dict(zip(_TENSORS, tensors, strict=True))))

        tensors = _tensors(inputs)
        with torch.inference_mode(False):
            while True:  # chooses sizes
                step(*tensors)
                if self._search is None or not self._search.outgrown():
                    break
            replay = self.record(step, tensors, self.warmup_steps)
            self.num_recordings += 1
            moved = inputs.pos.clone()
            moved[::2] += 0.05  # Å
            elsewhere = inputs._replace(pos=moved)
            found = replay(*_tensors(elsewhere))
            if self._search is None or not self._search.outgrown():
                _expect_the_same(self._answers(found, inputs), predict_members(self.model, elsewhere, **self.options))
        return replay

    def step(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What is recorded: one call in arrays of fixed shape, and all tensors of its answers."""
        if self._search is not None:
            member: Any = members_of(self.model)[0]
            distance = float(member.representation_model.cutoff_upper)
            inputs = with_ghosts(inputs, self._search.num_ghosts, distance)._replace(search=self._search)
        self._like = predict_members(self.model, inputs, **self.options)
        return tuple(value for answer in self._like for value in _flat(answer))

    def _answers(self, found: tuple[Tensor, ...], inputs: Inputs) -> list[Answer]:
        rest, answers = iter(found), []
        for like in self._like:
            energy, forces = next(rest), next(rest)
            virial = None if like.virial is None else next(rest)
            atomic = None if like.atomic is None else next(rest)
            answers.append(Answer(energy, forces, virial, atomic, {name: next(rest) for name in like.properties}))
        if self._search is None:
            return answers
        assert inputs.num_systems is not None
        return [without_ghosts(answer, inputs.z.shape[0], inputs.num_systems) for answer in answers]


def _tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return tuple(getattr(inputs, name) for name in _TENSORS)


def _flat(answer: Answer) -> list[Tensor]:
    energy, forces, virial, atomic, properties = answer
    return [value for value in (energy, forces, virial, atomic, *properties.values()) if value is not None]


def _expect_the_same(replayed: list[Answer], plain: list[Answer]) -> None:
    for ours, theirs in zip(replayed, plain, strict=True):
        for a, b in zip(_flat(ours), _flat(theirs), strict=True):
            if not torch.allclose(a, b, rtol=1e-5, atol=1e-4 * float(b.abs().max()), equal_nan=True):
                raise RuntimeError("a replay with atoms elsewhere differs from the plain call")
