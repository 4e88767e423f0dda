"""Make a small reference set like the ones the package ships, from nothing, or pack one that exists.

    python tools/make_tinyqm.py molecules gfn2.extxyz --frames 54           # GFN2-xTB dynamics of small molecules
    python tools/make_tinyqm.py molecules gfn2_test.extxyz --frames 12 --seed 90000 --split test
    python tools/make_tinyqm.py cells gfn1.extxyz --frames 80               # strained cells with stress, GFN1-xTB
    python tools/make_tinyqm.py atoms gfn2_atoms.extxyz                     # isolated atoms: reference energies
    python tools/make_tinyqm.py dft gfn2.extxyz wb97x.extxyz --frames 40    # the same geometries, wB97X/6-31G(d)
    python tools/make_tinyqm.py pack my_set --level GFN2-xTB gfn2.extxyz gfn2_test.extxyz --atoms gfn2_atoms.extxyz

The result of ``pack`` is read by ``TinyQM(root="my_set")``. Making needs the ``labels`` extra (tblite, rdkit); ``dft``
needs PySCF. All numbers are eV, Å, e, rounded to six places; nothing depends on the time of day or the machine but the
last digits of the methods themselves.

The recipe, as used for the shipped sets: every molecule is embedded by RDKit (ions and clusters too; fragments of a
cluster are placed at random without contact), relaxed, and followed by GFN2-xTB Langevin dynamics (friction 0.02/fs; 1
fs, or 0.5 fs above 600 K) from two starting geometries at three temperatures. A snapshot is kept every 20 fs after 100
steps and labelled with a tight threshold (accuracy 0.05); one above 30 eV/Å is left out. One frame in nine is for
validation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small systems: more threads make it slower

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchmdnet.datasets.tinyqm import COLUMNS, SPLITS, encode

MOLECULES = {
    "hydrogen": "[H][H]", "water": "O", "ammonia": "N", "methane": "C", "carbon_dioxide": "O=C=O",
    "hydrogen_cyanide": "C#N", "formaldehyde": "C=O", "methanol": "CO", "methylamine": "CN", "acetylene": "C#C",
    "ethylene": "C=C", "ethane": "CC", "formic_acid": "OC=O", "formamide": "NC=O", "acetonitrile": "CC#N",
    "acetaldehyde": "CC=O", "ethanol": "CCO", "dimethyl_ether": "COC", "acetic_acid": "CC(=O)O",
    "acetamide": "CC(=O)N", "urea": "NC(=O)N", "propane": "CCC", "propene": "CC=C", "cyclopropane": "C1CC1",
    "glycine": "NCC(=O)O", "n_methylformamide": "CNC=O", "acetone": "CC(=O)C", "ethylene_glycol": "OCCO",
    "glycolaldehyde": "OCC=O", "n_butane": "CCCC", "benzene": "c1ccccc1", "pyridine": "c1ccncc1", "furan": "c1ccoc1",
    "imidazole": "c1c[nH]cn1", "phenol": "Oc1ccccc1", "ammonium": "[NH4+]", "hydronium": "[OH3+]",
    "formate": "[O-]C=O", "methylammonium": "C[NH3+]", "hydroxide_water": "[OH-].O", "water_dimer": "O.O",
    "water_trimer": "O.O.O", "water_hexamer": "O.O.O.O.O.O", "methane_dimer": "C.C", "ammonia_water": "N.O",
    "methanol_water": "CO.O", "formamide_dimer": "NC=O.NC=O", "formic_acid_dimer": "OC=O.OC=O",
    "benzene_water": "c1ccccc1.O",
}  # fmt: skip
CELLS = ("NaCl", "diamond", "silicon", "water8")
UNPAIRED = {"H": 1, "C": 2, "N": 3, "O": 2}  # of the free atoms
LABELS = {
    "GFN2-xTB": ("gfn2",),
    "wB97X/6-31G(d)": ("wb97x", "dft"),
    "GFN1-xTB": ("gfn1", "periodic", "GFN1-xTB periodic"),
}


# ----------------------------------------------------------------------------------------------------- molecules


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix, uniform over all rotations."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def embed(smiles: str, seed: int) -> Atoms:
    """Starting geometry of a molecule, or of a cluster of the molecules between dots."""
    if "." in smiles:
        return embed_cluster([embed(part, seed + i) for i, part in enumerate(smiles.split("."))], seed)
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=seed) and AllChem.EmbedMolecule(
        molecule, randomSeed=seed, useRandomCoords=True
    ):
        raise RuntimeError(f"{smiles}: no geometry was found.")
    return Atoms([a.GetSymbol() for a in molecule.GetAtoms()], molecule.GetConformer().GetPositions())


def embed_cluster(parts: Sequence[Atoms], seed: int) -> Atoms:
    """Put molecules side by side at random, no two closer than 1.8 Å."""
    rng = np.random.default_rng(seed)
    farthest = 3.2 + 1.1 * len(parts) ** 0.5
    for _ in range(1000):
        cluster = Atoms()
        for part in parts:
            guest = part.copy()
            guest.positions = (guest.positions - guest.get_center_of_mass()) @ random_rotation(rng).T
            if len(cluster):
                direction = rng.normal(size=3)
                guest.positions += direction / np.linalg.norm(direction) * rng.uniform(2.5, farthest)
                gaps = np.linalg.norm(cluster.positions[:, None] - guest.positions, axis=-1)
                if gaps.min() < 1.8:
                    break
            cluster += guest
        else:
            return cluster
    raise RuntimeError("the molecules of a cluster could not be placed without contact.")


def charge_of(smiles: str) -> int:
    """Total charge that a SMILES text says."""
    from rdkit import Chem

    return Chem.GetFormalCharge(Chem.MolFromSmiles(smiles))


def calculator(method: str, charge: int = 0, unpaired: int = 0, accuracy: float = 1.0) -> Any:
    """A tight-binding calculator."""
    from tblite.ase import TBLite

    return TBLite(
        method=method, charge=charge, multiplicity=unpaired + 1, accuracy=accuracy, max_iterations=500, verbosity=0
    )


def label(atoms: Atoms, method: str, charge: int, unpaired: int = 0, accuracy: float = 0.05, **info: Any) -> Atoms:
    """A copy of a structure with its energy, forces and what else the method gives, rounded to six places."""
    frame = Atoms(atoms.numbers, np.round(atoms.positions, 6), cell=atoms.cell, pbc=atoms.pbc)
    frame.calc = calculator(method, charge, unpaired, accuracy)
    results: dict[str, Any] = {
        "energy": round(frame.get_potential_energy(), 6),
        "forces": np.round(frame.get_forces(), 6),
    }
    if frame.pbc.all():
        results["stress"] = frame.get_stress()
    else:
        results["dipole"] = np.round(frame.calc.results["dipole"], 5)
        frame.arrays["partial_charges"] = np.round(frame.calc.results["charges"], 5)
    frame.calc = SinglePointCalculator(frame, **results)
    frame.info.update(info, total_charge=charge, spin_multiplicity=unpaired + 1)
    return frame


def sample_molecule(
    name: str,
    smiles: str,
    frames: int,
    seed: int,
    stride: int = 20,
    starts: int = 2,
    temperatures: Sequence[float] = (),
) -> Iterator[Atoms]:
    """Labelled snapshots of GFN2-xTB Langevin dynamics, in the order they were visited."""
    from ase.md.langevin import Langevin
    from ase.optimize import LBFGS

    charge = charge_of(smiles)
    temperatures = temperatures or ((150, 300, 450) if "." in smiles else (300, 600, 1000))
    each = -(-frames // (len(temperatures) * starts))
    for start in range(starts):
        relaxed = embed(smiles, seed + 17 * start)
        relaxed.calc = calculator("GFN2-xTB", charge)
        LBFGS(relaxed, logfile=None).run(fmax=0.05, steps=80)
        for kelvin in temperatures:
            rng = np.random.default_rng(seed + 1000 * start + int(kelvin))
            atoms = relaxed.copy()
            atoms.calc = calculator("GFN2-xTB", charge)
            momenta = rng.normal(size=(len(atoms), 3)) * np.sqrt(atoms.get_masses() * units.kB * kelvin)[:, None]
            atoms.set_momenta(momenta - momenta.mean(axis=0))
            step = (0.5 if kelvin > 600 else 1.0) * units.fs
            motion = Langevin(atoms, step, temperature_K=kelvin, friction=0.02 / units.fs, fixcm=False, rng=rng)
            motion.run(100)
            for _ in range(each):
                motion.run(stride)
                snapshot = atoms.copy()
                snapshot.positions -= snapshot.positions.mean(axis=0)
                frame = label(snapshot, "GFN2-xTB", charge, name=name, smiles=smiles, temperature_K=float(kelvin))
                if np.abs(frame.get_forces()).max() < 30:
                    yield frame


# --------------------------------------------------------------------------------------------------------- cells


def water_box(seed: int, count: int = 8, edge: float = 6.3) -> Atoms:
    """Water molecules in a periodic cube, without contact, relaxed a little with GFN1-xTB."""
    from ase.build import molecule
    from ase.optimize import LBFGS

    rng = np.random.default_rng(seed)
    water = molecule("H2O")
    water.positions -= water.positions[0]
    for _ in range(500):
        box = Atoms(cell=[edge] * 3, pbc=True)
        for _ in range(400 * count):
            guest = water.copy()
            guest.positions = guest.positions @ random_rotation(rng).T + rng.uniform(0, edge, 3)
            trial = box + guest
            gaps = trial.get_all_distances(mic=True)[-3:, :-3]
            if gaps.size == 0 or (gaps.min() > 1.7 and gaps[0, ::3].min() > 2.5):
                box = trial
            if len(box) == 3 * count:
                box.calc = calculator("GFN1-xTB")
                LBFGS(box, logfile=None).run(fmax=0.3, steps=60)
                box.calc = None
                return box
    raise RuntimeError("the water molecules do not fit into the box.")


def crystal(name: str) -> Atoms:
    """A crystal at the edge length where its GFN1-xTB energy (one k-point) is lowest."""
    from ase.build import bulk

    start = {
        "NaCl": lambda: bulk("NaCl", "rocksalt", a=5.64, cubic=True),
        "diamond": lambda: bulk("C", "diamond", a=3.567, cubic=True) * (2, 1, 1),
        "silicon": lambda: bulk("Si", "diamond", a=5.43, cubic=True) * (2, 1, 1),
    }[name]()
    scales, energies = np.linspace(0.92, 1.12, 11), []
    for scale in scales:
        trial = start.copy()
        trial.set_cell(start.cell * scale, scale_atoms=True)
        energies.append(label(trial, "GFN1-xTB", 0, accuracy=0.1).get_potential_energy())
    middle = int(np.clip(np.argmin(energies), 1, len(scales) - 2))
    near = slice(middle - 1, middle + 2)
    curve = np.polyfit(scales[near], energies[near], 2)
    start.set_cell(start.cell * (-curve[1] / 2 / curve[0]), scale_atoms=True)
    return start


def sample_cell(name: str, frames: int, seed: int) -> Iterator[Atoms]:
    """Cells under random strain of a few per cent, atoms displaced by up to a tenth of an Ångström, with stress."""
    rng = np.random.default_rng(seed)
    bases = [water_box(seed + i) for i in range(4)] if name == "water8" else [crystal(name)]
    steps = (0.02, 0.04, 0.06) if name == "water8" else (0.02, 0.05, 0.10)
    for number in range(frames):
        strain = rng.uniform(-0.04, 0.04) * np.eye(3) + rng.normal(0, 0.015, (3, 3))
        atoms = bases[number % len(bases)].copy()
        atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0, rng.choice(steps), atoms.positions.shape)
        frame = label(atoms, "GFN1-xTB", 0, accuracy=0.1, name=name)
        if np.abs(frame.get_forces()).max() < 25:
            yield frame


# ----------------------------------------------------------------------------------------------- density functional


def density_functional(atoms: Atoms, charge: int, unpaired: int = 0, guess: Any = None) -> tuple[dict[str, Any], Any]:
    """Energy, forces and dipole with wB97X/6-31G(d): Cartesian d functions, density fitting, grid level 3, 1e-9."""
    from pyscf import dft, gto

    mol = gto.M(
        atom=list(zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)),
        basis="6-31g*", cart=True, charge=charge, spin=unpaired, verbose=0,
    )  # fmt: skip
    field = (dft.UKS(mol) if unpaired else dft.RKS(mol)).density_fit()
    field.xc, field.grids.level, field.conv_tol, field.max_cycle = "wb97x", 3, 1e-9, 100
    energy = field.kernel(dm0=guess)
    if not field.converged:
        energy = field.kernel()
    if not field.converged:
        raise RuntimeError("the density does not converge.")
    forces = np.zeros((1, 3)) if len(atoms) == 1 else -field.nuc_grad_method().kernel() * units.Hartree / units.Bohr
    results = {
        "energy": round(energy * units.Hartree, 6),
        "forces": np.round(forces - forces.mean(axis=0), 6),  # the grid leaves a few meV/Å of net force
        "dipole": np.round(field.dip_moment(unit="Debye", verbose=0) * units.Debye, 5),
    }
    return results, field.make_rdm1()


def relabel(frames: Sequence[Atoms], count: int, seed: int) -> Iterator[Atoms]:
    """Up to ``count`` frames of each species with density-functional labels; the old ones stay as gfn2_*."""
    rng = np.random.default_rng(seed)
    for name in dict.fromkeys(atoms.info["name"] for atoms in frames):
        mine = [atoms for atoms in frames if atoms.info["name"] == name]
        guess = None
        for i in rng.permutation(len(mine))[:count]:
            old = mine[i]
            try:
                results, guess = density_functional(old, int(old.info["total_charge"]), guess=guess)
            except RuntimeError as error:
                print(f"{name}: a frame is left out, {error}", file=sys.stderr)
                continue
            frame = Atoms(old.numbers, old.positions)
            frame.info.update(old.info, gfn2_energy=old.get_potential_energy())
            frame.arrays["gfn2_forces"] = old.get_forces()
            frame.calc = SinglePointCalculator(frame, **results)
            yield frame


def isolated_atom(symbol: str, method: str) -> Atoms:
    """A free atom in its ground state."""
    unpaired = UNPAIRED[symbol]
    if method == "GFN2-xTB":
        atom = label(Atoms(symbol), method, 0, unpaired, name="isolated_atom", config_type="isolated_atom")
        del atom.arrays["partial_charges"], atom.calc.results["dipole"]
        return atom
    results, _ = density_functional(Atoms(symbol), 0, unpaired)
    atom = Atoms(symbol, info={"name": "isolated_atom", "config_type": "isolated_atom"})
    atom.info.update(total_charge=0, spin_multiplicity=unpaired + 1)
    atom.calc = SinglePointCalculator(atom, energy=results["energy"], forces=np.zeros((1, 3)))
    return atom


# ------------------------------------------------------------------------------------------------------- writing


def assign_splits(frames: Iterable[Atoms], split: str | None) -> list[Atoms]:
    """Name the part of each frame: the one given, or every ninth frame of a species for validation."""
    seen: dict[str, int] = {}
    result = []
    for atoms in frames:
        number = seen[atoms.info["name"]] = seen.get(atoms.info["name"], -1) + 1
        atoms.info["split"] = split or ("val" if number % 9 == 8 else "train")
        result.append(atoms)
    return result


def read(paths: Sequence[str | Path]) -> list[Atoms]:
    """All frames of extended XYZ files, compressed or not."""
    import gzip
    import io

    frames: list[Atoms] = []
    for path in paths:
        opener: Any = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt") as file:  # ASE seeks, which is slow in a compressed file
            frames += ase.io.read(io.StringIO(file.read()), index=":", format="extxyz")
    return frames


def pack(
    folder: str | Path,
    level: str,
    frames: Sequence[Atoms],
    atoms: Sequence[Atoms] = (),
    baseline_atoms: Sequence[Atoms] = (),
) -> Path:
    """Write frames as compressed arrays into a folder, and list them in its manifest with a checksum.

    Args:
        folder: Where ``manifest.json`` is or will be.
        level: Name of the level of theory.
        frames: Labelled structures; ``name``, ``split``, ``total_charge`` and ``spin_multiplicity`` in ``info``.
        atoms: Isolated atoms at the same level.
        baseline_atoms: Isolated atoms at the level of ``gfn2_energy``, where frames have that.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(frames)), key=lambda i: SPLITS.index(part_of(frames[i])))
    frames = [frames[i] for i in order]
    kinds = list(
        dict.fromkeys((a.info.get("name", a.get_chemical_formula()), a.info.get("smiles", "")) for a in frames)
    )
    has_baseline = "gfn2_energy" in frames[0].info
    get: dict[str, Any] = {
        "pos": lambda a: a.positions,
        "forces": lambda a: a.calc.results["forces"],
        "partial_charges": lambda a: a.arrays["partial_charges"],
        "baseline_forces": lambda a: a.arrays["gfn2_forces"],
        "energy": lambda a: a.calc.results["energy"],
        "box": lambda a: np.where(a.pbc[:, None], a.cell.array, 0.0),
        "stress": lambda a: a.get_stress(voigt=False),
        "dipole": lambda a: a.calc.results["dipole"],
        "baseline_energy": lambda a: a.info["gfn2_energy"],
    }
    present = {
        "pos": True, "forces": True, "energy": True,
        "partial_charges": "partial_charges" in frames[0].arrays,
        "baseline_forces": has_baseline, "baseline_energy": has_baseline,
        "box": any(a.pbc.any() for a in frames),
        "stress": "stress" in frames[0].calc.results, "dipole": "dipole" in frames[0].calc.results,
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {
        "counts": np.array([len(a) for a in frames], dtype=np.uint16),
        "z": np.concatenate([a.numbers for a in frames]).astype(np.uint8),
        "split": np.array([SPLITS.index(part_of(a)) for a in frames], dtype=np.uint8),
        "kind": np.array(
            [kinds.index((a.info.get("name", a.get_chemical_formula()), a.info.get("smiles", ""))) for a in frames],
            dtype=np.uint16,
        ),
        "names": np.array([name for name, _ in kinds]),
        "smiles": np.array([smiles for _, smiles in kinds]),
        "charge": np.array([a.info.get("total_charge", 0) for a in frames], dtype=np.int8),
        "unpaired": np.array([a.info.get("spin_multiplicity", 1) - 1 for a in frames], dtype=np.uint8),
        "temperature": np.array([a.info.get("temperature_K", 0) for a in frames], dtype=np.uint16),
    }
    for column in COLUMNS:
        if present[column]:
            values = np.concatenate([np.reshape(get[column](a), (-1, *COLUMNS[column][1])) for a in frames])
            if not np.isfinite(values).all():
                raise ValueError(f"{level}: {column} is not finite in every frame.")
            arrays[column] = encode(values)
    stem = LABELS[level][0] if level in LABELS else "".join(c if c.isalnum() else "_" for c in level).strip("_").lower()
    path = folder / f"{stem}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    manifest_path = folder / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {"licence": "CC0-1.0", "levels": {}}
    entry: dict[str, Any] = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "aliases": list(LABELS.get(level, ())),
        "systems": len(frames),
        "parts": {name: int((arrays["split"] == i).sum()) for i, name in enumerate(SPLITS)},
        "baseline": "GFN2-xTB" if has_baseline else None,
    }
    if atoms:
        entry["reference_energies"] = {
            "labels": {a.get_chemical_symbols()[0]: float(a.calc.results["energy"]) for a in atoms},
            "baseline": {a.get_chemical_symbols()[0]: float(a.calc.results["energy"]) for a in baseline_atoms},
        }
    manifest["levels"][level] = entry
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path


