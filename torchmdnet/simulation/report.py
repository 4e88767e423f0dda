"""The end of a simulation: numbers for programs, and a page for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet._version import __version__
from torchmdnet.files import draft_of, write_json
from torchmdnet.page import cards, document, escape, image, table
from torchmdnet.simulation.analysis import column, drift_of, radial_distributions, rmsd, vibrational_density
from torchmdnet.simulation.dynamics import LOG, TRAJECTORY, VELOCITIES, Simulation, read_log
from torchmdnet.simulation.plots import draw_simulation
from torchmdnet.viewer import frames_of, player

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["finish"]

#: Frames that distances and deviations are taken from, at most.
MOST_FRAMES = 400

_FILES = {
    "trajectory.extxyz": "frames with momenta, energies in eV and forces in eV/Å; any program that reads extended XYZ",
    "trajectory.traj": "the same as a trajectory of ASE",
    "log.csv": "time, temperature, energies, pressure; the units are in the names of the columns",
    "velocities.f32": "velocities for the vibrational density of states, (times, atoms, 3) float32 in Å/√(u Å²/eV)",
    "state.npz": "the state to go on from: --resume",
    "final.extxyz": "the last structure",
    "summary.json": "the numbers of this page, for programs",
    "plots.png": "the plots of this page",
    "settings.json": "what was asked for",
}


def finish(simulation: Simulation, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Analyse what has been simulated, write ``summary.json``, ``plots.png`` and ``report.html``.

    Args:
        simulation: Finished, or stopped.
        name: What was simulated.
        settings: Of the command, for the page.

    Returns:
        The content of ``summary.json``.
    """
    from ase.io import write

    folder, atoms, protocol = simulation.folder, simulation.atoms, simulation.protocol
    rows = read_log(folder / LOG)
    frames = read_frames(folder / TRAJECTORY, MOST_FRAMES)
    with draft_of(folder / "final.extxyz") as draft:
        write(draft, frames[-1] if simulation.reason else atoms.copy(), format="extxyz")
    time = column(rows, "time_ps")
    drift = drift_of(time, column(rows, "conserved_energy_eV"), len(atoms)) if simulation.ensemble.conserved else None
    is_periodic = bool(atoms.pbc.all() and atoms.cell.rank == 3)
    distances = radial_distributions(frames[len(frames) // 4 :]) if is_periodic and len(atoms) > 1 else None
    deviation = None
    if len(frames) > 2 and len(atoms) > 1:
        deviation = np.array([float(frame.info["time_ps"]) for frame in frames]), rmsd(frames)
    spectrum = vibrational_density(
        read_velocities(folder / VELOCITIES, len(atoms)), atoms, protocol.timestep * protocol.velocity_interval
    )
    summary: dict[str, Any] = {
        "name": name,
        "folder": str(folder),
        "formula": atoms.get_chemical_formula(),
        "num_atoms": len(atoms),
        "ensemble": protocol.ensemble,
        "steps": simulation.step,
        "time_ps": simulation.step * protocol.timestep / 1000,
        "is_done": simulation.is_done,
        "stopped": simulation.reason,
        "seconds": round(simulation.seconds, 3),
        "ns_per_day": _speed(simulation),
        "drift_meV_per_atom_per_ps": drift.slope if drift else None,
        "noise_meV_per_atom": drift.noise if drift else None,
        **_means(rows),
        "rmsd_A": float(deviation[1][-1]) if deviation is not None else None,
    }
    plots = draw_simulation(
        rows,
        num_atoms=len(atoms),
        drift=drift,
        target=protocol.temperature if simulation.ensemble.has_thermostat else None,
        pressure=(protocol.pressure[0] * 1e-4, protocol.pressure[1] * 1e-4)
        if simulation.ensemble.has_barostat
        else None,
        distances=distances,
        deviation=deviation if not is_periodic or len(atoms) == 1 else None,
        spectrum=spectrum,
    )
    with draft_of(folder / "plots.png") as draft:
        draft.write_bytes(plots)
    write_json(folder / "summary.json", summary)
    page = _page(simulation, summary, plots, frames, settings)
    with draft_of(folder / "report.html") as draft:
        draft.write_text(page, encoding="utf-8")
    return summary


def _speed(simulation: Simulation) -> float | None:
    """ns/day over all of its time, the compilation of loops included."""
    if not simulation.seconds > 0 or not simulation.step:
        return None
    return simulation.step * simulation.protocol.timestep * 1e-6 / simulation.seconds * 86400


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the last three quarters, where there is more than the start."""
    kept = rows[len(rows) // 4 :] or rows
    means = {}
    for name in ("temperature_K", "potential_energy_eV", "pressure_GPa", "volume_A3", "density_g_cm3"):
        values = column(kept, name)
        if np.isfinite(values).any():
            means[f"mean_{name}"] = float(np.nanmean(values))
    return means


def read_frames(path: Path, most: int) -> list[Atoms]:
    """Frames of a trajectory, evenly chosen where there are more than ``most``, the last among them."""
    from ase.io import iread

    frames = list(iread(path, index=":", format="extxyz"))
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int))
    return [frames[number] for number in chosen]


def read_velocities(path: Path, num_atoms: int) -> np.ndarray:
    """Velocities (T, N, 3) of the file that a simulation writes; no times where there is none."""
    values = np.fromfile(path, dtype="<f4") if path.is_file() else np.zeros(0, np.float32)
    times = len(values) // (3 * num_atoms)
    return values[: times * 3 * num_atoms].reshape(times, num_atoms, 3)


# ------------------------------------------------------------------------------------------------------ the page


def _page(
    simulation: Simulation, summary: dict[str, Any], plots: bytes, frames: list[Atoms], settings: dict[str, Any]
) -> str:
    protocol, ensemble = simulation.protocol, simulation.ensemble
    shown = [(f"{summary['time_ps']:.4g} ps", f"{summary['steps']:,} steps of {protocol.timestep:g} fs")]
    if summary.get("mean_temperature_K") is not None:
        shown.append((f"{summary['mean_temperature_K']:.1f} K", "mean temperature, first quarter left out"))
    if summary["drift_meV_per_atom_per_ps"] is not None:
        shown.append((f"{summary['drift_meV_per_atom_per_ps']:.2g} meV/atom/ps", "drift of the conserved energy"))
    if summary.get("mean_pressure_GPa") is not None:
        shown.append((f"{summary['mean_pressure_GPa']:.3g} GPa", "mean pressure"))
    if summary["ns_per_day"] is not None:
        shown.append((f"{summary['ns_per_day']:.3g} ns/day", f"{summary['num_atoms']} atoms"))
    title = f"{summary['formula']}: {ensemble.words}"
    stopped = (
        f"<p><b>Stopped at {summary['time_ps']:.4g} ps: {escape(summary['stopped'])}.</b> "
        "The structure is in stopped.extxyz.</p>"
        if summary["stopped"]
        else ""
    )
    used = {name: value for name, value in asdict(protocol).items() if value is not None}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(summary["name"])} · torchmd-net {escape(__version__)}</p>',
        stopped,
        cards(shown),
        f"<h2>Plots</h2>{image(plots, 'Plots')}",
        "<h2>Trajectory</h2>" + player({"trajectory": frames_of(frames)}, frames[0].numbers),
        "<h2>Settings</h2>" + table({**settings, **used}.items()),
        "<h2>Files</h2>" + table((name, what) for name, what in _FILES.items() if (simulation.folder / name).exists()),
    ]
    return document(title, parts)
