"""Potentials for LAMMPS, ``pair_style mliap unified``, on any number of ranks.

Each rank computes its own atoms. Layers after the first need the features of atoms around, which their owners send
(``forward_exchange``), and return gradients the same way (``reverse_exchange``): the shell of ghost atoms stays one
cutoff wide however many layers there are, and forces are exact.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmdnet.calculators.loading import as_dtype, spin_wanted, stated_units, trained_with
from torchmdnet.calculators.units import Units
from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.elements import ATOMIC_NUMBERS, SYMBOLS
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.files import check_target, draft_of
from torchmdnet.forces import Slopes, derivatives_of, detached, slopes_of_edges, with_leaves
from torchmdnet.graph import graph_of_edges
from torchmdnet.potential import TorchMD_Net
from torchmdnet.units import energy_factor

__all__ = ["STYLES", "MLIAPModel", "export_lammps"]

#: Units of LAMMPS that have energies and lengths of atoms -> those of energy; lengths are in Å.
STYLES = {"metal": "eV", "real": "kcal/mol"}

#: How many numbers for each atom fit into the buffers of a build for the host.
HOST_COLUMNS = 3

#: Variables in which launchers of MPI say how many ranks there are.
_RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


class MLIAPModel:
    """What LAMMPS loads and calls: a model of its ML-IAP package, ``unified``.

    Pickled, it is this class with the bytes of a native file, which are read as any model file is.

    Args:
        model: The potential, a sum over atoms without parts that look beyond its edges; it is copied.
        style: Units of the simulation, ``metal`` or ``real``.
        units: Units of the model.
        dtype: Precision of the calculation; None is that of the model.
        charge: Total charge of the simulated system in e.
        spin: Its spin in the convention of the training data.

    Raises:
        ConfigError: If the model has a part that cannot be computed so; the message names it.
    """

    #: What LAMMPS asks a model for.
    interface: Any = None
    ndescriptors = 1
    nparams = 1

    def __init__(
        self,
        model: TorchMD_Net,
        *,
        style: str = "metal",
        units: Units | None = None,
        dtype: torch.dtype | str | None = None,
        charge: float = 0.0,
        spin: float | None = None,
    ) -> None:
        if style not in STYLES:
            raise ConfigError(
                f"units: {style!r} is not available.{did_you_mean(style, STYLES)} Choose from metal, real."
            )
        units = units or stated_units(model, None)
        if units is None:
            raise ConfigError("units: the file of the model does not state them. Pass units of the model.")
        _check(model)
        if spin is None and trained_with(model, "spin"):
            raise ConfigError(f"spin: the model was trained with spin. Pass {spin_wanted(model)}.")
        self.style, self.units, self.charge, self.spin = style, units, float(charge), spin
        self.dtype = model.dtype if dtype is None else as_dtype(dtype)
        self.model = copy.deepcopy(model).to(self.dtype).eval().requires_grad_(False)
        self._prepare()

    def _prepare(self) -> None:
        architecture: Any = self.model._check_edges_suffice(False)
        trained_on = self.model.provenance.get("elements") or range(1, min(int(architecture.max_z), len(SYMBOLS)))
        self.element_types = [SYMBOLS[z] for z in trained_on]
        self.numbers = torch.tensor([ATOMIC_NUMBERS[symbol] for symbol in self.element_types])
        #: LAMMPS multiplies this with the sum of two radii, which are 1.
        self.rcutfac = float(architecture.cutoff_upper) * self.units.in_angstrom / 2
        self.energy_by = energy_factor(self.units.energy, STYLES[self.style])
        self.device = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_model(self.model, path)
            content = path.read_bytes()
        names = ("style", "units", "charge", "spin")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "units": tuple(self.units), "dtype": str(self.dtype), "file": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.style, self.charge, self.spin = state["style"], state["charge"], state["spin"]
        self.units, self.dtype = Units(*state["units"]), as_dtype(state["dtype"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            path.write_bytes(state["file"])
            model = load_model(path, derivative=False)
        assert isinstance(model, TorchMD_Net)
        self.model = model.to(self.dtype).eval().requires_grad_(False)
        self._prepare()

    def compute_gradients(self, data: Any) -> None:
        """Called by LAMMPS; there is nothing to do."""

    def compute_descriptors(self, data: Any) -> None:
        """Called by LAMMPS; there is nothing to do."""

    def compute_forces(self, data: Any) -> None:
        """Set energies and the forces of pairs; called by LAMMPS on every rank, also on those without atoms.

        Args:
            data: ``nlocal`` own atoms come first among the ``ntotal``; ``elems`` (ntotal,) are places in
                :attr:`element_types`; of each pair ``pair_i`` receives, and ``rij`` (P, 3) leads from i to j.
        """
        num_own, num_atoms = int(data.nlocal), int(data.ntotal)
        rij = torch.as_tensor(data.rij)
        self._move(rij.device)
        index = torch.stack([torch.as_tensor(data.pair_i), torch.as_tensor(data.pair_j)]).to(self.device).long()
        kinds = torch.as_tensor(data.elems, device=self.device).long()[:num_atoms]
        domain = _domain_of(data, index, num_own, num_atoms, self.device)
        atomic, slope = self.evaluate(self.numbers[kinds], index, -rij.reshape(-1, 3), num_own, domain)
        data.energy = float(atomic.sum())
        _set_energies(data, atomic)
        # of E in r_j - r_i, which is minus the vector of the edge
        if self.device.type == "cpu":
            data.update_pair_forces((-slope).double().numpy())
        else:
            data.update_pair_forces_gpu((-slope).double())

    def evaluate(
        self, z: Tensor, edge_index: Tensor, edge_vec: Tensor, num_own: int, domain: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Energies of the own atoms (n,) in float64, and the slope of all energies in the edges (E, 3).

        Args:
            z: Atomic numbers of the own atoms and the copies, (N,).
            edge_index: Row 0 receives, row 1 sends, (2, E).
            edge_vec: ``pos[i] - pos[j]`` in Å, (E, 3).
            num_own: Number of own atoms n.
            domain: See :mod:`torchmdnet.domains`; None if no atom is a copy, or features of copies are computed too.
        """
        model, architecture = self.model, self.model._check_edges_suffice(False)
        if z.shape[0] == 0:  # takes part in what other ranks do
            z = self.numbers[:1]
        with torch.inference_mode(False), torch.enable_grad():
            vec = (edge_vec.detach() / self.units.in_angstrom).to(self.dtype).requires_grad_()
            graph = graph_of_edges(
                z,
                edge_index,
                vec,
                cutoff_upper=architecture.cutoff_upper,
                cutoff_lower=architecture.cutoff_lower,
                loop=architecture.distance.loop,
            )
            batch = (torch.arange(z.shape[0], device=z.device) >= num_own).long()  # copies are another system

            def of_both(value: float | None) -> Tensor | None:
                return None if value is None else vec.new_full((2,), value)

            graph = graph._replace(
                batch=batch, num_systems=2, q=of_both(self.charge), s=of_both(self.spin), domain=domain
            )
            moved, leaves = with_leaves(detached(graph), has_positions=False)
            atomic = model._atomic(*model._encoded(moved))[:num_own, 0]
            slope = slopes_of_edges(vec, graph, Slopes(*derivatives_of(atomic, leaves)))
        by = self.energy_by
        return by * atomic.detach().double(), by / self.units.in_angstrom * slope.detach()

    def _move(self, device: torch.device) -> None:
        if device != self.device:
            self.model, self.numbers, self.device = self.model.to(device), self.numbers.to(device), device


