"""Potentials as packages that run without this one, in Python or C++: ``torch.export`` and AOTInductor."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from torchmdnet._version import __version__
from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target
from torchmdnet.forces import Slopes, forces_of
from torchmdnet.graph import Graph, Pairs, bare_graph, guard_of_edges
from torchmdnet.models.base import set_radial_mode
from torchmdnet.neighbors import CLOSEST, apart, length
from torchmdnet.potential import TorchMD_Net
from torchmdnet.recording import Recorded, needs_compiler, record

__all__ = ["INPUTS", "OUTPUTS", "export_model", "recorded", "recorded_atoms"]

Entry = Literal["edges", "positions"]

#: Arguments of a package in their order, by the way it is entered.
INPUTS: dict[str, dict[str, str]] = {
    "edges": {
        "z": "(atoms,) int64, atomic numbers",
        "edge_index": "(2, edges) int64, row 0 receives (i), row 1 sends (j), every pair in both directions",
        "edge_vec": "(edges, 3) pos[i] - pos[j], image shift included",
        "batch": "(atoms,) int64, system of each atom, ascending from 0",
        "q": "(systems,) total charge in e; zeros where there is none",
        "s": "(systems,) spin; zeros where there is none",
    },
    "positions": {
        "z": "(atoms,) int64, atomic numbers",
        "pos": "(atoms, 3) positions",
        "edge_index": "(2, edges) int64, row 0 receives (i), row 1 sends (j), every pair in both directions",
        "shifts": "(edges, 3) what to add to pos[i] - pos[j] to reach the image that is near",
        "batch": "(atoms,) int64, system of each atom, ascending from 0",
        "q": "(systems,) total charge in e; zeros where there is none",
        "s": "(systems,) spin; zeros where there is none",
    },
}
#: Results of a package in their order.
OUTPUTS = {
    "energy": "(systems,)",
    "forces": "(atoms, 3)",
    "virial": "(systems, 3, 3) derivative of the energy in a strain",
    "edge_gradient": "(edges, 3) derivative of the energy in each edge vector",
    "atomic": "(atoms,) contributions to the energy; not a number where it is no sum over atoms",
}


def export_model(
    model: TorchMD_Net,
    path: str | Path,
    *,
    inputs: Entry = "edges",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    radial: str = "auto",
    units: tuple[str, str] | None = None,
    begin: Callable[[str], None] = lambda words: None,
) -> dict[str, str]:
    """Write a package that gives energies and forces for any number of atoms, edges and systems.

    Neighbours come from who calls it: all edges within the cutoff, in both directions, in any order. Edges beyond the
    cutoff are left out inside, so a list with a skin will do.

    Args:
        model: The potential; it is not changed.
        path: The file to write, ``.pt2``.
        inputs: ``edges`` to pass edge vectors, ``positions`` to pass positions and shifts; see :data:`INPUTS`.
        dtype: Precision of the package; None is that of the model.
        device: Where the package runs; None is where the model is.
        radial: How radial filters are evaluated; ``exact`` or, from tables where they are accurate, ``auto``.
        units: Units of energy and length for the metadata; None takes them from the file of the model.
        begin: Called with a few words when each of the two steps begins, to show progress.

    Returns:
        What the package says of itself, its metadata.

    Raises:
        ConfigError: If the model has a part that looks for positions or pairs itself, or there is no C++ compiler.
    """
    path = check_target(path, "package")
    if path.suffix != ".pt2":
        raise ConfigError(f"{path}: a package ends in .pt2. Name it {path.with_suffix('.pt2').name}.")
    if inputs not in INPUTS:
        raise ConfigError(f"inputs: {inputs!r} is not available. Choose from {', '.join(INPUTS)}.")
    needs_compiler("export")
    begin("recording the computation")
    model = _frozen(model, dtype or model.dtype, device)
    set_radial_mode(model, radial)
    graph, arguments = recorded(model, inputs)
    dims = {name: torch.export.Dim(name, min=least) for name, least in (("atoms", 1), ("edges", 0), ("systems", 1))}
    shapes = tuple({axis: dims[name] for axis, name in argument.axes.items()} for argument in arguments)
    program = torch.export.export(graph, tuple(argument.value for argument in arguments), dynamic_shapes=shapes)
    metadata = _metadata(model, inputs, units)
    begin("compiling it, which takes minutes")
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
    )
    return metadata


def recorded(model: TorchMD_Net, inputs: Entry) -> tuple[fx.GraphModule, list[Recorded]]:
    """The function that a package is made from, and examples of its arguments."""
    values = _example(_architecture(model), model)
    model.from_edges(values["z"], values["edge_index"], values["edge_vec"], values["batch"], derivative=False)  # grids
    function = _of_edges(model) if inputs == "edges" else _of_positions(model)
    arguments = [Recorded(values[name], _AXES[name]) for name in INPUTS[inputs]]
    return record(function, arguments), arguments


def recorded_atoms(model: TorchMD_Net) -> fx.GraphModule:
    """Contributions of the atoms, (N,) float64, to an energy that is their sum; takes what a package of edges takes.

    It can be differentiated in the vectors of the edges.

    Raises:
        ConfigError: If the model has a part that looks for positions or pairs itself.
    """
    values = _example(_architecture(model), model)

    def atomic(z: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor, q: Tensor, s: Tensor) -> Tensor:
        graph = _with_ghost(model, z, edge_index, edge_vec, batch, q, s)
        with torch.enable_grad():
            return model._atomic(*model._encoded(graph))[:-1, 0]

    return record(atomic, [Recorded(values[name], _AXES[name]) for name in INPUTS["edges"]])


#: Axes that change from call to call.
_AXES: dict[str, dict[int, str]] = {
    "z": {0: "atoms"},
    "pos": {0: "atoms"},
    "batch": {0: "atoms"},
    "edge_index": {1: "edges"},
    "edge_vec": {0: "edges"},
    "shifts": {0: "edges"},
    "q": {0: "systems"},
    "s": {0: "systems"},
}


def _frozen(model: TorchMD_Net, dtype: torch.dtype, device: str | torch.device | None) -> TorchMD_Net:
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)


def _architecture(model: TorchMD_Net) -> Any:
    try:
        return model._check_edges_suffice(False)
    except ValueError as error:
        raise ConfigError(str(error).replace("from_edges:", "export:").partition(" Call the model")[0]) from None


def _example(architecture: Any, model: TorchMD_Net) -> dict[str, Tensor]:
    """A few atoms in three systems, all sizes different; what they are does not matter."""
    generator = torch.Generator().manual_seed(0)
    num_atoms, num_edges, num_systems = 11, 23, 3
    options: dict[str, Any] = {"dtype": model.dtype}
    batch = torch.arange(num_atoms) * num_systems // num_atoms
    i = torch.randint(num_atoms, (num_edges,), generator=generator)
    first = torch.searchsorted(batch, batch[i])  # an atom of the same system
    vec = torch.randn(num_edges, 3, generator=generator, **options)
    values = {
        "z": torch.ones(num_atoms, dtype=torch.long),
        "pos": torch.randn(num_atoms, 3, generator=generator, **options),
        "batch": batch,
        "edge_index": torch.stack([i, first]),
        "edge_vec": vec * (architecture.cutoff_upper / 2 / vec.norm(dim=1, keepdim=True)),
        "shifts": torch.zeros(num_edges, 3, **options),
        "q": torch.zeros(num_systems, **options),
        "s": torch.zeros(num_systems, **options),
    }
    return {name: value.to(model.mean.device) for name, value in values.items()}


def _of_edges(model: TorchMD_Net) -> Callable[..., tuple[Tensor, ...]]:
    def energy_and_derivatives(
        z: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor, q: Tensor, s: Tensor
    ) -> tuple[Tensor, ...]:
        edge_vec = edge_vec.detach().requires_grad_()
        with torch.enable_grad():
            graph = _with_ghost(model, z, edge_index, edge_vec, batch, q, s)
            features, seen = model._encoded(graph)
            energy = model._system_energy(features, seen)[:-1, 0]
            (slope,) = torch.autograd.grad([energy.sum()], [edge_vec])  # (E, 3)
        with torch.no_grad():
            if model.is_sum_of_atoms:
                atomic = model._atomic(features, seen)[:-1, 0].to(energy.dtype)
            else:
                atomic = energy.new_full((z.shape[0],), torch.nan)
            given = bare_graph(z, edge_vec.new_zeros(z.shape[0], 3), batch, num_systems=q.shape[0])
            given = given._replace(edge_index=edge_index, edge_vec=edge_vec.detach())
            forces, virial = forces_of(given, Slopes(vec=slope), strained=True)
            assert virial is not None
        return energy.detach(), forces, virial, slope, atomic.detach()

    return energy_and_derivatives


def _of_positions(model: TorchMD_Net) -> Callable[..., tuple[Tensor, ...]]:
    by_edges = _of_edges(model)

    def energy_and_derivatives(
        z: Tensor, pos: Tensor, edge_index: Tensor, shifts: Tensor, batch: Tensor, q: Tensor, s: Tensor
    ) -> tuple[Tensor, ...]:
        i, j = edge_index
        return by_edges(z, edge_index, pos.index_select(0, i) - pos.index_select(0, j) + shifts, batch, q, s)

    return energy_and_derivatives


def _with_ghost(
    model: TorchMD_Net, z: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor, q: Tensor, s: Tensor
) -> Graph:
    """The graph of a list of edges with one more atom, the last, in a system of its own.

    Edges beyond the cutoff lead from it to itself, so no array has a length that depends on where the atoms are.
    """
    distance = model.representation_model.distance
    num_atoms, num_systems = z.shape[0], q.shape[0]
    square = edge_vec.square().sum(dim=1)  # (E,)
    lower, upper = float(distance.cutoff_lower) ** 2, float(distance.cutoff_upper) ** 2
    is_within = (square < upper) & (square >= lower) & ((edge_index[0] != edge_index[1]) | (square > 0))
    index = torch.where(is_within, edge_index, num_atoms)  # (2, E)
    aside = edge_vec.new_tensor([(float(distance.cutoff_lower) + float(distance.cutoff_upper)) / 2, 0.0, 0.0])
    vec = torch.where(is_within[:, None], edge_vec, aside)
    of_edge = torch.arange(edge_index.shape[1], device=z.device)  # (E,)
    pairs = index
    if distance.loop:  # they share the last row
        atoms = torch.arange(num_atoms + 1, device=z.device)
        index = torch.cat([index, torch.stack([atoms, atoms])], dim=1)
        of_edge = torch.cat([of_edge, torch.full_like(atoms, edge_index.shape[1])])
        vec = torch.cat([vec, vec.new_zeros(1, 3)])
    dist = apart(vec, length(vec), CLOSEST * float(distance.cutoff_upper))
    guard = guard_of_edges(edge_index, edge_vec, batch, num_systems, q, s)
    nothing = z.new_empty(0)
    return Graph(
        z=torch.cat([z, z.new_ones(1)]),
        pos=edge_vec.new_full((num_atoms + 1, 3), torch.nan),
        batch=torch.cat([batch, batch.new_full((1,), num_systems)]),
        num_systems=num_systems + 1,
        edge_index=index,
        edge_vec=vec.index_select(0, of_edge),
        edge_dist=dist.index_select(0, of_edge),
        box=None,
        q=torch.cat([q, q.new_zeros(1)]),
        s=torch.cat([s, s.new_zeros(1)]),
        extra={},
        pairs=Pairs(pairs, dist, of_edge, nothing, nothing),
        guard=torch.cat([guard, guard.new_zeros(1)]),
    )


def _metadata(model: TorchMD_Net, inputs: Entry, units: tuple[str, str] | None) -> dict[str, str]:
    architecture = _architecture(model)
    stated = model.provenance.get("units") or {}
    energy, length = units or (stated.get("energy"), stated.get("length") or "Å")
    elements = model.provenance.get("elements")
    facts: dict[str, Any] = {
        "format": "torchmd-net package 1",
        "torchmdnet": __version__,
        "torch": torch.__version__,
        "architecture": type(architecture).__name__,
        "cutoff": float(architecture.cutoff_upper),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.mean.device.type,
        "energy_unit": energy or "unknown",
        "length_unit": length,
        "elements": elements or "unknown",
        "max_z": architecture.max_z,
        "inputs": INPUTS[inputs],
        "outputs": OUTPUTS,
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=True) for name, value in facts.items()
    }
