"""Potentials for engines that bring batches of positions, such as TorchMD."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchmdnet.calculators.cuda_graph import CudaGraph, check_cuda
from torchmdnet.calculators.fixed import FixedStep
from torchmdnet.calculators.loading import (
    Notices,
    as_dtype,
    can_be_moved,
    check_elements,
    load,
    placed,
    spin_wanted,
    stated_units,
    trained_with,
    units_or_default,
    unseen_elements,
    unseen_states,
)
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.calculators.units import Transform, make_transform, tranforms
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Inputs
from torchmdnet.neighbors import Home, VerletList

__all__ = ["External"]

log = logging.getLogger(__name__)

#: A number shared by all replicas, one per replica, or None.
PerReplica = float | Sequence[float] | Tensor | None


class External:
    """A potential over a fixed set of atoms, in one or more replicas.

    Args:
        netfile: A checkpoint (or several, or a zip of them), or a module called with ``z, pos, batch, box`` that
            returns energies, or energies and forces. Where it returns no forces they are found by differentiation.
        embeddings: Atomic numbers, (replicas, atoms), as a tensor or nested lists; (atoms,) is one replica.
        device: Where the model runs. Results stay there.
        output_transform: What to do with energies and forces: one of the names in
            :data:`torchmdnet.calculators.tranforms`; the units to convert to, such as ``"kcal/mol/A"`` or
            ``"kJ/mol/nm"``, with exact factors; or a function of both. None leaves them in the units of the model.
        use_cuda_graph: Capture the call as a CUDA graph on first use, from the search for neighbours to the forces,
            and replay it afterwards. It is captured again when there are more neighbours than its capacity, or shapes
            change. A model that cannot be captured, or replays to something else, runs plainly and says so.
        cuda_graph_warmup_steps: Plain calls before the capture.
        dtype: Precision of the calculation, a torch type or its name. A model in another precision is converted; if
            it is a module of yours, a copy of it.
        q: Total charge of each replica in e, or one number for all.
        s: Spin of each replica, as ``q``, in the convention of the training data.
        units: Units of the model, ``"kcal/mol"`` or ``"Hartree/Bohr"``, where its file does not state them.
        skin: On the CPU, and in a captured call, neighbours are looked for this much beyond the cutoff, in Å, and again
            when an atom has moved half of it; see :class:`torchmdnet.neighbors.VerletList`. Results do not depend on
            it. 0 turns it off.
        **kwargs: Options for :func:`torchmdnet.checkpoint.load_model`.

    Raises:
        ValueError: If an argument does not fit; the message names it.
    """

    def __init__(
        self,
        netfile: str | Path | Sequence[str | Path] | nn.Module,
        embeddings: Tensor | Sequence[int] | Sequence[Sequence[int]],
        device: str | torch.device = "cpu",
        output_transform: str | Transform | None = None,
        use_cuda_graph: bool = False,
        cuda_graph_warmup_steps: int = 12,
        dtype: torch.dtype | str = torch.float32,
        *,
        q: PerReplica = None,
        s: PerReplica = None,
        units: str | Sequence[str] | Mapping[str, str] | None = None,
        skin: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.device = device
        self.dtype = as_dtype(dtype)
        if use_cuda_graph:
            check_cuda(device, "use_cuda_graph")
            if not isinstance(netfile, nn.Module) and not kwargs.get("static_shapes", False):
                warnings.warn("use_cuda_graph=True needs arrays of fixed shape; static_shapes=True is set.")
                kwargs["static_shapes"] = True
        z = _atomic_numbers(embeddings)  # (R, n)
        self.num_replicas, self.n_atoms = z.shape
        if isinstance(netfile, nn.Module):
            if kwargs:
                warnings.warn(f"A module is used as it is; {', '.join(kwargs)} would only change how a file is loaded.")
            self.model = netfile
        elif isinstance(netfile, (str, Path, list, tuple)):
            self.model = load(netfile, device=device, dtype=self.dtype, derivative=True, **kwargs)
        else:
            raise ValueError(
                f"netfile is a {type(netfile).__name__}. Pass the path of a checkpoint, several paths, or a module."
            )
        check_elements(self.model, z.reshape(-1))
        self.embeddings = z.reshape(-1).to(device)  # (N,)
        self.batch = torch.arange(self.num_replicas, device=device).repeat_interleave(self.n_atoms)  # (N,)
        self.q, self.s = q, s
        self._tell = Notices(log)
        self._tell(unseen_elements(self.model, z.reshape(-1)))
        self.units = stated_units(self.model, units)
        if isinstance(output_transform, str) and output_transform not in tranforms:
            self.units = units_or_default(self.units, netfile)
        self.output_transformer = make_transform(output_transform, self.units)
        self.search = VerletList(self._in_units_of_the_model(skin)) if skin else None
        self.use_cuda_graph = use_cuda_graph
        self.cuda_graph_warmup_steps = cuda_graph_warmup_steps
        self.cuda_graph: FixedStep | None = None
        self.pos: Tensor | None = None
        self.box: Tensor | None = None
        self.energy: Tensor | None = None
        self.forces: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """The model; another one may be put in its place, and is brought into the same precision."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = placed(model, self.device, self.dtype).eval()
        self._is_read = {option: trained_with(self._model, option) for option in ("charge", "spin")}
        #: Brings positions near the origin before they are rounded.
        self.home = Home() if self.dtype != torch.float64 and can_be_moved(self._model) else None
        self.cuda_graph = None

    def calculate(
        self,
        pos: Tensor,
        box: Tensor | None = None,
        q: PerReplica = None,
        s: PerReplica = None,
    ) -> tuple[Tensor, Tensor]:
        """Energies and forces of all replicas.

        Args:
            pos: Positions in Å, (replicas, atoms, 3) or any shape with as many numbers.
            box: Lattice vectors as rows in Å, (3, 3) shared or (replicas, 3, 3); all zeros is no box, a zero row an
                open direction.
            q: Total charges for this call, in place of those given at construction.
            s: Spins for this call, likewise.

        Returns:
            Energies (replicas, 1) and forces (replicas, atoms, 3), both without gradient history.

        Raises:
            ValueError: If a shape does not fit.
        """
        with torch.inference_mode(False):
            self.box = self._boxes(box)
            self.pos = self._positions(pos, box)
            inputs = Inputs(
                self.embeddings,
                self.pos,
                self.batch,
                self.box,
                self._per_replica("q", self.q if q is None else q),
                self._per_replica("s", self.s if s is None else s),
                num_systems=self.num_replicas,
                search=self.search,
            )
        answers = self._replay(inputs) if self.use_cuda_graph else predict_members(self.model, inputs)
        energy, forces = _mean([answer.energy for answer in answers]), _mean([answer.forces for answer in answers])
        energy, forces = self.output_transformer(energy, forces.reshape(self.num_replicas, self.n_atoms, 3))
        energy, forces = energy.detach().clone(), forces.detach().clone()
        self.energy, self.forces = energy, forces
        return energy, forces

    def _replay(self, inputs: Inputs) -> list[Answer]:
        if self.cuda_graph is None:
            skin = 0.0 if self.search is None else self.search.skin
            self.cuda_graph = FixedStep(self.model, CudaGraph, self.cuda_graph_warmup_steps, plain_calls=0, skin=skin)
        try:
            return self.cuda_graph(inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log.warning(
                "use_cuda_graph: %s cannot be captured (%s); it runs without.", type(self.model).__name__, reason
            )
            self.use_cuda_graph, self.cuda_graph = False, None
            return predict_members(self.model, inputs)

    def _positions(self, pos: Any, box: Any) -> Tensor:
        """Positions as (N, 3); those in double precision are brought near the origin before they are rounded."""
        pos = torch.as_tensor(pos).detach().clone().to(device=self.device)
        expected = self.num_replicas * self.n_atoms * 3
        if pos.numel() != expected:
            raise ValueError(
                f"pos has shape {tuple(pos.shape)} but embeddings hold {self.num_replicas} replicas of {self.n_atoms} "
                f"atoms. Pass ({self.num_replicas}, {self.n_atoms}, 3), or embeddings of shape (replicas, atoms)."
            )
        pos = pos.reshape(-1, 3)
        if self.home is not None and pos.dtype == torch.float64:
            cells = None if box is None else torch.as_tensor(box).detach().to(pos)
            pos = self.home(pos, self.batch, cells, self.num_replicas)
        return self._in_units_of_the_model(pos.to(self.dtype))

    def _boxes(self, box: Any) -> Tensor | None:
        if box is None:
            return None
        box = torch.as_tensor(box).detach().clone().to(device=self.device, dtype=self.dtype)
        return self._in_units_of_the_model(box) if bool(box.any()) else None

    def _in_units_of_the_model(self, length: Any) -> Any:
        if self.units is None or self.units.length == "Å":
            return length
        return length / self.units.in_angstrom

    def _per_replica(self, name: Literal["q", "s"], value: PerReplica) -> Tensor | None:
        """Charges or spins as (replicas,), or None where the model needs none."""
        option: Literal["charge", "spin"] = "charge" if name == "q" else "spin"
        is_read = self._is_read[option]
        if value is None:
            if not is_read:
                return None
            if name == "s":
                raise ConfigError(f"s: the model was trained with spin. Pass s=, {spin_wanted(self.model)}.")
            self._tell("q: the model was trained with charges and none is given; 0 is assumed. Pass q=.")
            value = 0.0
        tensor = torch.as_tensor(value).detach().to(device=self.device, dtype=self.dtype).reshape(-1)
        if tensor.numel() not in (1, self.num_replicas):
            raise ValueError(
                f"{name} holds {tensor.numel()} values but there are {self.num_replicas} replicas. "
                "Pass one for all, or one for each."
            )
        if is_read is False and bool(tensor.any()):
            self._tell(f"{name}: the model was trained without {option}; what it makes of it is not learned.")
        self._tell(unseen_states(self.model, option, tensor))
        return tensor.expand(self.num_replicas).clone()


def _mean(members: list[Tensor]) -> Tensor:
    return members[0] if len(members) == 1 else torch.stack(members).mean(dim=0)


def _atomic_numbers(embeddings: Any) -> Tensor:
    """Atomic numbers as (replicas, atoms) int64 on the CPU."""
    try:
        z = torch.as_tensor(embeddings if isinstance(embeddings, Tensor) else np.array(embeddings)).detach().cpu()
    except (TypeError, ValueError):
        raise ValueError("embeddings has rows of different lengths; replicas are copies of the same atoms.") from None
    if z.dim() == 1:
        z = z[None]
    if z.dim() != 2 or z.is_floating_point() or z.dtype == torch.bool:
        raise ValueError(
            f"embeddings has shape {tuple(z.shape)}, {z.dtype}. Pass integer atomic numbers, (replicas, atoms)."
        )
    return z.long()
