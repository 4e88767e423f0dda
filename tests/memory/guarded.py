"""Every compiled loop on arrays between guards, in a process that may die of it: ``guarded.py '{"widths": [8]}'``.

The loops are called by the operators and models whose parts they are, through a stand-in that moves each array to the
very end, or the very beginning, of memory beside which no page can be read or written, and fills what is left of that
memory with a pattern. Results are compared with the definitions in PyTorch. The last line that is printed is a summary
in JSON: loops that were called, loops that refused a row, and the number of comparisons.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import itertools
import json
import mmap
import os
import pkgutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.lib.array_utils import byte_bounds
from torch import Tensor, nn

from torchmdnet.graph import Graph, build_graph
from torchmdnet.models import taped
from torchmdnet.neighbors import loops, search, vectors, verlet
from torchmdnet.ops import attention, edge_network, irreps, messages
from torchmdnet.ops.kernels import compiling, layout, sharing, support
from torchmdnet.ops.kernels import loops as kernel_loops
from torchmdnet.ops.messages import RadialFilter, RadialPoints, rows_of_edges, rows_of_pairs
from torchmdnet.testing import derivatives, tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import test_attention_loops as passes

PAGE = mmap.PAGESIZE
PATTERN = 0xA5


class Slot:
    """Memory between two pages that can be neither read nor written."""

    def __init__(self, size: int) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE + PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (0, self.size + PAGE):
            address = ctypes.c_void_p(self.bytes.ctypes.data + page)
            assert libc.mprotect(address, ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()


class Moved:
    """An array in a slot, while a loop runs."""

    def __init__(self, array: np.ndarray, slot: Slot, at_end: bool) -> None:
        self.array, self.slot = array, slot
        low, high = byte_bounds(array) if array.size else (array.ctypes.data, array.ctypes.data)
        size = high - low
        begin = PAGE + (slot.size - size if at_end else 0)
        self.before = (ctypes.c_char * size).from_address(low).raw if size else b""
        self.place, self.address = slice(begin, begin + size), low
        self.slack = slice(PAGE, begin) if at_end else slice(begin + size, PAGE + slot.size)
        slot.bytes[self.slack] = PATTERN
        slot.bytes[self.place] = np.frombuffer(self.before, np.uint8)
        self.view = np.ndarray(array.shape, array.dtype, slot.memory, begin, array.strides)

    def put_back(self, name: str) -> None:
        around = self.slot.bytes[self.slack]
        assert (around == PATTERN).all(), f"{name} wrote beside an array of shape {self.array.shape}"
        after = self.slot.bytes[self.place].tobytes()
        if after != self.before:
            ctypes.memmove(self.address, after, len(after))


class Guards:
    """Calls loops with their arrays in slots."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.called: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.may_refuse = False
        self.at_end = True

    def slot(self, n: int, size: int) -> Slot:
        while len(self.slots) <= n:
            self.slots.append(Slot(16 * PAGE))
        if self.slots[n].size < size + PAGE:
            self.slots[n] = Slot(2 * size)
        return self.slots[n]

    def around(self, name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            moved: dict[Any, Moved] = {}
            given = []
            for arg in args:
                if isinstance(arg, np.ndarray):
                    key = arg.ctypes.data, arg.shape, arg.strides  # one that is given twice stays one
                    if key not in moved:
                        size = byte_bounds(arg)[1] - byte_bounds(arg)[0] if arg.size else 0
                        moved[key] = Moved(arg, self.slot(len(moved), size), self.at_end)
                    arg = moved[key].view
                given.append(arg)
            self.called[name] += 1
            result = None
            try:
                result = loop(*given)
            except IndexError as error:
                if not self.may_refuse or "vectors" not in str(error):
                    raise
                self.refused.add(name)
            for array in moved.values():
                array.put_back(name)
            return result

        return run


guards = Guards()


def put_guards() -> None:
    """Let every caller of a loop find the guarded one."""
    for module in pkgutil.iter_modules(kernel_loops.__path__):
        importlib.import_module(f"{kernel_loops.__name__}.{module.name}")
    of_neighbors = {}
    for address, loop in compiling.LOOPS.items():
        module, name = address.rsplit(".", 1)
        if module == loops.__name__:
            of_neighbors[name] = guards.around(address, loop)
        else:
            setattr(sys.modules[module], name, guards.around(address, loop))
    guarded = SimpleNamespace(**of_neighbors)  # beside the loops themselves, which call one another
    for module in (search, vectors, verlet):
        module._loops = lambda: guarded  # type: ignore[attr-defined]


@contextmanager
def plain() -> Iterator[None]:
    """The definitions in PyTorch."""
    had, support._HAS_NUMBA = support._HAS_NUMBA, False
    os.environ["TORCHMDNET_PLAIN_OPS"] = "1"
    try:
        yield
    finally:
        support._HAS_NUMBA = had
        del os.environ["TORCHMDNET_PLAIN_OPS"]


comparisons = 0


def compare(what: Any, found: Any, wanted: Any) -> None:
    """Numbers in any nesting, relative to the largest."""
    global comparisons
    if guards.may_refuse:
        return  # what a loop refused was not made
    assert len(found) == len(wanted), what
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            continue
        ours, theirs = ours.detach(), theirs.detach()
        assert ours.shape == theirs.shape, what
        tolerance = 3e-4 if theirs.dtype == torch.float32 else 1e-8
        scale = 1 + float(theirs.abs().max()) if theirs.numel() else 1.0
        comparisons += 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------------------------------------- structures


def structures(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Elements, positions and systems: nothing, an atom, two far apart, two near, and several molecules."""
    pos = 1.6 * random(9, 3, seed=0, dtype=dtype)
    pos[5] += 40  # alone
    z = torch.tensor([6, 1, 1, 8, 1, 1, 7, 1, 1])
    batch = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2])
    apart = torch.tensor([[0.0, 0, 0], [30.0, 0, 0]], dtype=dtype)
    one = torch.zeros(2, dtype=torch.long)
    return {
        "nothing": (z[:0], pos[:0], batch[:0]),
        "atom": (z[:1], pos[:1], one[:1]),
        "two apart": (z[:2], apart, one),
        "two": (z[:2], apart / 25, one),
        "molecules": (z, pos, batch),
    }


def graphs(dtype: torch.dtype) -> dict[str, Graph]:
    found = {}
    for name, (z, pos, batch) in structures(dtype).items():
        for loop in (True, False):
            found[f"{name}, loop={loop}"] = build_graph(z, pos, batch, cutoff_upper=4.0, loop=loop)
    return found


# ------------------------------------------------------------------------------------------------------------ operators


def drive_matrices(F: int, dtype: torch.dtype) -> None:
    for n in (0, 1, 2, 7):
        X, Y = (random(n, 9, F, seed=k, dtype=dtype).requires_grad_() for k in (1, 2))
        factor = 1 + 0.1 * torch.arange(n, dtype=dtype)
        pairs: list[tuple[Any, list[Tensor], int]] = [
            (irreps.norms_by_part, [X], 1),
            (irreps.matrix_product, [X, Y], 2),
            (irreps.anticommutator, [X, Y], 2),
            (irreps.normalize, [X], 2),
            (lambda X, Y, k=factor: irreps.interact(X, Y, k, both=True), [X, Y], 1),
            (lambda X, Y, k=factor: irreps.interact(X, Y, k, both=False), [X, Y], 1),
            (lambda X, Y, k=factor: irreps.refine(X, Y, k), [X, Y], 1),
        ]
        for function, arguments, order in pairs:
            found = derivatives(function, arguments, order)
            with plain():
                compare((function, n, F), found, derivatives(function, arguments, order))


def drive_messages(F: int, dtype: torch.dtype) -> None:
    for (name, graph), reads, components in itertools.product(graphs(dtype).items(), (1, 6), (1, 9)):
        assert graph.pairs is not None
        parts = 3 if components == 9 else 1
        for rows in (rows_of_pairs, rows_of_edges):
            of_pairs = rows is rows_of_pairs
            count = graph.pairs.dist.shape[0] if of_pairs else graph.edge_index.shape[1]
            cell = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(5))
            coef, table, X, Y, Z = (
                random(*shape, seed=k, dtype=dtype).requires_grad_()
                for k, shape in enumerate(
                    [
                        (count, reads),
                        (2 + reads, parts, F),
                        (graph.num_atoms, components, F),
                        (graph.edge_index.shape[1], components),
                        (graph.num_atoms, 2, F),
                    ]
                )
            )

            def gather(X: Tensor, coef: Tensor, table: Tensor, cell=cell, rows=rows, graph=graph) -> Tensor:
                return messages.gather_weight_sum(X, RadialFilter(table, RadialPoints(coef, cell)), rows(graph))

            def embed(Y: Tensor, coef: Tensor, table: Tensor, Z: Tensor, cell=cell, rows=rows, graph=graph) -> Tensor:
                return messages.embed_edges(Y, RadialFilter(table, RadialPoints(coef, cell)), Z, rows(graph))

            for function, arguments in ((gather, [X, coef, table]), (embed, [Y, coef, table, Z])):
                found = [*derivatives(function, arguments, 1), *gradients(function, arguments)]
                with plain():
                    wanted = [*derivatives(function, arguments, 1), *gradients(function, arguments)]
                compare((function.__name__, name, F), found, wanted)


def weighted(out: Tensor) -> Tensor:
    """A sum with weights of both signs; a curved function of large numbers would enlarge how they are rounded."""
    return (out * torch.linspace(-1, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()


def gradients(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """First derivatives that are not differentiated again."""
    out = function(*arguments)
    return list(torch.autograd.grad(weighted(out), arguments, allow_unused=True))


def drive_attention(F: int, dtype: torch.dtype) -> None:
    heads = {h for h in (1, 2, 3, F) if F % h == 0}
    for (name, graph), num_heads, has_vectors in itertools.product(graphs(dtype).items(), heads, (False, True)):
        assert graph.pairs is not None
        count, (sent, parts) = graph.pairs.dist.shape[0], (5, 4) if has_vectors else (1, 2)
        cell = torch.zeros(count, dtype=torch.long)
        shapes = [(graph.num_atoms, F), (graph.num_atoms, F), (graph.num_atoms, sent, F)]
        shapes += [(graph.edge_index.shape[1], 3), (count, 6), (count,), (6, parts, F)]
        tensors = [random(*shape, seed=k, dtype=dtype).requires_grad_() for k, shape in enumerate(shapes)]

        def ask(tensors=tensors, graph=graph, cell=cell, num_heads=num_heads, has_vectors=has_vectors) -> list[Tensor]:
            q, k, X, u, coef, fade, table = tensors
            filter, directions = RadialFilter(table, RadialPoints(coef, cell)), u if has_vectors else None
            options = {"num_heads": num_heads, "activation": nn.SiLU(), "vectors_fade": True}
            out = attention.attend(q, k, X, directions, filter, fade, rows_of_pairs(graph), **options)
            return [out, *torch.autograd.grad(weighted(out), tensors, allow_unused=True)]

        found = ask()
        with plain():
            compare(("attend", name, F, num_heads), found, ask())


def drive_edge_networks(F: int, dtype: torch.dtype) -> None:
    for (name, graph), hidden, kept in itertools.product(graphs(dtype).items(), (F, 2 * F + 1), (0, 10**6)):
        assert graph.pairs is not None
        N, P = graph.num_atoms, graph.pairs.dist.shape[0]
        shapes = [(N, 9, F), (P, hidden), (N, hidden), (N, hidden), (P,), (F, hidden), (F,), (3 * F, F), (3 * F,)]
        tensors = [random(*shape, seed=k, dtype=dtype).requires_grad_() for k, shape in enumerate(shapes)]
        edge_network.KEPT = kept

        def ask(wanted: slice, tensors=tensors, graph=graph) -> list[Tensor]:
            X, radial, receiving, sending, envelope, *layers = tensors
            network = edge_network.EdgeNetwork(nn.SiLU(), [(layers[0], layers[1]), (layers[2], layers[3])])
            out = edge_network.edge_network_sum(X, radial, receiving, sending, envelope, network, graph)
            return [out, *torch.autograd.grad(weighted(out), tensors[wanted], allow_unused=True)]

        for wanted in (slice(0, 5), slice(0, 9)):
            found = ask(wanted)
            with plain():
                compare(("edge network", name, F), found, ask(wanted))
    for n in (0, 1, 5):
        x = random(n, F, seed=n, dtype=dtype).requires_grad_()
        network = edge_network.EdgeNetwork(nn.SiLU(), [])
        found = derivatives(network.activate, [x], 2)
        with plain():
            compare(("silu", n, F), found, derivatives(network.activate, [x], 2))


def drive_attention_passes(F: int, dtype: torch.dtype) -> None:
    """Derivatives of attention along a direction, and gradients of these, for heads that the loops know."""
    lanes = support.lanes_of(dtype.itemsize)
    if F % lanes or guards.may_refuse:
        return
    kind = np.float32 if dtype == torch.float32 else np.float64
    heads = {F // lanes} | ({1} if F % (2 * lanes) == 0 else set())
    for num_heads, C, shares in itertools.product(heads, (1, 2, 5), ((1, 1), (2, 2))):
        setup = passes.make_setup(kind, F, num_heads, C, shares, num_atoms=9)
        found = [torch.from_numpy(np.ascontiguousarray(x)) for x in passes.chain(setup)]
        compare(("attention passes", F, C), found, [x.to(dtype) for x in passes.definition(setup)])
    if dtype == torch.float64:
        passes.test_what_atoms_send_changes_as_its_formula_does_and_so_do_its_gradients(F)
        passes.test_what_atoms_receive_changes_as_its_formula_does_and_so_do_its_gradients(F)


OPERATORS = (drive_matrices, drive_messages, drive_attention, drive_attention_passes, drive_edge_networks)


# --------------------------------------------------------------------------------------------------------------- models


def drive_models(F: int, dtype: torch.dtype, which: str, **options: Any) -> None:
    """Energies and forces, and gradients of weights in training on forces."""
    heads = options.pop("num_heads", 2 if F % 2 == 0 else 1)
    settings = {"embedding_dimension": F, "num_filters": F, "num_heads": heads, "max_z": 9, **options}
    settings["precision"] = 32 if dtype == torch.float32 else 64
    model = tiny_model(which, **settings)
    for way in ("direct", "eval", "train"):
        model.train(way == "train").requires_grad_(way != "direct")
        for name, (z, pos, batch) in structures(dtype).items():
            if name == "nothing" and way != "direct":
                continue

            def ask(way=way, z=z, pos=pos, batch=batch) -> list[Tensor]:
                energy, forces = model(z, pos.clone(), batch)
                if way != "train":
                    return [energy, forces]
                loss = energy.square().sum() + forces.square().sum()
                weights = list(model.parameters())
                of_weights = torch.autograd.grad(loss, weights, allow_unused=True)
                x = pos.clone().requires_grad_()  # second derivatives in positions are left to definitions
                (of_x,) = torch.autograd.grad(model(z, x, batch)[1].square().sum(), x, allow_unused=True)
                return [energy, forces, *of_weights, of_x]

            found = ask()
            with plain():
                wanted = ask()
            compare((which, name, way, settings), found, wanted)


MODELS = ("tensornet", "tensornet2", "graph-network", "transformer", "equivariant-transformer")


# ----------------------------------------------------------------------------------------------------------- neighbours


def drive_neighbors(dtype: torch.dtype) -> None:
    full = 6 * torch.eye(3, dtype=dtype) + 0.3 * random(3, 3, seed=4, dtype=dtype)
    open_ = full.clone()
    open_[2] = 0
    for (name, (z, pos, batch)), box, loop in itertools.product(
        structures(dtype).items(), (None, full, open_, "each"), (True, False)
    ):
        systems = int(batch.max()) + 1 if len(batch) else 1
        boxes = torch.stack([full * (1 + 0.1 * s) for s in range(systems)]) if isinstance(box, str) else box
        if boxes is not None and name == "nothing":
            continue

        def ask(follows: bool, z=z, pos=pos, batch=batch, boxes=boxes, loop=loop) -> list[Tensor]:
            at = pos.clone().requires_grad_(follows)
            cell = None if boxes is None else boxes.clone().requires_grad_(follows)
            graph = build_graph(z, at, batch, cell, cutoff_upper=5.0, loop=loop)
            lengths = torch.zeros(len(pos), dtype=dtype).index_add(0, graph.edge_index[0], graph.edge_dist**2)
            sums = torch.zeros(len(pos), 3, dtype=dtype).index_add(0, graph.edge_index[0], graph.edge_vec)
            if not follows:
                return [lengths, sums]
            inputs = [x for x in (at, cell) if x is not None]
            out = lengths.sin().sum() + sums.square().sum()
            return [lengths, sums, *torch.autograd.grad(out, inputs, allow_unused=True)]

        for follows in (False, True):
            found = ask(follows)
            with plain():
                compare(("neighbours", name, box, loop), found, ask(follows))
    drive_lists(dtype, full)
    if dtype == torch.float64:
        drive_parts_of_searches(full)


def drive_lists(dtype: torch.dtype, box: Tensor) -> None:
    """A list of neighbours that is kept while atoms move, also where nothing or one atom is in it."""
    for count in (1, 2, 230):
        pos = 4.0 * count ** (1 / 3) * torch.rand(count, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
        batch, search_ = torch.zeros(count, dtype=torch.long), verlet.VerletList(skin=0.5)
        for cell in (None, 4 * box[None]):
            for step in range(3):
                here = pos + 0.01 * step
                i, j, _ = search_(here, batch, cell, 1, 3.0)
                with plain():
                    a, b, _ = search.pairs_within(here, batch, cell, 1, 3.0)
                compare(("list", count), [pairs_in_order(i, j)], [pairs_in_order(a, b)])


def pairs_in_order(i: Tensor, j: Tensor) -> Tensor:
    """The same for two lists of the same pairs."""
    return torch.sort(torch.minimum(i, j) * 1000 + torch.maximum(i, j))[0].double()


def drive_parts_of_searches(box: Tensor) -> None:
    """What only other loops call."""
    guarded = search._loops()
    h = box.numpy()[None].copy()
    duals = np.empty_like(h)
    assert guarded.duals_of(h, duals)
    compare("duals", [torch.from_numpy(duals[0]).T @ box], [torch.eye(3, dtype=box.dtype)])
    for count in (1, 2, 7):
        place = random(3, count, seed=3, dtype=torch.float64).numpy()
        out = np.empty(count)
        guarded.nearest_squares(0, count, place, np.zeros_like(place), h[0], out)
        compare("squares", [torch.from_numpy(out)], [torch.from_numpy(((place - place[:, :1]) ** 2).sum(0))])
        assert np.array_equal(guarded._widened(out, 2 * count)[:count], out)


# ------------------------------------------------------------------------------------------------------------ all of it


def drive_sums(dtype: torch.dtype) -> None:
    """What only repeated evaluations call."""
    a, b = random(2, 13, seed=4, dtype=dtype)
    out = torch.empty(13, dtype=dtype)
    kernel_loops.dense.add(13, a.numpy().copy(), b.numpy().copy(), out.numpy())
    compare("sum", [out], [a + b])


def drive(options: dict[str, Any]) -> None:
    taped.SMALL = -1  # a recording would repeat loops on memory between guards that others have since
    torch.set_num_threads(options["num_threads"])
    if options["num_threads"] > 1:
        sharing.WORTH_THREADS = layout.WORTH_THREADS = 0
        sharing.cores.notice = lambda is_late: None  # more than one thread, also where cores are busy
    if options["is_narrow"]:  # as if a caller had forgotten to ask
        support.lanes_of = lambda itemsize: 1
        guards.may_refuse = True
    sides = (True, False)
    for k, (bits, F) in enumerate(itertools.product(options["precisions"], options["widths"])):
        for at_end in sides if options["both_ends"] else sides[k % 2 :][:1]:
            guards.at_end = at_end
            dtype = torch.float32 if bits == 32 else torch.float64
            if options["neighbors"]:
                drive_neighbors(dtype)
            if options["operators"]:
                drive_sums(dtype)
            for operator in OPERATORS if options["operators"] else ():
                operator(F, dtype)
            for which in options["models"]:
                for num_layers in (2, k % 2) if options["both_ends"] else (2,):
                    drive_models(F, dtype, which, num_layers=num_layers, num_rbf=1 + (k + 2) % 9, q_dim=k % 3)


def main() -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    options = {"widths": [8], "precisions": [32, 64], "num_threads": 1, "is_narrow": False, "both_ends": False}
    options.update({"models": MODELS, "operators": True, "neighbors": True}, **json.loads(sys.argv[1]))
    put_guards()
    drive(options)
    summary = {
        "called": sorted(guards.called),
        "missing": sorted(set(compiling.LOOPS) - set(guards.called)),
        "refused": sorted(guards.refused),
        "comparisons": comparisons,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
