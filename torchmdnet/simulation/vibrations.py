"""Vibrations: the Hessian by differentiating a model twice, modes, infrared intensities, thermochemistry, phonons."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchmdnet.calculators.loading import members_of
from torchmdnet.errors import ConfigError
from torchmdnet.models.base import set_radial_mode
from torchmdnet.page import BLUE, GREY, ORANGE, STYLE, new_figure, png
from torchmdnet.simulation.modes import normal_modes_of

if TYPE_CHECKING:
    from ase import Atoms

    from torchmdnet.calculators import TMDNETCalculator

__all__ = [
    "Phonons",
    "Vibrations",
    "draw_phonons",
    "draw_vibrations",
    "hessian_of",
    "phonons",
    "thermochemistry",
    "vibrations",
]

log = logging.getLogger(__name__)

#: Modes below this wavenumber are no vibrations of what is at a minimum, in 1/cm.
SOFT = 10.0
#: km/mol of the squared derivative of a dipole in e along a mode of 1 u.
KM_PER_MOL = 974.8801
#: Displacement for finite differences, in Å.
STEP = 0.005


@dataclass
class Vibrations:
    """Normal modes.

    Args:
        atoms: N atoms.
        wavenumbers: (M,) 1/cm, ascending; negative ones are imaginary.
        modes: (M, N, 3) displacements, each with length 1.
        masses: Reduced masses (M,) in u.
        intensities: Infrared intensities (M,) in km/mol; None where no dipoles are predicted.
        method: How the Hessian was found.
        largest_force: Of the structure, in eV/Å: at a stationary point zero.
        energy: Of the structure, in eV.
    """

    atoms: Atoms
    wavenumbers: np.ndarray
    modes: np.ndarray
    masses: np.ndarray
    intensities: np.ndarray | None
    method: str
    largest_force: float
    energy: float

    @property
    def imaginary(self) -> np.ndarray:
        """Numbers of the imaginary modes."""
        return np.flatnonzero(self.wavenumbers < -SOFT)

    @property
    def energies(self) -> np.ndarray:
        """Energies of the real modes, in eV."""
        from ase import units

        return self.wavenumbers[self.wavenumbers > 0] * units.invcm


def vibrations(
    atoms: Atoms, tell: Callable[[int, int], None] = lambda done, total: None, *, numerical: bool = False
) -> Vibrations:
    """Normal modes of a structure, fixed atoms left out.

    Args:
        atoms: With a :class:`~torchmdnet.calculators.TMDNETCalculator`.
        tell: Called with the number of rows of the Hessian that are done, and of all.
        numerical: Take finite differences of forces, not derivatives of the model.

    Raises:
        ConfigError: If all atoms are held in place.
    """
    from ase import units
    from ase.constraints import FixAtoms

    fixed = sorted({int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.get_indices()})
    free = [index for index in range(len(atoms)) if index not in set(fixed)]
    if not free:
        raise ConfigError("vib: all atoms are held in place. Leave some free.")
    energy = float(atoms.get_potential_energy())
    largest = float(np.linalg.norm(atoms.get_forces(apply_constraint=False)[free], axis=1).max())
    hessian, slopes, method = hessian_of(atoms, free, tell, numerical=numerical)
    part = atoms[free]
    if fixed:
        root = np.sqrt(np.repeat(part.get_masses(), 3))
        squares, rows = np.linalg.eigh((hessian + hessian.T) / 2 / np.outer(root, root))
        rows = rows.T
        keep = np.ones(len(squares), dtype=bool)
    else:
        squares, rows = normal_modes_of(hessian, part)
        keep = np.ones(len(squares), dtype=bool)
        keep[np.argsort(np.abs(squares))[: _num_rigid(part)]] = False
    scale = units._hbar * units.J * units.second / units.invcm
    wavenumbers = np.sign(squares[keep]) * np.sqrt(np.abs(squares[keep])) * scale
    weighted = rows[keep].reshape(-1, len(free), 3)  # orthonormal, mass-weighted
    displaced = weighted / np.sqrt(part.get_masses())[:, None]
    lengths = np.linalg.norm(displaced.reshape(len(displaced), -1), axis=1)
    intensities = None
    if slopes is not None:
        along = np.einsum("xnk,mnk->mx", slopes, displaced)  # (M, 3) e/√u
        intensities = KM_PER_MOL * (along**2).sum(axis=1)
    modes = np.zeros((len(displaced), len(atoms), 3))
    modes[:, free] = displaced / lengths[:, None, None]
    return Vibrations(atoms, wavenumbers, modes, 1 / lengths**2, intensities, method, largest, energy)


def _num_rigid(atoms: Atoms) -> int:
    from torchmdnet.simulation.modes import rigid_motions

    return rigid_motions(atoms).shape[1]


def hessian_of(
    atoms: Atoms,
    free: list[int],
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    numerical: bool = False,
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Second derivatives of the energy, and first ones of the dipole where there is one.

    Args:
        atoms: With its calculator.
        free: Numbers of the K atoms that move.
        tell: Called with the number of rows that are done, and of all.
        numerical: Take finite differences of forces.

    Returns:
        The Hessian (3K, 3K) in eV/Å²; derivatives of the dipole (3, K, 3) in e, or None; and how they were found.
    """
    calculator: Any = atoms.calc
    if not numerical:
        try:
            return (*_by_derivatives(calculator, atoms, free, tell), "derivatives of the model")
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            log.warning("The model cannot be differentiated twice (%s); finite differences are taken.", reason)
    hessian = np.empty((3 * len(free), 3 * len(free)))
    slopes = np.zeros((3, len(free), 3))
    has_dipole = "dipole" in getattr(calculator, "properties", {})
    start = atoms.positions.copy()
    copy = atoms.copy()
    copy.set_constraint()
    copy.calc = calculator
    for row in range(3 * len(free)):
        sides, dipoles = [], []
        for sign in (1, -1):
            copy.positions = start
            copy.positions[free[row // 3], row % 3] += sign * STEP
            sides.append(copy.get_forces()[free].ravel())
            dipoles.append(np.asarray(calculator.results["dipole"]) if has_dipole else np.zeros(3))
        hessian[row] = (sides[1] - sides[0]) / (2 * STEP)
        slopes[:, row // 3, row % 3] = (dipoles[0] - dipoles[1]) / (2 * STEP)
        tell(row + 1, 3 * len(free))
    return hessian, slopes if has_dipole else None, f"finite differences of forces, {STEP:g} Å"


def _by_derivatives(
    calculator: TMDNETCalculator, atoms: Atoms, free: list[int], tell: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """A pass back through the gradient for each coordinate; means over the members of an ensemble."""
    units = calculator.units
    inputs = calculator._inputs(atoms)
    members = members_of(calculator.model)
    has_dipole = "dipole" in calculator.properties
    size = 3 * len(free)
    columns = torch.tensor([3 * atom + axis for atom in free for axis in range(3)])
    hessians, slopes = [], []
    for number, member in enumerate(members):
        set_radial_mode(member, "exact")  # a spline through a filter has no third derivative
        pos = inputs.pos.detach().clone().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            given = (inputs.z, pos, inputs.batch, inputs.box, inputs.q, inputs.s)
            found = member(*given, properties=True) if has_dipole else member(*given)
            (gradient,) = torch.autograd.grad(found[0].sum(), pos, create_graph=True)
            flat = gradient.reshape(-1)[columns]
            rows = []
            for row in range(size):
                (second,) = torch.autograd.grad(flat[row], pos, retain_graph=True)
                rows.append(second.detach().reshape(-1)[columns].double().cpu().numpy())
                tell(number * size + row + 1, len(members) * size)
            if has_dipole:
                dipole = found.properties["dipole"].reshape(3)
                each = [torch.autograd.grad(dipole[axis], pos, retain_graph=axis < 2)[0] for axis in range(3)]
                slopes.append(torch.stack(each).detach().double().cpu().numpy()[:, free])
        hessians.append(units.in_ev / units.in_angstrom**2 * np.stack(rows))
    # a dipole in e times a length of the model, over that length, is in e
    return np.mean(hessians, axis=0), np.mean(slopes, axis=0) if slopes else None


def thermochemistry(
    found: Vibrations, *, temperature: float, pressure: float, symmetry: int, spin: float
) -> dict[str, Any]:
    """Thermodynamic functions of a molecule as an ideal gas, or of vibrations alone where it is periodic or held.

    Args:
        found: The modes; imaginary ones are left out.
        temperature: In K.
        pressure: In bar; of the gas.
        symmetry: Symmetry number of the molecule, by which its rotations are counted.
        spin: Total spin S: half the number of unpaired electrons.
    """
    from ase import units
    from ase.thermochemistry import HarmonicThermo, IdealGasThermo

    energies = found.energies
    complex_energies: Any = [units.invcm * np.emath.sqrt(np.sign(x) * x * x) for x in found.wavenumbers]
    result: dict[str, Any] = {
        "temperature_K": temperature,
        "zero_point_energy_eV": float(energies.sum() / 2),
        "imaginary_modes_left_out": len(found.wavenumbers) - len(energies),
    }
    atoms = found.atoms
    if atoms.pbc.any() or atoms.constraints:
        harmonic = HarmonicThermo(complex_energies, potentialenergy=found.energy, ignore_imag_modes=True)
        internal = float(harmonic.get_internal_energy(temperature, verbose=False))
        entropy = float(harmonic.get_entropy(temperature, verbose=False))
        return result | {
            "kind": "harmonic vibrations",
            "internal_energy_eV": internal,
            "entropy_eV_K": entropy,
            "helmholtz_energy_eV": internal - temperature * entropy,
        }
    geometry: Any = _geometry(atoms)
    gas = IdealGasThermo(
        complex_energies,
        geometry,
        potentialenergy=found.energy,
        atoms=atoms,
        symmetrynumber=symmetry,
        spin=spin,
        ignore_imag_modes=True,
    )
    enthalpy = float(gas.get_enthalpy(temperature, verbose=False))
    entropy = float(gas.get_entropy(temperature, pressure * 1e5, verbose=False))
    return result | {
        "kind": f"ideal gas, {geometry}, symmetry number {symmetry}, spin {spin:g}",
        "pressure_bar": pressure,
        "enthalpy_eV": enthalpy,
        "entropy_eV_K": entropy,
        "gibbs_energy_eV": enthalpy - temperature * entropy,
    }


def _geometry(atoms: Atoms) -> str:
    if len(atoms) == 1:
        return "monatomic"
    return "linear" if _num_rigid(atoms) == 5 else "nonlinear"


def draw_vibrations(found: Vibrations, width: float = 12.0) -> bytes:
    """Modes as sticks under a broadened spectrum: infrared where there are intensities, else the density of modes."""
    import matplotlib as mpl

    real = found.wavenumbers > 0
    places = found.wavenumbers[real]
    heights = np.ones(len(places)) if found.intensities is None else found.intensities[real]
    with mpl.rc_context(STYLE):
        figure, (axis,) = new_figure(1, width=8.0, height=3.6)
        grid = np.linspace(0, 1.06 * max(places.max(initial=100.0), 100.0), 3000)
        lines = heights * width**2 / ((grid[:, None] - places) ** 2 + width**2)
        axis.plot(grid, lines.sum(axis=1), color=BLUE, linewidth=1.4)
        axis.vlines(places, 0, heights, color=ORANGE, linewidth=1.2)
        if len(found.imaginary):
            axis.vlines(found.wavenumbers[found.imaginary], 0, heights.max(initial=1.0), color="#c8372d", linewidth=1.6,
                        label="imaginary, drawn below zero")  # fmt: skip
            axis.legend(fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("wavenumber [1/cm]")
        axis.set_ylabel("modes" if found.intensities is None else "intensity [km/mol]")
        axis.set_title("Normal modes" if found.intensities is None else "Infrared spectrum, lines of 12 1/cm")
        return png(figure)


# ------------------------------------------------------------------------------------------------------- phonons


@dataclass
class Phonons:
    """Phonons of a crystal.

    Args:
        distances: Along the path (K,), in 1/Å.
        frequencies: (K, M) in THz; negative ones are imaginary.
        ticks: Places and names of the special points.
        grid: Frequencies (G,) of the density of states, in THz.
        density: (G,) states per THz and cell.
        thermal: Temperatures in K, and free energy in kJ/mol, entropy and heat capacity in J/K/mol at each.
        supercell: How often the cell is repeated.
        largest_force: Of the crystal, in eV/Å.
    """

    distances: np.ndarray
    frequencies: np.ndarray
    ticks: list[tuple[float, str]]
    grid: np.ndarray
    density: np.ndarray
    thermal: dict[str, np.ndarray]
    supercell: tuple[int, int, int]
    largest_force: float


def phonons(
    atoms: Atoms,
    supercell: tuple[int, int, int],
    folder: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    mesh: int = 16,
    displacement: float = 0.01,
) -> Phonons:
    """Phonons by finite displacements in a supercell, with phonopy; ``phonopy.yaml`` keeps the force constants.

    Args:
        atoms: A crystal at its minimum, with its calculator.
        supercell: How often to repeat it along each lattice vector.
        folder: Where ``phonopy.yaml`` goes.
        tell: Called with the number of supercells that are done, and of all.
        mesh: Points along each reciprocal vector for the density of states.
        displacement: In Å.

    Raises:
        ConfigError: If phonopy is not installed.
    """
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError:
        raise ConfigError(
            "vib: phonons need the package phonopy, which is not installed. Run 'pip install torchmd-net[phonons]', or "
            "pass --gamma for the vibrations of the cell alone."
        ) from None
    from ase import Atoms as Structure

    largest = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
    cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array,
                        scaled_positions=atoms.get_scaled_positions(), masses=atoms.get_masses())  # fmt: skip
    crystal = Phonopy(cell, supercell_matrix=np.diag(supercell), primitive_matrix=np.eye(3))
    crystal.generate_displacements(distance=displacement)
    moved = list(crystal.supercells_with_displacements or [])
    forces = []
    for number, each in enumerate(moved):
        copy = Structure(each.symbols, cell=each.cell, scaled_positions=each.scaled_positions, pbc=True)
        copy.info = {name: value for name, value in atoms.info.items() if name == "charge" and not value}
        copy.calc = atoms.calc
        forces.append(copy.get_forces())
        tell(number + 1, len(moved))
    crystal.forces = np.array(forces)
    crystal.produce_force_constants()
    crystal.symmetrize_force_constants()
    path = atoms.cell.bandpath(npoints=0)
    segments, names = _segments(path)
    crystal.run_band_structure(segments)
    bands: Any = crystal.get_band_structure_dict()
    distances = np.concatenate(bands["distances"])
    ticks = [(float(bands["distances"][0][0]), names[0][0])]
    for number, (_, end) in enumerate(names):
        place, word = float(bands["distances"][number][-1]), end
        if number + 1 < len(names) and names[number + 1][0] != end:
            word = f"{end}|{names[number + 1][0]}"
        ticks.append((place, word))
    crystal.run_mesh([mesh, mesh, mesh])
    crystal.run_total_dos()
    density: Any = crystal.get_total_dos_dict()
    crystal.run_thermal_properties(t_min=0, t_max=1000, t_step=10)
    thermal: Any = crystal.get_thermal_properties_dict()
    crystal.save(folder / "phonopy.yaml", settings={"force_constants": True})
    return Phonons(
        distances,
        np.concatenate(bands["frequencies"]),
        ticks,
        np.asarray(density["frequency_points"]),
        np.asarray(density["total_dos"]),
        {name: np.asarray(thermal[name]) for name in ("temperatures", "free_energy", "entropy", "heat_capacity")},
        supercell,
        largest,
    )


def _segments(path: Any, points: int = 41) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Pieces of a path between special points, and their names."""
    from ase.dft.kpoints import parse_path_string

    pieces, names = [], []
    for part in parse_path_string(path.path):
        for first, last in itertools.pairwise(part):
            ends = path.special_points[first], path.special_points[last]
            pieces.append(np.linspace(*ends, points))
            names.append((first, last))
    return pieces, [tuple(name.replace("G", "Γ") for name in pair) for pair in names]  # type: ignore[misc]


def draw_phonons(found: Phonons) -> bytes:
    """Bands beside the density of states, as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, (bands, density) = new_figure(2, width=5.2, height=4.2)
        begin = 0
        jumps = [*np.flatnonzero(np.diff(found.distances) < 0), len(found.distances) - 1]
        for end in jumps:
            piece = slice(begin, end + 1)
            bands.plot(found.distances[piece], found.frequencies[piece], color=BLUE, linewidth=1.1)
            begin = end + 1
        for place, _ in found.ticks:
            bands.axvline(place, color=GREY, linewidth=0.8)
        bands.set_xticks([place for place, _ in found.ticks], [name for _, name in found.ticks])
        bands.set_xlim(found.distances.min(), found.distances.max())
        bands.axhline(0, color="black", linewidth=0.8)
        bands.grid(axis="x", visible=False)
        bands.set_ylabel("frequency [THz]")
        bands.set_title("Phonon bands; below zero: imaginary")
        density.fill_betweenx(found.grid, 0, found.density, color="#cfe0f1", linewidth=0)
        density.plot(found.density, found.grid, color=BLUE, linewidth=1.1)
        density.set_ylim(bands.get_ylim())
        density.set_xlim(left=0)
        density.set_xlabel("states per THz and cell")
        density.set_ylabel("frequency [THz]")
        density.set_title("Density of states")
        return png(figure)
