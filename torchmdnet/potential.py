"""The whole potential: representation, head and priors, and ensembles of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph, bare_graph
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.nn.modules import reset_all
from torchmdnet.priors.base import BasePrior
from torchmdnet.typing import AtomicNumbers, Boxes, Positions, SystemIndex, SystemScalars

__all__ = ["Ensemble", "EnsemblePrediction", "Prediction", "TorchMD_Net"]

log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What a potential says of a batch; unpacks as ``energy, forces``."""

    energy: Tensor  # (S, 1) in the unit of the training data
    forces: Tensor  # (N, 3) per Å, or empty, (0,), without derivative


class EnsemblePrediction(NamedTuple):
    """Mean and standard deviation over the members of an ensemble."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3) or (0,)
    energy_std: Tensor  # (S, 1)
    forces_std: Tensor  # (N, 3) or (0,)


class TorchMD_Net(nn.Module):
    """A representation, an output head and priors.

    Args:
        representation_model: Architecture, see :class:`torchmdnet.models.base.Representation`.
        output_model: Head, see :class:`torchmdnet.heads.base.OutputModel`.
        prior_model: One prior or several, see :class:`torchmdnet.priors.base.BasePrior`.
        mean: Added to each system after the reduction over atoms; 0 by default.
        std: Multiplies the per-atom output of the head, before priors; 1 by default.
        derivative: Whether calls return forces, the negative gradient of the output, too.
        dtype: Precision of the parameters.
    """

    mean: Tensor
    std: Tensor
    representation_model: Any  # a Representation, or a module of older releases that returns five results
    output_model: OutputModel
    prior_model: Any  # priors in a ModuleList, or None

    def __init__(
        self,
        representation_model: nn.Module,
        output_model: OutputModel,
        prior_model: BasePrior | Iterable[BasePrior] | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        derivative: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.representation_model = representation_model.to(dtype=dtype)
        self.output_model = output_model.to(dtype=dtype)
        priors = [prior_model] if isinstance(prior_model, nn.Module) else list(prior_model or [])
        if priors and not self.output_model.allow_prior_model:
            log.warning(
                "The output model %s does not allow prior models; dropping %s.",
                type(self.output_model).__name__,
                ", ".join(type(prior).__name__ for prior in priors),
            )
            priors = []
        self.prior_model = nn.ModuleList(priors).to(dtype=dtype) if priors else None
        self.derivative = derivative
        #: What the file this model was loaded from says of it: options, and facts about the data such as units.
        self.hyper_parameters: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {}
        self.register_buffer("mean", torch.scalar_tensor(0) if mean is None else mean)
        self.register_buffer("std", torch.scalar_tensor(1) if std is None else std)
        self.mean, self.std = self.mean.to(dtype), self.std.to(dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset_all(self.representation_model, self.output_model, *(self.prior_model or ()))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters; positions and boxes are expected in it."""
        return self.mean.dtype

    def forward(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
    ) -> Prediction:
        """Energies, and forces if ``derivative`` is set, of a batch of systems.

        Args:
            z: Atomic numbers, (N,).
            pos: Positions, (N, 3) Å, in the precision of the model.
            batch: System of each atom, (N,); None is one system.
            box: Lattice vectors as rows, (3, 3) shared or (S, 3, 3) Å; a zero row is an open direction.
            q: Total charge of each system, (S,) e.
            s: Spin of each system, (S,).
            extra_args: Per-atom or per-system tensors for heads and priors, by name.
            num_systems: Number of systems S; None reads it from ``batch``.

        Returns:
            Energy (S, 1) and forces (N, 3), or (0,) without derivative. In training mode forces can be differentiated
            again.

        Raises:
            ValueError: If a shape does not fit or an element lies outside the embedding.
        """
        if not self.derivative:
            return Prediction(self._energy(z, pos, batch, box, q, s, extra_args, num_systems), pos.new_empty(0))
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if not pos.requires_grad:
                pos = (pos.clone() if pos.is_inference() else pos.detach()).requires_grad_()
            energy = self._energy(z, pos, batch, box, q, s, extra_args, num_systems)
            forces = forces_of(energy, pos, differentiable=self.training and keep)
        return Prediction(energy if keep else energy.detach(), forces)

    def _energy(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor | None,
        box: Tensor | None,
        q: Tensor | None,
        s: Tensor | None,
        extra_args: dict[str, Tensor] | None,
        num_systems: int | None,
    ) -> Tensor:
        features, graph = self._features(z, pos, batch, box, q, s, extra_args, num_systems)
        atomic = self._atomic(features, graph)
        energy = self.output_model.reduce(atomic, graph.batch, graph.num_systems) + self.mean  # (S, 1)
        energy = self.output_model.per_system(energy, graph)
        for prior in self.prior_model or ():
            energy = prior.add_to_systems(energy, graph)
        return energy

    def _atomic(self, features: Features, graph: Graph) -> Tensor:
        atomic = self.output_model.per_atom(features, graph)  # (N, 1)
        if features.energy is not None:
            atomic = atomic + features.energy
        atomic = atomic * self.std
        for prior in self.prior_model or ():
            atomic = prior.add_to_atoms(atomic, graph)
        return atomic

    @property
    def is_sum_of_atoms(self) -> bool:
        """Whether the output is the plain sum of :meth:`per_atom`, with nothing added to a system as a whole."""
        head = self.output_model
        parts = [(head, OutputModel, ("reduce", "per_system", "post_reduce"))]
        parts += [(prior, BasePrior, ("per_system", "post_reduce")) for prior in self.prior_model or ()]
        is_plain = all(
            getattr(type(part), name, None) is getattr(base, name) for part, base, names in parts for name in names
        )
        return is_plain and head.reduce_op in ("add", "sum") and not bool(self.mean)

    def per_atom(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
    ) -> Tensor:
        """Contribution of each atom, per-atom priors included, (N, 1); takes the arguments of :meth:`forward`.

        The contributions add up to the output where :attr:`is_sum_of_atoms` holds.
        """
        return self._atomic(*self._features(z, pos, batch, box, q, s, extra_args, num_systems))

    def _features(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor | None,
        box: Tensor | None,
        q: Tensor | None,
        s: Tensor | None,
        extra_args: dict[str, Tensor] | None,
        num_systems: int | None,
    ) -> tuple[Features, Graph]:
        model = self.representation_model
        if hasattr(model, "encode"):
            graph = model.graph(z, pos, batch, box, q, s, num_systems=num_systems, extra=extra_args)
            return model.select(model.encode(graph), graph)
        # an architecture written for older releases: no graph, five results
        batch = torch.zeros_like(z) if batch is None else batch
        x, v, z, pos, system = model(z, pos, batch, box=box, q=q, s=s)
        energy = getattr(model, "extra_energy", None)
        return Features(x, v, energy), bare_graph(z, pos, system, box, extra_args, num_systems)