class _Ranks:
    """A rank of LAMMPS among the others, by the collectives of its data object."""

    def __init__(self, data: Any, num_own: int, num_atoms: int, columns: int | None) -> None:
        self.data, self.num_own, self.num_atoms, self.columns = data, num_own, num_atoms, columns

    def to_copies(self, x: Tensor) -> Tensor:
        return self._exchanged(x, self.data.forward_exchange)

    def to_owners(self, grad: Tensor) -> Tensor:
        found = self._exchanged(grad, self.data.reverse_exchange)
        found[self.num_own :] = 0
        return found

    def _exchanged(self, x: Tensor, exchange: Any) -> Tensor:
        flat = x.detach().reshape(x.shape[0], -1)  # (N, C)
        found = flat.clone()
        width = flat.shape[1] if self.columns is None else self.columns
        for start in range(0, flat.shape[1], width):
            given = flat[: self.num_atoms, start : start + width].contiguous()
            taken = given.clone()
            exchange(given, taken, given.shape[1])
            found[: self.num_atoms, start : start + width] = taken
        return found.reshape(x.shape)

    def total(self, x: Tensor) -> Tensor:
        return _sum_over_ranks(x.detach())


def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over the ranks of MPI, which LAMMPS offers no call for."""
    ranks = max((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), default=1)
    try:
        world: Any = importlib.import_module("mpi4py.MPI").COMM_WORLD
    except ImportError:
        if ranks > 1:
            raise RuntimeError(
                f"There are {ranks} ranks, and this model shares charge among all atoms, which takes a sum over ranks. "
                "Install mpi4py where LAMMPS runs."
            ) from None
        return x.clone()
    if world.Get_size() == 1:
        return x.clone()
    values = x.double().cpu().contiguous().numpy()
    found = values.copy()
    world.Allreduce(values, found)
    return torch.from_numpy(found).to(x)


def _domain_of(data: Any, index: Tensor, num_own: int, num_atoms: int, device: torch.device) -> Any:
    if hasattr(data, "forward_exchange"):
        return _Ranks(data, num_own, num_atoms, HOST_COLUMNS if device.type == "cpu" else None)
    if num_atoms > num_own and index.shape[1] and not bool((index[0] >= num_own).any()):
        raise RuntimeError(
            "This LAMMPS neither exchanges features (a build with KOKKOS does) nor lists neighbours of ghost atoms. "
            "Write `pair_style mliap unified FILE 1`."
        )
    return None


def _set_energies(data: Any, atomic: Tensor) -> None:
    """Put the energies of the own atoms where LAMMPS looks for them."""
    try:
        target = torch.as_tensor(data.eatoms, device=atomic.device)
    except Exception:  # a build without KOKKOS lets them be set, not read
        data.eatoms = atomic.cpu().numpy()
    else:
        target[: atomic.shape[0]].copy_(atomic)


def _check(model: TorchMD_Net) -> None:
    """Refuse what cannot be computed from edges, domain by domain."""
    try:
        model._check_edges_suffice(False)
    except ValueError as error:
        reason = str(error).removeprefix("from_edges: ").partition(" Call the model")[0]
        raise ConfigError(f"export: {reason}") from None
    if not model.is_sum_of_atoms:
        raise ConfigError(
            "export: the energy of this model is no plain sum over atoms (a mean is added to each system, or a part "
            "adds something to a system as a whole), which LAMMPS needs."
        )
    if not hasattr(model.representation_model, "encode") or hasattr(model.representation_model, "model"):
        wrapper = type(model.representation_model).__name__
        raise ConfigError(f"export: {wrapper} hides atoms, and LAMMPS counts all of them. Export a model without it.")


def export_lammps(
    model: TorchMD_Net,
    path: str | Path,
    *,
    style: str = "metal",
    units: str | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    charge: float = 0.0,
    spin: float | None = None,
) -> MLIAPModel:
    """Write a model for ``pair_style mliap unified``.

    Args:
        model: The potential; it is not changed.
        path: The file to write, ``.pkl``.
        style: ``units`` of the simulation, ``metal`` or ``real``.
        units: Units of the model, where its file does not state them.
        dtype: Precision of the calculation; None is that of the model.
        charge: Total charge of the system in e.
        spin: Its spin in the convention of the training data.

    Returns:
        What was written.

    Raises:
        ConfigError: If the model cannot be computed domain by domain, or the name does not end in ``.pkl``.
    """
    path = check_target(path, "package")
    if path.suffix != ".pkl":
        raise ConfigError(f"{path}: LAMMPS tells models by their names. Name it {path.with_suffix('.pkl').name}.")
    known = None if units is None else Units.parse(units)
    written = MLIAPModel(model, style=style, units=known, dtype=dtype, charge=charge, spin=spin)
    with draft_of(path) as draft:
        draft.write_bytes(pickle.dumps(written))
    return written
