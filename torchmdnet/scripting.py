"""TorchScript of potentials and of the neighbour list, in operations that every PyTorch has.

``torch.jit.script`` asks a module for a form that it can read. The one given here is not written by hand: it is
recorded from the module itself, :func:`torchmdnet.recording.record`, so it is the same arithmetic and holds for any
number of atoms, edges and systems. What surrounds it, optional arguments and the differentiation, is written in the
language of TorchScript. The weights are those of the module, under their names.
"""

import copy
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target, draft_of
from torchmdnet.graph import Inputs
from torchmdnet.recording import Recorded, record
from torchmdnet.units import energy_factor, length_factor

if TYPE_CHECKING:  # a potential and a neighbour list ask for their forms here
    from torchmdnet.nn.distance import OptimizedDistance
    from torchmdnet.potential import TorchMD_Net

__all__ = [
    "INTERFACES",
    "ScriptableAtoms",
    "ScriptableDistance",
    "ScriptablePotential",
    "export_torchscript",
    "padded",
    "scriptable_atoms",
    "scriptable_distance",
    "scriptable_potential",
]

#: How a scripted file is called -> what it takes and returns.
INTERFACES = {
    "model": "z, pos, batch, box, q, s in units of the model; energy (systems, 1) and forces (atoms, 3)",
    "openmm": "positions in nm, box vectors in nm if periodic; energy in kJ/mol, for TorchForce of OpenMM-Torch",
    "gromacs": "positions in nm, atomic numbers, box in nm, pbc (3,); energy in kJ/mol, for NNPot of GROMACS",
}


