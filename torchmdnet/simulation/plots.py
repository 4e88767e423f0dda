"""Plots of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.page import BLUE, COLOURS, GREY, ORANGE, STYLE, new_figure, png
from torchmdnet.simulation.analysis import Drift, Spectrum, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_simulation"]


def draw_simulation(
    rows: Sequence[dict[str, Any]],
    *,
    num_atoms: int,
    drift: Drift | None,
    target: tuple[float, float] | None,
    pressure: tuple[float, float] | None,
    distances: tuple[np.ndarray, dict[str, np.ndarray]] | None,
    deviation: tuple[np.ndarray, np.ndarray] | None,
    spectrum: Spectrum | None,
) -> bytes:
    """Energy, temperature, pressure and volume, pairs or deviation, vibrations: what there is, as PNG.

    Args:
        rows: The log.
        num_atoms: N.
        drift: Of the conserved energy.
        target: Temperature of the thermostat at the beginning and at the end, in K.
        pressure: Of the barostat, in GPa.
        distances: Radial distribution functions.
        deviation: Times in ps and deviations from the first frame in Å.
        spectrum: Vibrational density of states.
    """
    import matplotlib as mpl

    time = column(rows, "time_ps")
    panels: list[Any] = [lambda axis: _energy(axis, rows, time, num_atoms, drift)]
    panels.append(lambda axis: _temperature(axis, rows, time, target))
    if any(row.get("pressure_GPa") is not None for row in rows):
        panels.append(lambda axis: _pressure(axis, rows, time, pressure))
        volume = column(rows, "volume_A3")
        if np.ptp(volume) > 1e-9 * volume.max():
            panels.append(lambda axis: _volume(axis, time, volume))
    if distances is not None:
        panels.append(lambda axis: _pairs(axis, *distances))
    if deviation is not None:
        panels.append(lambda axis: _deviation(axis, *deviation))
    if spectrum is not None:
        panels.append(lambda axis: _vibrations(axis, spectrum))
    if any(row.get("largest_force_std_eV_A") is not None for row in rows):
        panels.append(lambda axis: _uncertainty(axis, rows, time))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(panels), width=4.8, height=3.5)
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return png(figure)


def _energy(axis: Axes, rows: Any, time: np.ndarray, num_atoms: int, drift: Drift | None) -> None:
    conserved = column(rows, "conserved_energy_eV")
    if np.isfinite(conserved).any():
        change = 1000 * (conserved - conserved[0]) / num_atoms
        axis.plot(time, change, color=BLUE, linewidth=1.2)
        if drift is not None:
            line = drift.slope * time
            axis.plot(time, line + np.mean(change - line), color=ORANGE, linewidth=1.2, linestyle="--",
                      label=f"drift {drift.slope:.2g} meV/atom/ps")  # fmt: skip
            axis.legend(loc="best", fontsize=8)
        axis.set_title("Change of the conserved energy")
    else:
        potential = column(rows, "potential_energy_eV")
        axis.plot(time, 1000 * (potential - potential[0]) / num_atoms, color=BLUE, linewidth=1.2)
        axis.set_title("Change of the potential energy")
    axis.set_ylabel("meV/atom")
    axis.set_xlabel("time [ps]")


def _temperature(axis: Axes, rows: Any, time: np.ndarray, target: tuple[float, float] | None) -> None:
    values = column(rows, "temperature_K")
    axis.plot(time, values, color=BLUE, linewidth=0.8, alpha=0.55)
    _running_mean(axis, time, values)
    if target is not None and len(time):
        wanted = column(rows, "target_temperature_K")
        axis.plot(time, wanted, color=GREY, linewidth=1.2, linestyle="--", label="asked for")
    axis.set_title("Temperature")
    axis.set_ylabel("K")
    axis.set_xlabel("time [ps]")
    axis.legend(loc="best", fontsize=8)


def _running_mean(axis: Axes, time: np.ndarray, values: np.ndarray) -> None:
    mean = np.cumsum(values) / np.arange(1, len(values) + 1)
    axis.plot(time, mean, color=ORANGE, linewidth=1.6, label="mean so far")


def _pressure(axis: Axes, rows: Any, time: np.ndarray, pressure: tuple[float, float] | None) -> None:
    values = column(rows, "pressure_GPa")
    axis.plot(time, values, color=BLUE, linewidth=0.8, alpha=0.55)
    _running_mean(axis, time, values)
    if pressure is not None and len(time) > 1:
        axis.plot([time[0], time[-1]], pressure, color=GREY, linewidth=1.2, linestyle="--", label="asked for")
    axis.set_title("Pressure")
    axis.set_ylabel("GPa")
    axis.set_xlabel("time [ps]")
    axis.legend(loc="best", fontsize=8)


def _volume(axis: Axes, time: np.ndarray, volume: np.ndarray) -> None:
    axis.plot(time, volume, color=BLUE, linewidth=1.2)
    axis.set_title("Volume")
    axis.set_ylabel("Å³")
    axis.set_xlabel("time [ps]")


def _pairs(axis: Axes, distance: np.ndarray, found: dict[str, np.ndarray]) -> None:
    most = sorted(found, key=lambda name: -float(found[name].max()))[:6]
    highest = 0.0
    for name, colour in zip(most, COLOURS, strict=False):
        axis.plot(distance, found[name], color=colour, linewidth=1.3, label=name)
        highest = max(highest, float(np.sort(found[name])[-6:].mean()))
    axis.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_title("Radial distribution functions")
    axis.set_xlabel("distance [Å]")
    axis.set_ylabel("g(r)")
    axis.set_ylim(0, min(1.15 * max(float(found[name].max()) for name in most), 8 * max(highest, 1.0)) or 1)
    axis.legend(loc="best", fontsize=8)


def _deviation(axis: Axes, time: np.ndarray, values: np.ndarray) -> None:
    axis.plot(time, values, color=BLUE, linewidth=1.2)
    axis.set_title("Deviation from the first frame (RMSD)")
    axis.set_ylabel("Å")
    axis.set_xlabel("time [ps]")
    axis.set_ylim(bottom=0)


def _vibrations(axis: Axes, spectrum: Spectrum) -> None:
    axis.fill_between(spectrum.wavenumbers, 1000 * spectrum.total, color="#e6e8eb", linewidth=0, label="all")
    if len(spectrum.elements) > 1:
        for (symbol, values), colour in zip(list(spectrum.elements.items())[:6], COLOURS, strict=False):
            axis.plot(spectrum.wavenumbers, 1000 * values, color=colour, linewidth=1.1, label=symbol)
        axis.legend(loc="best", fontsize=8)
    else:
        axis.plot(spectrum.wavenumbers, 1000 * spectrum.total, color=BLUE, linewidth=1.1)
    inside = np.cumsum(spectrum.total) / max(spectrum.total.sum(), 1e-300)
    last = float(spectrum.wavenumbers[np.searchsorted(inside, 0.9995).clip(max=len(inside) - 1)])
    axis.set_xlim(0, min(1.1 * last + 50, float(spectrum.wavenumbers[-1])))
    axis.set_ylim(bottom=0)
    axis.set_title("Vibrational density of states")
    axis.set_xlabel("wavenumber [1/cm]")
    axis.set_ylabel("per 1000 1/cm")


def _uncertainty(axis: Axes, rows: Any, time: np.ndarray) -> None:
    axis.plot(time, 1000 * column(rows, "largest_force_std_eV_A"), color=BLUE, linewidth=1.0)
    axis.set_title("Largest spread of a force component")
    axis.set_ylabel("meV/Å")
    axis.set_xlabel("time [ps]")
    axis.set_ylim(bottom=0)
