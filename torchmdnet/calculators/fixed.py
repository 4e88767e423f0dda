"""Steps in arrays whose shapes never change, which can be recorded once and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torchmdnet.calculators.loading import members_of
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.graph import Inputs
from torchmdnet.neighbors import FixedSearch, searches_on_device
from torchmdnet.nn.modules import Weights

__all__ = ["FixedStep", "with_ghosts", "without_ghosts"]

log = logging.getLogger(__name__)

#: Atoms for each pair of ghosts where rows of neighbours hold spare edges: a ghost has about as many as an atom then.
ATOMS_PER_GHOSTS = 8

#: Calls of one kind in a row that are not worth a recording, which costs several.
PLAIN_CALLS = 2

#: What changes from step to step, or is recorded along with it.
_TENSORS = ("z", "pos", "batch", "box", "q", "s")


class Recorder(Protocol):
    """Records a function of tensors, such as :class:`torchmdnet.calculators.cuda_graph.CudaGraph`."""

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], warmup_steps: int
    ) -> Replay:
        """Returns what replays it."""
        ...


class Replay(Protocol):
    """A recorded function of tensors."""

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Its results for other values."""
        ...

    def release(self) -> None:
        """Give up its memory; it is not called again."""
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


class _Recording(NamedTuple):
    """A step as it was recorded."""

    kind: Any
    replay: Replay
    search: FixedSearch | None
    like: list[Answer]


class FixedStep:
    """Asks a model again and again, and records a step, with everything from the search for neighbours on, if it pays.

    Calls are plain until more than ``plain_calls`` of the same kind came in a row: the same shapes and weights,
    whatever the atoms. Then the step is recorded, and replayed as long as the kind stays. Another kind is answered by
    plain calls meanwhile; when it is recorded itself, the recording before is released. A recording is repeated at once
    when there are more neighbours than its capacity; its room grows by itself and never shrinks, so that this ends.

    Nothing between the positions and the results waits for the device; one look at the notes of the search follows.
    Modules that are no potentials find their own neighbours and are recorded as they are.

    Args:
        model: In evaluation mode.
        record: Records a function of tensors.
        warmup_steps: Calls in arrays of fixed shape before a recording.
        plain_calls: How many calls of a kind in a row are not worth a recording.
        skin: How far beyond the cutoff the device's list of neighbours reaches, in the unit of the positions; see
            :class:`torchmdnet.neighbors.FixedSearch`.
        **options: For :func:`torchmdnet.calculators.predict.predict_members`.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Recorder,
        warmup_steps: int = 3,
        *,
        plain_calls: int = PLAIN_CALLS,
        skin: float = 0.0,
        **options: Any,
    ) -> None:
        self.model, self.record, self.warmup_steps, self.options = model, record, warmup_steps, options
        self.plain_calls, self.skin = plain_calls, skin
        parts = [getattr(member, "representation_model", None) for member in members_of(model)]
        self.is_potential = all(hasattr(part, "encode") for part in parts)
        #: Recordings made so far.
        self.num_recordings = 0
        self._recording: _Recording | None = None
        self._weights: Weights | None = None
        self._state: Any = None
        self._last: Any = None  # kind of the last call, and how many there were in a row
        self._in_a_row = 0
        self._search: FixedSearch | None = None
        self._like: list[Answer] = []

    def __call__(self, inputs: Inputs) -> list[Answer]:
        """Answers of the model's members, as :func:`predict_members` gives them.

        Raises:
            RuntimeError: If the model cannot be recorded, or replays to something else.
        """
        kind, known = self._kind(inputs), self._recording
        if known is not None and known.kind == kind:
            self._last, self._in_a_row = kind, 0
            found = known.replay(*_tensors(inputs))
            if known.search is None or not known.search.outgrown():
                return self._answers(found, known, inputs)
            log.debug("There are more neighbours than the capacity; the step is recorded again.")
            return self._recorded(inputs, kind, known.search)
        self._in_a_row = self._in_a_row + 1 if kind == self._last else 1
        self._last = kind
        if self._in_a_row > self.plain_calls and kind is not None:
            return self._recorded(inputs, kind, None)
        return predict_members(self.model, inputs, **self.options)

    def _kind(self, inputs: Inputs) -> Any:
        """What a recording is made for; None where nothing can be, since changes of weights are not known."""
        before = self._weights
        if before is None or before.state() != self._state:
            self._weights = now = Weights([self.model])
            now.keep()
            self._state = now.state()
        if self._state is None:
            return None
        shapes = [None if x is None else (x.shape, x.dtype, x.device) for x in _tensors(inputs)]
        return shapes, inputs.num_systems, self._state

    def release(self) -> None:
        """Give up the recording, and the memory it holds."""
        known, self._recording, self._search, self._like = self._recording, None, None, []
        if known is not None:
            known.replay.release()

    def make_room(self, inputs: Inputs) -> None:
        """Prepare a search for systems of this size; the next call of :meth:`step` chooses its capacity."""
        spread = 0 if searches_on_device(inputs.pos) else inputs.z.shape[0] // ATOMS_PER_GHOSTS
        self._search = FixedSearch(2 * (1 + spread), self.skin) if self.is_potential else None

    def _recorded(self, inputs: Inputs, kind: Any, search: FixedSearch | None) -> list[Answer]:
        """Record a step and answer by it; a search that has outgrown its room takes more."""

        def step(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return self.step(inputs._replace(**dict(zip(_TENSORS, tensors, strict=True))))

        self.release()
        self.make_room(inputs)
        self._search = self._search if search is None else search
        tensors = _tensors(inputs)
        try:
            with torch.inference_mode(False):
                while True:  # chooses sizes
                    step(*tensors)
                    if self._search is None or not self._search.outgrown():
                        break
                replay = self.record(step, tensors, self.warmup_steps)
                self.num_recordings += 1
                self._recording = known = _Recording(kind, replay, self._search, self._like)
                moved = inputs.pos.clone()
                moved[::2] += 0.05  # Å
                elsewhere = inputs._replace(pos=moved)
                found = replay(*_tensors(elsewhere))
                if known.search is not None and known.search.outgrown():
                    return self._recorded(inputs, kind, known.search)  # arrays of the recording are given up
                expected = predict_members(self.model, elsewhere, **self.options)
                _expect_the_same(self._answers(found, known, inputs), expected)
                return self._answers(replay(*tensors), known, inputs)
        except RuntimeError:
            self.release()
            raise

    def step(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What is recorded: one call in arrays of fixed shape, and all tensors of its answers."""
        if self._search is not None:
            member: Any = members_of(self.model)[0]
            distance = float(member.representation_model.cutoff_upper)
            inputs = with_ghosts(inputs, self._search.num_ghosts, distance)._replace(search=self._search)
        self._like = predict_members(self.model, inputs, **self.options)
        return tuple(value for answer in self._like for value in _flat(answer))

    def _answers(self, found: tuple[Tensor, ...], known: _Recording, inputs: Inputs) -> list[Answer]:
        rest, answers = iter(found), []
        for like in known.like:
            energy, forces = next(rest), next(rest)
            virial = None if like.virial is None else next(rest)
            atomic = None if like.atomic is None else next(rest)
            answers.append(Answer(energy, forces, virial, atomic, {name: next(rest) for name in like.properties}))
        if known.search is None:
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
