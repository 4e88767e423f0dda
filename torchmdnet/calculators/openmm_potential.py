"""Potentials for OpenMM: a force for any system, and a potential of OpenMM-ML.

OpenMM-ML finds :class:`PotentialFactory` by an entry point (group ``openmmml.potentials``), under the name
``torchmd-net``. PyTorch is loaded when a system is made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import unit
from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.units import energy_factor

if TYPE_CHECKING:
    from openmm.app import Topology

    from torchmdnet.calculators.batches import BatchPotential
    from torchmdnet.calculators.loading import ModelSource

__all__ = ["Computation", "Potential", "PotentialFactory", "make_force"]

_IN_KJ_PER_MOL = energy_factor("eV", "kJ/mol")

#: Arguments of ``createSystem`` and ``createMixedSystem`` that are read here.
OPTIONS = ("charge", "multiplicity", "spin", "periodic", "device", "dtype", "skin", "cuda_graph")


class Computation:
    """What a ``PythonForce`` calls: a state of OpenMM in, energy in kJ/mol and forces in kJ/mol/nm out.

    It can be pickled, as OpenMM does to write a System as XML. A model that came from a file is kept as the path of
    this file, and read where the computation is called first.

    Args:
        source: A model file; several, or a zip of them, for an ensemble; or a model.
        numbers: Atomic numbers of the particles, (N,).
        periodic: Whether the box of the state counts.
        charge: Total charge in e; None is 0, which is logged where the model was trained with charges.
        spin: Spin in the convention of the training data.
        options: Of :class:`torchmdnet.calculators.batches.BatchPotential`; ``device`` is a GPU where there is one.
    """

    def __init__(
        self,
        source: ModelSource,
        numbers: Sequence[int],
        *,
        periodic: bool,
        charge: float | None = None,
        spin: float | None = None,
        **options: Any,
    ) -> None:
        self.source = _absolute(source)
        self.numbers, self.periodic = [int(z) for z in numbers], periodic
        self.charge, self.spin, self.options = charge, spin, options
        self._potential: BatchPotential | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_potential": None}

    @property
    def potential(self) -> BatchPotential:
        """The model, which is loaded when it is first asked for."""
        if self._potential is None:
            import torch

            from torchmdnet.calculators.batches import BatchPotential

            options = dict(self.options)
            if options.get("device") is None:
                options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            self._potential = BatchPotential(self.source, **options)
        return self._potential

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        """Energy and forces of the particles in a state.

        Raises:
            ValueError: If positions are not finite, or an element lies outside the embedding.
        """
        import torch

        pos = torch.from_numpy(np.ascontiguousarray(state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)))
        box = None
        if self.periodic:
            vectors = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.angstrom)
            box = torch.from_numpy(np.array(vectors, dtype=np.float64))
        z = torch.tensor(self.numbers)
        charge, spin = (None if x is None else torch.tensor([float(x)]) for x in (self.charge, self.spin))
        found = self.potential(z, pos.double(), torch.zeros_like(z), box, charge, spin, num_systems=1)
        forces = found.forces.double().cpu().numpy()
        return _IN_KJ_PER_MOL * found.energy.item(), forces * (10 * _IN_KJ_PER_MOL)


def make_force(
    source: ModelSource,
    numbers: Sequence[int],
    *,
    particles: Iterable[int] | None = None,
    periodic: bool = False,
    charge: float | None = None,
    spin: float | None = None,
    **options: Any,
) -> openmm.PythonForce:
    """A force for a system of OpenMM.

    Args:
        source: A model file; several, or a zip of them, for an ensemble; or a model. It is read here.
        numbers: Atomic numbers of the particles that the potential is for.
        particles: Their places in the system; None is all of them, in order.
        periodic: Whether the box of the system counts.
        charge: Total charge of these particles in e.
        spin: Their spin, in the convention of the training data.
        **options: Of :class:`torchmdnet.calculators.batches.BatchPotential`.

    Raises:
        ConfigError: If the model reads spins and none is given, or this OpenMM applies no Python force to some
            particles.
        ValueError: If an element lies outside the embedding.
    """
    import torch

    from torchmdnet.calculators.loading import check_elements, spin_wanted

    computation = Computation(source, numbers, periodic=periodic, charge=charge, spin=spin, **options)
    potential = computation.potential
    check_elements(potential.model, torch.tensor(computation.numbers))
    if spin is None and potential.reads("spin"):
        raise ConfigError(f"spin: the model was trained with spin. Pass spin=, {spin_wanted(potential.model)}.")
    force = openmm.PythonForce(computation)
    force.setUsesPeriodicBoundaryConditions(periodic)
    if particles is not None:
        if not hasattr(force, "setParticles"):
            raise ConfigError(
                f"atoms: OpenMM {openmm.__version__} applies a Python force to all particles. Install OpenMM 8.6 or "
                "later, or model all of them."
            )
        force.setParticles([int(particle) for particle in particles])
    return force


class PotentialFactory(MLPotentialImplFactory):
    """Makes potentials for ``MLPotential("torchmd-net", model="model.safetensors")``."""

    def createImpl(self, name: str, **args: Any) -> MLPotentialImpl:
        """Called by OpenMM-ML with the arguments of ``MLPotential``, see :class:`Potential`."""
        return Potential(name, **args)


class Potential(MLPotentialImpl):
    """Any model file as a potential of OpenMM-ML, for whole systems and for a part in a force field.

    Args:
        name: Under which it was asked for.
        model: A model file; several, or a zip of them, for an ensemble; or a model.
        modelPath: The same under the name that other potentials of OpenMM-ML use.
        **options: Of :class:`torchmdnet.calculators.batches.BatchPotential`, such as ``units`` for files without.

    Raises:
        ConfigError: If no model is given, or two are.
    """

    def __init__(
        self, name: str, model: ModelSource | None = None, modelPath: ModelSource | None = None, **options: Any
    ) -> None:
        source = model if modelPath is None else modelPath
        if source is None or (model is not None and modelPath is not None):
            raise ConfigError(f'{name}: pass one model file, MLPotential("{name}", model="model.safetensors").')
        self.name, self.options = name, options
        self.source: ModelSource = source

    def getMLLongRange(self) -> bool:
        """Whether the model sums over periodic images beyond its neighbours; called by OpenMM-ML."""
        from torchmdnet.calculators.batches import BatchPotential
        from torchmdnet.priors.coulomb import Coulomb

        members = BatchPotential(self.source, **self.options).members
        priors = [prior for member in members for prior in getattr(member, "prior_model", None) or ()]
        return any(isinstance(prior, Coulomb) and prior.lattice_sum == "ewald" for prior in priors)

    def addForces(
        self,
        topology: Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        *,
        charge: float | None = None,
        multiplicity: float | None = None,
        spin: float | None = None,
        periodic: bool | None = None,
        **options: Any,
    ) -> None:
        """Add the force; called by OpenMM-ML with what ``createSystem`` or ``createMixedSystem`` were given.

        Args:
            topology: Says which elements the atoms are.
            system: Where the force goes.
            atoms: Places of the atoms that the potential is for; None is all.
            forceGroup: Of the force.
            charge: Total charge of these atoms in e; None adds up their formal charges where the topology has these.
            multiplicity: Their spin multiplicity, one more than the number of unpaired electrons.
            spin: Their spin in the convention of the training data; one of the two.
            periodic: Whether the box counts; None says so where the topology or the system has one.
            **options: ``device``, ``dtype``, ``skin`` and ``cuda_graph``, see
                :class:`torchmdnet.calculators.batches.BatchPotential`. Others are ignored with a warning.

        Raises:
            ConfigError: If an argument does not fit.
            ValueError: If an atom has no element, or one that lies outside the embedding.
        """
        unknown = [option for option in options if option not in OPTIONS]
        for option in unknown:
            warnings.warn(f"{self.name}: {option} is not an option here and is ignored.{did_you_mean(option, OPTIONS)}")
            del options[option]
        chosen = list(topology.atoms())
        particles = None if atoms is None else [int(atom) for atom in atoms]
        if particles is not None:
            chosen = [chosen[particle] for particle in particles]
        for atom in chosen:
            if atom.element is None:
                raise ValueError(
                    f"{self.name}: atom {atom.index} ({atom.name} of {atom.residue.name}) has no element. Set it in "
                    "the topology, or leave the atom to the force field."
                )
        if spin is not None and multiplicity is not None and spin != multiplicity - 1:
            raise ConfigError(f"spin={spin} contradicts multiplicity={multiplicity}. Pass one of them.")
        if multiplicity is not None:
            spin = multiplicity - 1
        if charge is None:
            formal = [getattr(atom, "formalCharge", None) for atom in chosen]
            charge = float(sum(formal)) if None not in formal else None  # type: ignore[arg-type]
        if periodic is None:
            periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
        force = make_force(
            self.source,
            [atom.element.atomic_number for atom in chosen],
            particles=particles,
            periodic=bool(periodic),
            charge=charge,
            spin=spin,
            **{**self.options, **options},
        )
        force.setForceGroup(forceGroup)
        force.setName("TorchMD-Net")
        system.addForce(force)


def _absolute(source: Any) -> Any:
    """Paths that mean the same from another folder."""
    if isinstance(source, str | Path):
        return os.path.abspath(os.path.expanduser(source))
    if isinstance(source, Sequence):
        return [_absolute(path) for path in source]
    return source