def part_of(atoms: Atoms) -> str:
    """train, val or test, by the start of the word in the header."""
    word = str(atoms.info.get("split", "train"))
    return next(part for part in SPLITS if word.startswith(part))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, kinds, frames in (("molecules", list(MOLECULES), 54), ("cells", list(CELLS), 80)):
        command = commands.add_parser(name)
        command.add_argument("output", type=Path, help="extended XYZ file to write")
        command.add_argument("--frames", type=int, default=frames, help="frames of each species (default %(default)s)")
        command.add_argument("--seed", type=int, default=100, help="seed of the first species (default %(default)s)")
        command.add_argument(
            "--only", nargs="+", choices=kinds, metavar="NAME", help=f"only these of {', '.join(kinds)}"
        )
        command.add_argument("--split", choices=SPLITS, help="part of all frames; default: one in nine is for val")
    command = commands.add_parser("atoms")
    command.add_argument("output", type=Path)
    command.add_argument("--level", choices=("GFN2-xTB", "wB97X/6-31G(d)"), default="GFN2-xTB")
    command = commands.add_parser("dft")
    command.add_argument("source", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--frames", type=int, default=40)
    command.add_argument("--seed", type=int, default=5)
    command = commands.add_parser("pack")
    command.add_argument("folder", type=Path)
    command.add_argument("frames", nargs="+", help="extended XYZ files, compressed or not")
    command.add_argument("--level", required=True)
    command.add_argument("--atoms", nargs="*", default=[], help="isolated atoms at the same level")
    command.add_argument("--baseline-atoms", nargs="*", default=[], help="isolated atoms at the level of the baseline")
    args = parser.parse_args(arguments)

    if args.command == "pack":
        path = pack(args.folder, args.level, read(args.frames), read(args.atoms), read(args.baseline_atoms))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        return
    if args.command == "atoms":
        frames = [isolated_atom(symbol, args.level) for symbol in UNPAIRED]
    elif args.command == "dft":
        frames = list(relabel(read([args.source]), args.frames, args.seed))
    else:
        frames = []
        for number, name in enumerate(MOLECULES if args.command == "molecules" else CELLS):
            if args.only and name not in args.only:
                continue
            seed = args.seed + number
            made = (
                sample_molecule(name, MOLECULES[name], args.frames, seed)
                if args.command == "molecules"
                else sample_cell(name, args.frames, seed)
            )
            frames += assign_splits(made, args.split)
            print(f"{name}: {len(frames)} frames so far", file=sys.stderr)
    ase.io.write(args.output, frames, format="extxyz")


if __name__ == "__main__":
    main()
