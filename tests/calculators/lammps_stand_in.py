"""What LAMMPS hands to a model, on one of several domains of a periodic box; as a script, one rank over gloo."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from torch import Tensor

#: How far beyond the cutoff the list of neighbours reaches.
SKIN = 0.7


class Data:
    """The data object of ``mliap unified`` for the host.

    Own atoms are those whose fractional coordinates lie in a part of the box; ghosts are copies of other atoms, and
    periodic images of own ones, within the cutoff and the skin.

    Args:
        atoms: The periodic system.
        element_types: Of the model.
        cutoff: In Å.
        owner: Domain of each atom.
        rank: This domain.
        total: Adds up arrays of all domains.
    """

    def __init__(
        self,
        atoms: Atoms,
        element_types: list[str],
        cutoff: float,
        owner: np.ndarray,
        rank: int,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        i, j, D, S = neighbor_list("ijDS", atoms, cutoff + SKIN)
        own = np.flatnonzero(owner == rank)
        ours = owner[i] == rank
        i, j, D, S = i[ours], j[ours], D[ours], S[ours]
        place = {(int(atom), 0, 0, 0): number for number, atom in enumerate(own)}
        for key in zip(j.tolist(), *S.T.tolist(), strict=True):
            place.setdefault(key, len(place))
        self.atom = torch.tensor([key[0] for key in place], dtype=torch.long)  # of each row, in the whole system
        self.nlocal, self.ntotal, self.num_atoms = len(own), len(place), len(atoms)
        self.pair_i = np.array([place[int(a), 0, 0, 0] for a in i], dtype=np.int32)
        self.pair_j = np.array([place[key] for key in zip(j.tolist(), *S.T.tolist(), strict=True)], dtype=np.int32)
        self.rij = D.astype(np.float64).reshape(-1, 3)
        known = {symbol: number for number, symbol in enumerate(element_types)}
        symbols = atoms.get_chemical_symbols()
        self.elems = np.array([known[symbols[atom]] for atom in self.atom.tolist()], dtype=np.int32)
        self.eatoms, self.energy, self.forces = np.zeros(len(own)), float("nan"), np.zeros((len(place), 3))
        self.virial = np.zeros((3, 3))
        self.total, self.num_exchanges = total, 0

    def forward_exchange(self, x: Tensor, out: Tensor, columns: int) -> None:
        assert x.shape == out.shape == (self.ntotal, columns)
        assert columns <= 3, "buffers of the host hold 3 numbers for each atom"
        self.num_exchanges += 1
        n = self.nlocal
        every = x.new_zeros(self.num_atoms, columns)
        every[self.atom[:n]] = x[:n]
        out[:n], out[n:] = x[:n], self.total(every)[self.atom[n:]]

    def reverse_exchange(self, x: Tensor, out: Tensor, columns: int) -> None:
        assert x.shape == out.shape == (self.ntotal, columns)
        assert columns <= 3, "buffers of the host hold 3 numbers for each atom"
        n = self.nlocal
        every = x.new_zeros(self.num_atoms, columns).index_add(0, self.atom[n:], x[n:])
        out[:n] = x[:n] + self.total(every)[self.atom[:n]]
        out[n:] = torch.nan

    def update_pair_forces(self, fij: np.ndarray) -> None:
        assert fij.dtype == np.float64
        np.add.at(self.forces, self.pair_i, fij)
        np.add.at(self.forces, self.pair_j, -fij)
        self.virial += self.rij.T @ fij

    def results(self) -> dict[str, Tensor]:
        """Of the whole system, the same on all domains; LAMMPS returns forces of ghosts to their owners."""
        every = torch.zeros(self.num_atoms, 3, dtype=torch.float64)
        energies = torch.zeros(self.num_atoms, 1, dtype=torch.float64)
        energies[self.atom[: self.nlocal], 0] = torch.from_numpy(self.eatoms)
        return {
            "energy": self.total(torch.tensor([[self.energy]], dtype=torch.float64))[0, 0],
            "atomic": self.total(energies)[:, 0],
            "forces": self.total(every.index_add(0, self.atom, torch.from_numpy(self.forces))),
            "virial": self.total(torch.from_numpy(self.virial)),
        }


def owners(atoms: Atoms, num_domains: int) -> np.ndarray:
    """Domain of each atom: slabs along the first axis, or with four, columns along the first two."""
    place = atoms.get_scaled_positions() % 1.0
    if num_domains == 4:
        return 2 * (place[:, 0] >= 0.5).astype(int) + (place[:, 1] >= 0.5)
    return np.minimum((place[:, 0] * num_domains).astype(int), num_domains - 1)


class Turns:
    """Threads of which one runs at a time, until it waits for the others: nothing here needs two at once."""

    def __init__(self, num: int) -> None:
        self.barrier, self.lock, self.given = threading.Barrier(num, timeout=60), threading.Lock(), {}

    def total(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            self.given[rank] = x.detach().clone()
            self.wait()
            found = sum(self.given[other] for other in sorted(self.given))
            self.wait()
            return found.clone()

        return add

    def wait(self) -> None:
        self.lock.release()
        try:
            self.barrier.wait()
        finally:
            self.lock.acquire()


def in_threads(num_domains: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """What ``work(rank, total)`` returns on each domain."""
    turns, found, faults = Turns(num_domains), {}, []

    def run(rank: int) -> None:
        with turns.lock:
            try:
                found[rank] = work(rank, turns.total(rank))
            except Exception as fault:
                faults.append(fault)
                turns.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_domains)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return [found[rank] for rank in range(num_domains)]


def main(model: str, system: str, folder: str, rank: int, ranks: int) -> None:
    """One rank over gloo: computes the system and writes the results."""
    import ase.io
    import torch.distributed as dist

    from torchmdnet.calculators import lammps

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)

    def total(x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    lammps._sum_over_ranks = total
    with open(model, "rb") as file:
        loaded = pickle.load(file)
    atoms = ase.io.read(system)
    data = Data(atoms, loaded.element_types, 2 * loaded.rcutfac, owners(atoms, ranks), rank, total)
    loaded.compute_forces(data)
    torch.save(data.results(), f"{folder}/results{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
