"""Radial filters of an architecture, evaluated pair by pair or on a grid of distances."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.modules import Weights
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.batched import one_by_one
from torchmdnet.ops.messages import RadialFilter, RadialPoints
from torchmdnet.tracing import is_recording
from torchmdnet.typing import PairFeatures, PairScalars

__all__ = ["MODES", "Radial", "RadialEngine", "RadialFunction", "RadialMode", "Tables"]

log = logging.getLogger(__name__)

RadialMode = Literal["auto", "exact", "grid"]
MODES = ("auto", "exact", "grid")

#: Error, relative to the largest value, that a grid has to reach before it is used.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-10}
#: How much larger the error of slopes may be, which converge more slowly: forces are made of them.
SLOPES = 3
#: Numbers of cells, tried in this order.
SIZES = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_NUM_PROBES = 512
#: In training the grid is chosen for a tenth of the tolerance, and again after this many evaluations.
STEPS_BETWEEN_FITS = 1000


class RadialFunction(NamedTuple):
    """A function of distance that an architecture multiplies its messages with, apart from the envelope."""

    owner: nn.Module  # holds its weights
    method: str  # of the owner: radial basis (P, K) -> (P, L, F)
    fades: bool = True  # whether the envelope multiplies it; else it counts for self loops too, at distance 0

    def __call__(self, rbf: PairFeatures) -> Tensor:
        return getattr(self.owner, self.method)(rbf)

    def parameters(self) -> list[Tensor]:
        """What it depends on."""
        return list(self.owner.parameters())


class Radial:
    """The distances of one graph, as the filters of an architecture see them.

    Nothing is computed before a filter is read.

    Args:
        dist: Distance of each pair, (P,) Å.
        basis: Radial basis, distances to (P, K).
        fade: The envelope that multiplies functions that fade.
        spline: The grid; None for pair by pair.
        tables: Tables by function; None to evaluate the functions again.
    """

    def __init__(
        self,
        dist: PairScalars,
        basis: nn.Module,
        fade: CosineCutoff,
        spline: Spline | None = None,
        tables: Tables | None = None,
    ) -> None:
        self.dist, self.basis, self.fade, self.spline, self.tables = dist, basis, fade, spline, tables
        self._envelope: Tensor | None = None
        self._rows: Tensor | None = None
        self._exact: Tensor | None = None
        self._bare: RadialPoints | None = None
        self._points: RadialPoints | None = None

    # torch.compile cannot follow functools.cached_property: it takes a lock

    @property
    def envelope(self) -> PairScalars:
        """What fades at the cutoff, of each pair, (P,)."""
        envelope = self._envelope
        if envelope is None:
            envelope = self._envelope = self.fade(self.dist)
        return envelope

    @property
    def rows(self) -> PairFeatures:
        """Radial basis where functions are evaluated: for each pair, (P, K), or at the nodes of the grid."""
        if self._rows is None:
            nodes = None if self.spline is None else self.spline.nodes(self.dist.dtype, self.dist.device)
            self._rows = self.basis(self.dist) if nodes is None else self.basis.continued(nodes)  # type: ignore[operator]
        assert self._rows is not None
        return self._rows

    @property
    def exact_rows(self) -> PairFeatures:
        """Radial basis of each pair, (P, K), with or without a grid."""
        if self.spline is None:
            return self.rows
        if self._exact is None:
            self._exact = self.basis(self.dist)
        assert self._exact is not None
        return self._exact

    @property
    def bare(self) -> RadialPoints:
        """Where each pair reads."""
        if self._bare is None:
            if self.spline is not None:
                self._bare = self.spline.locate(self.dist)
            else:
                every = torch.arange(self.dist.shape[0], device=self.dist.device)
                self._bare = RadialPoints(torch.ones_like(self.dist)[:, None], every)
        return self._bare

    @property
    def points(self) -> RadialPoints:
        """Where each pair reads what fades at the cutoff."""
        if self._points is None:
            self._points = RadialPoints(self.envelope[:, None] * self.bare.coef, self.bare.cell)
        return self._points

    def __call__(self, function: RadialFunction) -> RadialFilter:
        """Weights of all pairs through one function, (P, L, F) once read; the envelope is included if it fades."""
        points = self.points if function.fades else self.bare
        if self.spline is None:
            return RadialFilter(function(self.rows), points)
        if self.tables is None:
            return RadialFilter(self.spline.coefficients(function(self.rows)), points)
        return RadialFilter(self.tables[function].tensor(), points)


class _Table:
    """Coefficients of one function, made once from its weights, which still receive gradients when asked."""

    def __init__(self, values: Tensor, build: Callable[[], Tensor], parameters: list[Tensor]) -> None:
        self.values, self.build = values, build
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def tensor(self) -> Tensor:
        if not self.parameters or not torch.is_grad_enabled() or is_recording():
            return self.values
        return _Remembered.apply(self, *self.parameters)  # type: ignore[return-value]


class _Remembered(Function):
    """A stored table; it is computed again, tracked by autograd, only if its gradient is needed."""

    @staticmethod
    def forward(ctx: Any, table: _Table, *parameters: Tensor) -> Tensor:
        ctx.table = table
        return table.values.view_as(table.values)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        table, keep = ctx.table, torch.is_grad_enabled()
        with torch.enable_grad():
            found = torch.autograd.grad(table.build(), table.parameters, grads[0], create_graph=keep, allow_unused=True)
        return None, *found


Tables = dict[RadialFunction, _Table]


class RadialEngine:
    """Decides how the filters of an architecture are evaluated, and keeps what can be kept.

    On a grid the functions are evaluated at a few hundred distances, whatever the number of pairs, and read by a
    quintic spline. The grid is refined until it reproduces the functions to ``TOLERANCES``; where that fails, pairs
    are evaluated one by one. In evaluation mode the tables are kept until a weight changes.

    Args:
        mode: ``auto`` uses a grid where it is accurate and, in training, where there are more pairs than nodes;
            ``exact`` never; ``grid`` whenever it is accurate.
    """

    def __init__(self, mode: RadialMode = "auto") -> None:
        if mode not in MODES:
            raise ConfigError(f"radial: {mode!r} is not available. Choose from {', '.join(MODES)}.")
        self.mode: RadialMode = mode
        #: What the last call was about, for :meth:`choose_again`, and the grid it used.
        self.asked: tuple[nn.Module, CosineCutoff, Sequence[RadialFunction]] | None = None
        self.used: Spline | None = None
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> RadialEngine:
        return RadialEngine(self.mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return RadialEngine, (self.mode,)

    def forget(self) -> None:
        """Drop everything that was made from weights."""
        self.stamp: Any = None
        self.held: Weights | None = None
        self.tables: Tables = {}
        self.spline: Spline | None = None
        self.dtype: torch.dtype | None = None
        self.uses = 0
        #: Error of the grid relative to the largest value of each function; None before one was made.
        self.error: float | None = None

    def __call__(
        self,
        graph: Graph,
        basis: nn.Module,
        envelope: CosineCutoff,
        functions: Sequence[RadialFunction],
        training: bool,
    ) -> Radial:
        """Prepare one graph.

        Args:
            graph: Its pairs are read.
            basis: Radial basis, distances to (P, K).
            envelope: Multiplies the functions that fade.
            functions: All functions that will be asked for.
            training: Whether weights are about to change, so that nothing is worth keeping.
        """
        assert graph.pairs is not None
        dist = graph.pairs.dist
        self.asked = (basis, envelope, tuple(functions))
        if is_recording():
            spline = self.used
        else:
            spline = self.used = self._choose(dist, basis, envelope, functions, training)
        return Radial(dist, basis, envelope, spline, None if training or spline is None else self.tables)

    def ready(
        self, like: Tensor, basis: nn.Module, envelope: CosineCutoff, functions: Sequence[RadialFunction]
    ) -> Spline | None:
        """In evaluation mode the grid, from :attr:`tables`, before there is a graph; None for pair by pair.

        Args:
            like: Of the precision and on the device of the distances.
            basis: As in a call.
            envelope: As in a call.
            functions: As in a call.
        """
        self.asked = (basis, envelope, tuple(functions))
        self.used = self._choose(like, basis, envelope, functions, training=False)
        return self.used

    def choose_again(self, dist: PairScalars, training: bool) -> Any:
        """Have the grid ready that distances like these take, for a recording to use as it is.

        Returns:
            Something that differs where a recording has to, and is no number that another may have later.
        """
        if self.asked is None:
            return None
        self.used = self._choose(dist, *self.asked, training)
        return self.used if training or self.used is None else tuple(self.tables.values())

    def _choose(
        self,
        r: Tensor,
        basis: nn.Module,
        envelope: CosineCutoff,
        functions: Sequence[RadialFunction],
        training: bool,
    ) -> Spline | None:
        if self.mode == "exact" or r.dtype not in TOLERANCES or kernels.is_traced() or not hasattr(basis, "continued"):
            return None
        if training:
            if self.mode == "auto" and r.shape[0] <= SIZES[0]:
                return None
            if self.dtype != r.dtype or self.uses >= STEPS_BETWEEN_FITS:
                self.forget()
                with _unseen():
                    self.spline, self.error = fit(basis, envelope, functions, TOLERANCES[r.dtype] / 10)
                self.dtype = r.dtype
            self.uses += 1
            if self.spline is None or (self.mode == "auto" and r.shape[0] <= self.spline.num_rows):
                return None
            return self.spline
        owners = [basis, *(function.owner for function in functions)]
        if self.held is None or not self.held.is_of(owners):
            self.held = Weights(owners)
        state = self.held.state()
        if state is None:
            return None
        stamp = r.dtype, r.device, *state
        if stamp != self.stamp:
            self.forget()
            with _unseen():
                self.spline, self.error = fit(basis, envelope, functions, TOLERANCES[r.dtype])
                if self.spline is not None:
                    self.tables = _tables(self.spline, basis, functions, r)
            self.held = Weights(owners)
            self.held.keep()
            self.stamp = r.dtype, r.device, *(self.held.state() or ())
        return self.spline


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Keep tensors that autograd saves in here from the hooks around a call.

    ``torch.utils.checkpoint`` counts the tensors of a call and of its repetition; only the first makes a grid.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # the transforms of torch.func allow no hooks, so there are none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x))
        yield


def fit(
    basis: nn.Module, envelope: CosineCutoff, functions: Sequence[RadialFunction], tolerance: float
) -> tuple[Spline | None, float | None]:
    """The smallest grid that reproduces all functions to a tolerance, relative to the largest value, and its error.

    Functions are compared at random distances, in double precision. None if no grid does.
    """
    if not functions:
        return None, None
    has_loops = not all(function.fades for function in functions)
    lower, upper = 0.0 if has_loops else float(envelope.cutoff_lower), float(envelope.cutoff_upper)
    exact = [_double(function) for function in functions]
    basis = copy.deepcopy(basis).double().requires_grad_(False)
    device = next(functions[0].owner.parameters()).device
    generator = torch.Generator().manual_seed(0)
    probes = torch.rand(_NUM_PROBES, generator=generator, dtype=torch.float64).to(device)
    probes = lower + (upper - lower) * probes
    expected = [_value_and_slope(lambda r, f=f: f(basis.continued(r)), probes) for f in exact]  # type: ignore[operator]
    error = None
    for size in SIZES:
        spline = Spline(lower, upper, size)
        with torch.no_grad():
            rows = basis.continued(spline.nodes(torch.float64, device))  # type: ignore[operator]
            tables = [spline.coefficients(function(rows)) for function in exact]
        error = steepest = 0.0
        for table, (value, slope) in zip(tables, expected, strict=True):
            read = _value_and_slope(lambda r, t=table, s=spline: RadialFilter(t, s.locate(r)).rows(), probes)
            error = max(error, _deviation(read[0], value))
            steepest = max(steepest, _deviation(read[1], slope))
        if error <= tolerance and steepest <= SLOPES * tolerance:
            log.debug("radial: grid of %d cells, relative error %.1e, of slopes %.1e", size, error, steepest)
            return spline, error
    log.debug(
        "radial: the network is evaluated for every pair, which is exact but slower than a spline: the best, of %d "
        "cells, has a relative error of %.1e, above %.1e.",
        SIZES[-1], error, tolerance,
    )  # fmt: skip
    return None, error


def _value_and_slope(function: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, Tensor]:
    """A function at some distances, (P, L, F), and the derivative of a mixture of its channels, (P,)."""
    with torch.enable_grad():
        r = r.detach().requires_grad_()
        value = function(r)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(value.shape[1:], generator=generator, dtype=value.dtype).to(value.device)
        mixture = (value * weights).sum() + 0 * r.sum()  # a filter may not depend on distance at all
        (slope,) = torch.autograd.grad(mixture, r)
    return value.detach(), slope


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _double(function: RadialFunction) -> RadialFunction:
    return function._replace(owner=copy.deepcopy(function.owner).double())


def _tables(spline: Spline, basis: nn.Module, functions: Sequence[RadialFunction], r: Tensor) -> Tables:
    """Coefficients of all functions, made in double precision."""
    with torch.no_grad():
        rows = copy.deepcopy(basis).double().continued(spline.nodes(torch.float64, r.device))  # type: ignore[operator]
        values = [spline.coefficients(_double(function)(rows)).to(r.dtype).contiguous() for function in functions]

    def builder(function: RadialFunction) -> Callable[[], Tensor]:
        return lambda: spline.coefficients(function(basis.continued(spline.nodes(r.dtype, r.device))))  # type: ignore[operator]

    return {
        function: _Table(value, builder(function), [*function.parameters(), *basis.parameters()])
        for function, value in zip(functions, values, strict=True)
    }
