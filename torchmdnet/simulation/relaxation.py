"""Relaxation of structures, their cells included, with the optimisers of ASE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.page import COLOURS, GREY, STYLE, new_figure, png
from torchmdnet.simulation.sanity import closest_pair, what_is_wrong

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["OPTIMIZERS", "Relaxation", "draw_relaxations", "optimizer_of", "relax"]

#: Optimisers by name, and the class of ASE.
OPTIMIZERS = {
    "lbfgs": "LBFGS",
    "bfgs": "BFGS",
    "bfgs-linesearch": "BFGSLineSearch",
    "fire": "FIRE",
    "mdmin": "MDMin",
    "gpmin": "GPMin",
}


@dataclass
class Relaxation:
    """How a structure went downhill.

    Args:
        name: The structure.
        atoms: As it is now, with its calculator.
        energies: eV, of each step (T,).
        forces: Largest force on an atom, in eV/Å, of each step (T,).
        stresses: Largest component of what drives the cell, in GPa; of relaxations of cells.
        frames: Copies of the structure, of each step.
        converged: Whether the end was reached.
        reason: Why it was stopped.
    """

    name: str
    atoms: Atoms
    energies: list[float] = field(default_factory=list)
    forces: list[float] = field(default_factory=list)
    stresses: list[float] = field(default_factory=list)
    frames: list[Atoms] = field(default_factory=list)
    converged: bool = False
    reason: str | None = None

    def summary(self) -> dict[str, Any]:
        """The numbers."""
        first, last = self.frames[0], self.frames[-1]
        found: dict[str, Any] = {
            "name": self.name,
            "formula": last.get_chemical_formula(),
            "num_atoms": len(last),
            "converged": self.converged,
            "stopped": self.reason,
            "steps": len(self.energies) - 1,
            "energy_eV": self.energies[-1],
            "energy_change_eV": self.energies[-1] - self.energies[0],
            "largest_force_eV_A": self.forces[-1],
        }
        if self.stresses:
            found |= {
                "largest_stress_GPa": self.stresses[-1],
                "volume_A3": float(last.get_volume()),
                "volume_change": float(last.get_volume() / first.get_volume() - 1),
                "cell_lengths_A": last.cell.lengths().tolist(),
                "cell_angles_degrees": last.cell.angles().tolist(),
            }
        return found


def optimizer_of(name: str) -> Callable[..., Any]:
    """The optimiser of ASE by a name of :data:`OPTIMIZERS`."""
    import ase.optimize

    if name not in OPTIMIZERS:
        raise ConfigError(
            f"--optimizer: {name!r} is not available.{did_you_mean(name, OPTIMIZERS)} "
            f"Choose from {', '.join(OPTIMIZERS)}."
        )
    return getattr(ase.optimize, OPTIMIZERS[name])


def relax(
    relaxation: Relaxation,
    *,
    fmax: float,
    steps: int,
    optimizer: str = "lbfgs",
    cell: bool = False,
    pressure: float = 0.0,
    tell: Callable[[Relaxation], bool] = lambda relaxation: True,
) -> None:
    """Go downhill until the largest force is small enough.

    Atoms that run into each other stop it. Those that are too near to each other at its start have until its end to
    move apart.

    Args:
        relaxation: The structure; gets the steps.
        fmax: Largest force on an atom at the end, in eV/Å; with ``cell`` the stress times the volume, per atom, too.
        steps: How many steps may be taken.
        optimizer: A name of :data:`OPTIMIZERS`.
        cell: Whether to relax the cell, by the gradient of the enthalpy in its deformation (``FrechetCellFilter``).
        pressure: Of the surroundings, in GPa; with ``cell``.
        tell: Called after each step; False stops.
    """
    from ase import units
    from ase.filters import FrechetCellFilter

    atoms = relaxation.atoms
    moved: Any = FrechetCellFilter(atoms, scalar_pressure=pressure * units.GPa) if cell else atoms
    motion = optimizer_of(optimizer)(moved, logfile=None)
    are_apart, clash = False, None
    for converged in motion.irun(fmax=fmax, steps=steps):
        forces = atoms.get_forces()
        relaxation.energies.append(float(atoms.get_potential_energy()))
        relaxation.forces.append(float(np.linalg.norm(forces, axis=1).max()))
        if cell:
            stress = atoms.get_stress(voigt=False) + pressure * units.GPa * np.eye(3)
            relaxation.stresses.append(float(np.abs(stress).max() / units.GPa))
        copy = atoms.copy()
        copy.calc = None
        relaxation.frames.append(copy)
        relaxation.converged = bool(converged)
        clash = closest_pair(atoms)
        are_apart = are_apart or clash is None
        relaxation.reason = what_is_wrong(atoms, forces=forces, energy=relaxation.energies[-1], max_force=math.inf) or (
            clash if are_apart else None
        )
        if relaxation.reason is not None:
            relaxation.converged = False
            return
        if not tell(relaxation):
            return
    if clash is not None:
        relaxation.converged, relaxation.reason = False, clash


def draw_relaxations(relaxations: list[Relaxation], fmax: float) -> bytes:
    """Energies and largest forces over the steps, as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, axes = new_figure(2, width=4.8, height=3.5)
        few = len(relaxations) <= len(COLOURS)
        for each, colour in zip(relaxations, COLOURS if few else [GREY] * len(relaxations), strict=False):
            style = {"color": colour, "linewidth": 1.3, "alpha": 0.9 if few else 0.4}
            energies = 1000 * (np.array(each.energies) - each.energies[-1]) / len(each.atoms)
            axes[0].plot(np.arange(len(energies)), energies, label=each.name.rpartition("/")[2], **style)
            axes[1].plot(np.arange(len(each.forces)), each.forces, **style)
        axes[0].set_title("Energy above the last step")
        axes[0].set_ylabel("meV/atom")
        axes[1].set_title("Largest force on an atom")
        axes[1].set_ylabel("eV/Å")
        axes[1].set_yscale("log")
        if 1 < len(relaxations) <= len(COLOURS):
            axes[0].legend(fontsize=8)
        axes[1].axhline(fmax, color=GREY, linewidth=1.2, linestyle="--", label="to be reached")
        axes[1].legend(fontsize=8)
        for axis in axes:
            axis.set_xlabel("step")
            axis.locator_params(axis="x", integer=True)
        return png(figure)