class ScriptablePotential(nn.Module):
    """A potential as TorchScript reads it; called as :class:`torchmdnet.potential.TorchMD_Net`."""

    default_box: Tensor
    derivative: bool
    needs_spin: bool

    def energy(self, z: Tensor, pos: Tensor, batch: Tensor, box: Tensor, q: Tensor, s: Tensor) -> Tensor:
        """The recorded function, (S, 1)."""
        raise NotImplementedError

    def forward(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor | None = None,
        box: Tensor | None = None,
        q: Tensor | None = None,
        s: Tensor | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energies (S, 1), and forces (N, 3) or with ``derivative=False`` an empty tensor."""
        if self.needs_spin and s is None:
            raise RuntimeError("s: this model was trained with the spin of each system. Pass one value per system.")
        system, count = systems_of(z, batch, num_systems)
        if self.derivative and not pos.requires_grad:
            pos = pos.detach().requires_grad_(True)
        boxes = boxes_of(self.default_box if box is None else box, count, pos)
        energy = self.energy(z.long(), pos, system, boxes, numbers_of(q, count, pos), numbers_of(s, count, pos))
        if not self.derivative:
            return energy, torch.empty(0, dtype=pos.dtype, device=pos.device)
        slope = torch.autograd.grad(
            [energy.sum()], [pos], retain_graph=self.training, create_graph=self.training, allow_unused=True
        )[0]
        return energy, torch.zeros_like(pos) if slope is None else -slope


class ScriptableDistance(nn.Module):
    """A neighbour list as TorchScript reads it; called as :class:`torchmdnet.nn.distance.OptimizedDistance`."""

    box: Tensor
    cutoff_upper: float
    max_num_pairs: int
    return_vecs: bool
    resize_to_fit: bool

    def edges(self, pos: Tensor, batch: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The recorded function: edges (2, E), vectors (E, 3) and distances (E,)."""
        raise NotImplementedError

    def forward(
        self, pos: Tensor, batch: Tensor | None = None, box: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pairs (2, E), distances (E,) and, if they were asked for, vectors (E, 3)."""
        system, count = systems_of(pos[:, 0], batch, None)
        boxes = boxes_of(self.box if box is None else box, count, pos)
        edge_index, wide_vec, wide_dist = self.edges(pos.double(), system, boxes.double())
        vec, dist = wide_vec.to(pos.dtype), wide_dist.to(pos.dtype)
        capacity = self.max_num_pairs if self.max_num_pairs > 0 else -self.max_num_pairs * pos.size(0)
        found = edge_index.size(1)
        if found > capacity:
            raise RuntimeError(
                "Found num_pairs > max_num_pairs, please increase max_num_pairs: "
                f"{found} pairs within {self.cutoff_upper} Å, room for {capacity}."
            )
        if not self.resize_to_fit:
            edge_index, vec, dist = padded(edge_index, vec, dist, capacity)
        return edge_index, dist, vec if self.return_vecs else None


def padded(edge_index: Tensor, vec: Tensor, dist: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arrays of the length of the capacity, filled up with index -1, vector 0 and distance 0. TorchScript reads it."""
    every = torch.arange(edge_index.shape[1], device=edge_index.device)
    index = torch.full((2, capacity), -1, dtype=edge_index.dtype, device=edge_index.device)
    return (
        index.index_copy(1, every, edge_index),
        torch.zeros((capacity, 3), dtype=vec.dtype, device=vec.device).index_copy(0, every, vec),
        torch.zeros((capacity,), dtype=dist.dtype, device=dist.device).index_copy(0, every, dist),
    )


def systems_of(atoms: Tensor, batch: Tensor | None, num_systems: int | None) -> tuple[Tensor, int]:
    """The system of each atom and the number of systems."""
    if batch is None:
        system = torch.zeros(atoms.size(0), dtype=torch.long, device=atoms.device)
        return system, 1 if num_systems is None else num_systems
    if num_systems is not None:
        return batch.long(), num_systems
    return batch.long(), int(batch.max()) + 1 if batch.numel() > 0 else 0


def boxes_of(box: Tensor, num_systems: int, pos: Tensor) -> Tensor:
    """One box for each system, (S, 3, 3)."""
    box = box.to(device=pos.device, dtype=pos.dtype)
    if box.dim() == 2:
        box = box[None]
    if box.dim() != 3 or box.size(1) != 3 or box.size(2) != 3 or (box.size(0) != 1 and box.size(0) != num_systems):
        raise RuntimeError(
            f'Expected "box_vectors" to have shape (n_batch, 3, 3): box has shape {box.size()} but batch holds '
            f"{num_systems} systems. Pass (3, 3) to share one box, or ({num_systems}, 3, 3)."
        )
    return box.expand(num_systems, 3, 3)


def numbers_of(value: Tensor | None, num_systems: int, pos: Tensor) -> Tensor:
    """One number for each system, (S,); zeros if none are given."""
    if value is None:
        return torch.zeros(num_systems, dtype=pos.dtype, device=pos.device)
    if value.numel() != num_systems:
        raise RuntimeError(f"q or s has shape {value.size()} but batch holds {num_systems} systems. Pass one of each.")
    return value.reshape(num_systems).to(device=pos.device, dtype=pos.dtype)


def scriptable_potential(model: "TorchMD_Net") -> nn.Module:
    """What ``torch.jit.script`` is given in place of a :class:`torchmdnet.potential.TorchMD_Net`.

    Raises:
        ConfigError: If a part decides something from values, so that it cannot be recorded.
    """

    def energy(z: Tensor, pos: Tensor, batch: Tensor, box: Tensor, q: Tensor, s: Tensor) -> Tensor:
        inputs = Inputs(z, pos, batch, box, q, s, None, box.shape[0])
        with torch.enable_grad():
            return model._system_energy(*model._features(inputs))

    examples = _examples(model.mean.device, model.dtype)
    module = ScriptablePotential()
    _mirror(model, module)
    module.derivative = bool(model.derivative)
    embedding = getattr(model.representation_model, "system_embedding", None)
    module.needs_spin = embedding is not None and "spin" in embedding.quantities
    box = getattr(getattr(model.representation_model, "distance", None), "box", None)
    module.register_buffer("default_box", model.mean.new_zeros(3, 3) if box is None else box, persistent=False)
    try:
        recorded = record(energy, examples)
    except (RuntimeError, TypeError, ValueError) as error:
        parts = [model.representation_model, model.output_model, *(model.prior_model or ())]
        names = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            f"torch.jit.script: a part of this model ({names}) decides something from values or sizes and cannot be "
            "recorded; of the priors, D3 and Coulomb do. Leave it out, or use the model from Python."
        ) from error
    return _with_method(module, "energy", recorded).train(model.training)


class ScriptableAtoms(nn.Module):
    """Contributions of atoms to the energy, from edges, as TorchScript reads it."""

    def atomic(self, z: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor, q: Tensor, s: Tensor) -> Tensor:
        """The recorded function, (N,) float64."""
        raise NotImplementedError

    def forward(self, z: Tensor, edge_index: Tensor, edge_vec: Tensor, batch: Tensor, q: Tensor, s: Tensor) -> Tensor:
        """Contributions (N,); arguments as :func:`torchmdnet.export.recorded_atoms` takes them."""
        return self.atomic(z, edge_index, edge_vec, batch, q, s)


def scriptable_atoms(model: "TorchMD_Net", recorded: fx.GraphModule) -> nn.Module:
    """A module for TorchScript of what :func:`torchmdnet.export.recorded_atoms` recorded of a model."""
    module = ScriptableAtoms()
    _mirror(model, module)
    return _with_method(module, "atomic", recorded).eval()


def scriptable_distance(module: "OptimizedDistance") -> nn.Module:
    """What ``torch.jit.script`` is given in place of an :class:`~torchmdnet.nn.distance.OptimizedDistance`."""

    def edges(pos: Tensor, batch: Tensor, box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return module.edges(pos, batch, box, box.shape[0])

    _, pos, batch, box, *_ = _examples(module.box.device, torch.float64)
    scriptable = ScriptableDistance()
    _mirror(module, scriptable)
    for option in ("cutoff_upper", "max_num_pairs", "resize_to_fit", "return_vecs"):
        setattr(scriptable, option, getattr(module, option))
    return _with_method(scriptable, "edges", record(edges, [pos, batch, box])).train(module.training)


class ForOpenMM(nn.Module):
    """A scripted potential as TorchForce of OpenMM-Torch calls it, for a fixed set of atoms.

    Args:
        model: Scripted, without forces of its own.
        numbers: Atomic numbers, (N,).
        charge: Total charge, (1,).
        spin: Spin, (1,).
        lengths: Units of length of the model in a nanometre.
        energies: kJ/mol in a unit of energy of the model.
        dtype: Of the model.
    """

    numbers: Tensor
    charge: Tensor
    spin: Tensor

    def __init__(
        self,
        model: nn.Module,
        numbers: Tensor,
        charge: Tensor,
        spin: Tensor,
        lengths: float,
        energies: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("numbers", numbers)
        self.register_buffer("charge", charge)
        self.register_buffer("spin", spin)
        self.lengths, self.energies, self.dtype = lengths, energies, dtype

    def forward(self, positions: Tensor, boxvectors: Tensor | None = None) -> Tensor:
        """The energy in kJ/mol, to be differentiated in the positions (N, 3) nm."""
        box: Tensor | None = None
        if boxvectors is not None:
            box = (boxvectors * self.lengths).to(self.dtype)
        pos = (positions * self.lengths).to(self.dtype)
        return self.model(self.numbers, pos, box=box, q=self.charge, s=self.spin)[0].sum() * self.energies


class ForGromacs(nn.Module):
    """A scripted potential as NNPot of GROMACS calls it.

    Args:
        model: Scripted, without forces of its own.
        charge: Total charge, (1,).
        spin: Spin, (1,).
        lengths: Units of length of the model in a nanometre.
        energies: kJ/mol in a unit of energy of the model.
        dtype: Of the model.
    """

    charge: Tensor
    spin: Tensor

    def __init__(
        self, model: nn.Module, charge: Tensor, spin: Tensor, lengths: float, energies: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("charge", charge)
        self.register_buffer("spin", spin)
        self.lengths, self.energies, self.dtype = lengths, energies, dtype

    def forward(self, positions: Tensor, numbers: Tensor, box: Tensor, pbc: Tensor) -> Tensor:
        """The energy in kJ/mol, to be differentiated in the positions (N, 3) nm."""
        rows = box.reshape(3, 3) * self.lengths * pbc.reshape(3, 1).to(box.dtype)
        pos = (positions * self.lengths).to(self.dtype)
        q, s = self.charge, self.spin
        return self.model(numbers.long(), pos, box=rows.to(self.dtype), q=q, s=s)[0].sum() * self.energies


def export_torchscript(
    model: "TorchMD_Net",
    path: str | Path,
    *,
    interface: str = "model",
    numbers: Sequence[int] | None = None,
    charge: float = 0.0,
    spin: float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    units: tuple[str, str] | None = None,
) -> torch.jit.ScriptModule:
    """Write a file of TorchScript, which runs where this package is not installed and finds its own neighbours.

    Args:
        model: The potential; it is not changed.
        path: The file to write, ``.pt``.
        interface: How the file is called, see :data:`INTERFACES`.
        numbers: Atomic numbers of the atoms, for ``openmm``.
        charge: Total charge in e, for ``openmm`` and ``gromacs``.
        spin: Spin in the convention of the training data, likewise.
        dtype: Precision; None is that of the model.
        device: Where the file runs; None is where the model is.
        units: Units of energy and length of the model; None takes them from its file.

    Returns:
        What was written.

    Raises:
        ConfigError: If an argument is missing or does not fit, or the model has a part that cannot be scripted.
    """
    path = check_target(path, "package")
    if interface not in INTERFACES:
        raise ConfigError(f"interface: {interface!r} is not available. Choose from {', '.join(INTERFACES)}.")
    if path.suffix != ".pt":
        raise ConfigError(f"{path}: a file of TorchScript ends in .pt. Name it {path.with_suffix('.pt').name}.")
    if (numbers is None) != (interface != "openmm"):
        raise ConfigError("numbers: OpenMM passes positions alone. Pass atomic numbers for interface='openmm' only.")
    model = copy.deepcopy(model).to(device=device, dtype=dtype or model.dtype).eval().requires_grad_(False)
    model.derivative = interface == "model"
    scriptable: nn.Module = model
    if interface != "model":
        stated = model.provenance.get("units") or {}
        energy, length = units or (stated.get("energy"), stated.get("length") or "Å")
        if energy is None:
            raise ConfigError("units: the file of the model does not state them. Pass units of the model.")
        if spin is None and "spin" in getattr(model.representation_model, "reads", ()):
            raise ConfigError("spin: the model was trained with the spin of each system. Pass it.")
        place = {"device": model.mean.device, "dtype": model.dtype}
        q, s = (torch.tensor([float(x)], **place) for x in (charge, spin or 0.0))
        lengths, energies = length_factor("nm", length), energy_factor(energy, "kJ/mol")
        if interface == "openmm":
            assert numbers is not None
            z = torch.tensor([int(number) for number in numbers], device=model.mean.device)
            scriptable = ForOpenMM(model, z, q, s, lengths, energies, model.dtype)
        else:
            scriptable = ForGromacs(model, q, s, lengths, energies, model.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(scriptable)
        with draft_of(path) as draft:
            script.save(str(draft))
    return script


def _examples(device: torch.device, dtype: torch.dtype) -> list[Recorded]:
    """Examples of z, pos, batch, box, q and s: a few atoms in three systems."""
    num_atoms, num_systems, options = 11, 3, {"device": device, "dtype": dtype}
    batch = torch.arange(num_atoms, device=device) * num_systems // num_atoms
    of_atoms, of_systems = {0: "atoms"}, {0: "systems"}
    return [
        Recorded(torch.ones_like(batch), of_atoms),
        Recorded(torch.zeros(num_atoms, 3, **options), of_atoms),
        Recorded(batch, of_atoms),
        Recorded(torch.zeros(num_systems, 3, 3, **options), of_systems),
        Recorded(torch.zeros(num_systems, **options), of_systems),
        Recorded(torch.zeros(num_systems, **options), of_systems),
    ]


def _mirror(source: nn.Module, target: nn.Module) -> None:
    """Hold the parameters and buffers of another module under the same names."""
    for name, parameter in source._parameters.items():
        target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if child is not None:
            target.add_module(name, nn.Module())
            _mirror(child, target._modules[name])  # type: ignore[arg-type]


#: Operations on sizes, by their names in a recording.
_SIZES = {"sym_size": torch.ops.aten.size, "sym_numel": torch.ops.aten.numel, "sym_stride": torch.ops.aten.stride}


def _with_method(module: nn.Module, name: str, recorded: fx.GraphModule) -> nn.Module:
    """The module with a recording as a method, in the language of TorchScript; other constants become buffers."""
    graph = recorded.graph
    names = {id(x): name for name, x in (*module.named_parameters(), *module.named_buffers())}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (inputs[0], "device"))
    for node in list(graph.nodes):
        node.type = None  # annotations of the function that was recorded, as strings
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(recorded)
            if id(tensor) not in names:
                names[id(tensor)] = f"constant{len(names)}"
                module.register_buffer(names[id(tensor)], tensor, persistent=False)
            node.target = names[id(tensor)]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            packet = node.target.overloadpacket
            node.target = _SIZES.get(packet.__name__, packet)
            with graph.inserting_before(node):
                node.args, node.kwargs = map_aggregate(
                    (node.args, node.kwargs), lambda value: _readable(value, graph, device)
                )
    method: Any = type(fx.GraphModule(module, graph)).forward
    method.__name__ = name
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: method, "__module__": kind.__module__})
    return module


def _readable(value: Any, graph: fx.Graph, device: fx.Node) -> Any:
    """An argument as TorchScript reads it."""
    if isinstance(value, torch.device):
        return device
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return graph.call_function(float, (str(value),))
    return value
