"""Predictions of a model for many structures, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchmdnet.calculators.loading import load, members_of, stated_units, trained_with, units_or_default
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.calculators.units import Units
from torchmdnet.errors import CheckpointError, ConfigError, DataError
from torchmdnet.evaluation.data import References
from torchmdnet.graph import Inputs

__all__ = ["Model", "Predictions", "open_model", "predict_all"]

#: Atoms and structures of a batch, at most.
MOST_ATOMS, MOST_SYSTEMS = 1024, 128


@dataclass
class Model:
    """A model to compare with references.

    Args:
        name: What it is called: its file.
        network: The potential, or an ensemble of them.
        units: Of its energies and lengths.
        has_totals: Whether its energies are comparable between compositions.
    """

    name: str
    network: torch.nn.Module
    units: Units
    has_totals: bool = True

    @property
    def is_ensemble(self) -> bool:
        """Whether there is a spread over several members."""
        return len(members_of(self.network)) > 1

    @property
    def properties(self) -> dict[str, Any]:
        """What is predicted beside energy and forces: name -> its head."""
        heads = [dict(getattr(member, "property_heads", {})) for member in members_of(self.network)]
        return {name: heads[0][name] for name in heads[0] if all(name in others for others in heads)}


def open_model(path: str, *, device: str, dtype: str, units: str | None, name: str | None = None) -> Model:
    """Load a model so that its energies are total ones, as far as its file can give them.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    precision = {"float32": torch.float32, "float64": torch.float64}[dtype]
    has_totals = True
    try:
        network = load(path, device=device, dtype=precision, derivative=False, remove_ref_energy=False)
    except (ConfigError, CheckpointError) as error:
        if "remove_ref_energy" not in str(error):
            raise
        has_totals = False
        network = load(path, device=device, dtype=precision, derivative=False, remove_ref_energy=True)
    return Model(name or path, network, units_or_default(stated_units(network, units), path), has_totals)


@dataclass
class Predictions:
    """What a model says of S structures with N atoms, in eV and Å; means over the members of an ensemble."""

    energy: np.ndarray  # (S,)
    forces: np.ndarray  # (N, 3)
    stress: np.ndarray | None = None  # (S, 3, 3), NaN for what has no volume
    properties: dict[str, np.ndarray] = field(default_factory=dict)
    energy_std: np.ndarray | None = None  # (S,)
    forces_std: np.ndarray | None = None  # (N, 3)


def predict_all(
    model: Model,
    references: References,
    *,
    with_stress: bool,
    tell: Callable[[int], None] = lambda done: None,
    most_atoms: int = MOST_ATOMS,
) -> Predictions:
    """Evaluate a model for all structures.

    Args:
        model: The model.
        references: The structures.
        with_stress: Whether to differentiate in the strain.
        tell: Called with the number of structures done.
        most_atoms: Atoms of a batch, at most; a larger structure is alone.

    Raises:
        DataError: If a structure has an element that the model has no embedding for.
    """
    pieces: list[list[Answer]] = []
    volumes: list[np.ndarray] = []
    network = model.network
    parameter = next(network.parameters())
    options = {"with_virial": with_stress, "with_properties": bool(model.properties)}
    for rows in _batches(references, most_atoms):
        inputs = _inputs(references, rows, model, parameter)
        box = inputs.box
        if with_stress:
            cells = np.zeros((len(rows), 3, 3)) if box is None else box.double().cpu().numpy()
            volumes.append(np.abs(np.linalg.det(cells)))
        answers = predict_members(network, inputs, **options)
        pieces.append([_on_cpu(answer) for answer in answers])
        tell(int(rows[-1]) + 1)
    return _joined(pieces, volumes, model, with_stress)


def _batches(references: References, most_atoms: int) -> Iterator[np.ndarray]:
    first, atoms = 0, 0
    for number, count in enumerate(references.counts):
        if number > first and (atoms + count > most_atoms or number - first >= MOST_SYSTEMS):
            yield np.arange(first, number)
            first, atoms = number, 0
        atoms += int(count)
    if first < len(references):
        yield np.arange(first, len(references))


def _inputs(references: References, rows: np.ndarray, model: Model, like: torch.Tensor) -> Inputs:
    tensors = references.frames.gather(references.rows[rows])
    length = references.scale[1] / model.units.in_angstrom
    network = model.network

    def place(values: torch.Tensor) -> torch.Tensor:
        return values.to(device=like.device, dtype=like.dtype)

    box = tensors.get("box")
    if box is not None:
        box = box.double().reshape(len(rows), 3, 3) * length
        box = None if not bool(box.any()) else place(box)
    states: dict[str, torch.Tensor | None] = {}
    for option, key in (("charge", "q"), ("spin", "s")):
        reads = trained_with(network, option)
        value = tensors.get(key)
        if reads and value is None and option == "spin":
            raise DataError(f"{references.name}: the model was trained with spin, and the data have none.")
        if reads:
            states[key] = place(torch.zeros(len(rows)) if value is None else value.reshape(len(rows)))
        else:
            states[key] = None
    return Inputs(
        z=tensors["z"].to(like.device),
        pos=place(tensors["pos"].double() * length),
        batch=tensors["batch"].to(like.device),
        box=box,
        q=states["q"],
        s=states["s"],
        num_systems=len(rows),
    )


def _on_cpu(answer: Answer) -> Answer:
    return Answer(
        answer.energy.double().cpu(),
        answer.forces.double().cpu(),
        None if answer.virial is None else answer.virial.double().cpu(),
        None,
        {name: value.double().cpu() for name, value in answer.properties.items()},
    )


def _joined(pieces: list[list[Answer]], volumes: list[np.ndarray], model: Model, with_stress: bool) -> Predictions:
    energy, length = model.units.in_ev, model.units.in_angstrom

    def of(take: Callable[[Answer], torch.Tensor]) -> np.ndarray:  # (members, ...)
        return np.stack([np.concatenate([take(piece[m]).numpy() for piece in pieces]) for m in range(len(pieces[0]))])

    energies = energy * of(lambda answer: answer.energy[:, 0])
    forces = energy / length * of(lambda answer: answer.forces)
    found = Predictions(energies.mean(axis=0), forces.mean(axis=0))
    if with_stress:
        volume = np.concatenate(volumes)[:, None, None]
        virial = of(lambda answer: answer.virial if answer.virial is not None else torch.zeros(0)).mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.stress = np.where(volume > 0, energy / length**3 * virial / volume, np.nan)
    for name in model.properties:
        scale = length if name == "dipole" else 1.0
        found.properties[name] = scale * of(lambda answer, name=name: answer.properties[name]).mean(axis=0)
    if model.is_ensemble:
        found.energy_std = energies.std(axis=0, ddof=1)
        found.forces_std = forces.std(axis=0, ddof=1)
    return found
