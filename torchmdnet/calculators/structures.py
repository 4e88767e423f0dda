"""Structures to try a potential on, for the elements it knows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import chemical_symbols, reference_states
from torch import nn

from torchmdnet.calculators.loading import members_of
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import expanded

__all__ = ["default_structures", "known_elements", "read_structure", "water_box"]

#: Edge of a cube that holds 64 water molecules at the density of the liquid, in Å.
WATER_BOX = 12.42


def known_elements(model: nn.Module) -> set[int]:
    """Atomic numbers that all members of a model know: as its file states, or else as far as the embedding goes."""
    stated, fitting = [], []
    for member in members_of(model):
        stated.append(set(getattr(member, "provenance", {}).get("elements") or ()))
        network = getattr(member, "representation_model", None)
        while network is not None and not hasattr(network, "max_z") and hasattr(network, "model"):
            network = network.model
        fitting.append(set(range(1, int(getattr(network, "max_z", 100)))))
    fits = set.intersection(*fitting)
    if stated and all(stated):
        return set.intersection(*stated) & fits
    return fits


def default_structures(elements: Collection[int], *, is_periodic: bool = True) -> dict[str, Atoms]:
    """Structures by name: a molecule, and where hydrogen and oxygen are known a box of water; or else a crystal.

    Args:
        elements: Atomic numbers that may occur.
        is_periodic: Whether there may be boxes.

    Raises:
        ConfigError: If none of the built-in structures has only these elements.
    """
    found = {}
    names = ["CH3CH2OH", "C6H6", *sorted(g2.names, key=lambda name: (-len(molecule(name)), name))]
    fitting = [name for name in names if set(molecule(name).numbers) <= set(elements)]
    if fitting:
        found[_WORDS.get(fitting[0], fitting[0])] = molecule(fitting[0])
    if is_periodic and {1, 8} <= set(elements):
        found["water box"] = water_box()
    if is_periodic and not found:
        known = [
            z for z in sorted(elements) if (reference_states[z] or {}).get("symmetry") in ("fcc", "bcc", "diamond")
        ]
        if known:
            symbol = chemical_symbols[known[0]]
            found[f"crystal of {symbol}"] = bulk(symbol, cubic=True).repeat(2)
    if not found:
        names = ", ".join(chemical_symbols[z] for z in sorted(elements))
        raise ConfigError(
            f"structure: no built-in structure is made of {names or 'nothing'} alone. "
            "Name a file with a structure that the model knows."
        )
    return found


_WORDS = {"CH3CH2OH": "ethanol", "C6H6": "benzene"}


def water_box(sites: int = 4) -> Atoms:
    """A periodic cube of ``sites³`` water molecules on a grid at the density of the liquid, each turned at random."""
    spacing = WATER_BOX / 4
    rng = np.random.default_rng(0)
    box = Atoms(cell=3 * [sites * spacing], pbc=True)
    for place in np.ndindex(sites, sites, sites):
        water = molecule("H2O")
        axis = rng.normal(size=3)
        water.rotate(360 * rng.random(), axis, center="com")
        water.positions += spacing * np.array(place) - water.get_center_of_mass()
        box += water
    return box


def read_structure(path: str | Path, index: int = -1) -> Atoms:
    """One frame of a file that ASE reads.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If ASE cannot read it, or it has no such frame.
    """
    from torchmdnet.datasets.structure_files import ALL, read_structures

    path = expanded(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}. Name a file with a structure, .xyz, .cif, .pdb or the like.")
    fault, found = None, None
    try:
        found = next(read_structures(path, index), None)
    except DataError as error:
        fault = error  # some of ASE's readers fail for a frame that is not there
    if found is None:
        count = sum(1 for _ in read_structures(path, ALL))
        if fault is not None and -count <= index < count:
            raise fault
        if not count:
            raise DataError(f"{path} holds no structures.")
        raise DataError(f"--index {index}: {path} holds {count} structures. Choose from 0 to {count - 1}.") from None
    atoms = found[1]
    if not len(atoms):
        raise DataError(f"{path} holds no atoms.")
    return atoms