def forces_of(energy: Tensor, pos: Positions, *, differentiable: bool) -> Tensor:
    """Negative gradient of the summed energies, (N, 3); zero where they do not depend on the positions."""
    if not energy.requires_grad:
        return torch.zeros_like(pos)
    (gradient,) = torch.autograd.grad(
        [energy.sum()], [pos], create_graph=differentiable, retain_graph=differentiable, allow_unused=True
    )
    return torch.zeros_like(pos) if gradient is None else -gradient


class Ensemble(nn.ModuleList):
    """Several potentials asked at once.

    Args:
        modules: Potentials with the same outputs.
        return_std: Whether to return standard deviations (over members, N - 1) beside the means.
    """

    def __init__(self, modules: Iterable[nn.Module], return_std: bool = False) -> None:
        modules = list(modules)
        for module in modules:
            if not isinstance(module, TorchMD_Net):
                raise TypeError(f"An ensemble is made of TorchMD_Net models, not {type(module).__name__}.")
        super().__init__(modules)
        self.return_std = return_std

    def forward(self, *args: Any, **kwargs: Any) -> Prediction | EnsemblePrediction:
        """Ask every member; takes the arguments of :meth:`TorchMD_Net.forward`.

        Returns:
            Mean energy and forces and, with ``return_std``, their standard deviations; NaN for a single member.
        """
        predictions = [model(*args, **kwargs) for model in self]
        energy = torch.stack([prediction.energy for prediction in predictions])
        forces = torch.stack([prediction.forces for prediction in predictions])
        if not self.return_std:
            return Prediction(energy.mean(dim=0), forces.mean(dim=0))
        return EnsemblePrediction(energy.mean(dim=0), forces.mean(dim=0), energy.std(dim=0), forces.std(dim=0))
