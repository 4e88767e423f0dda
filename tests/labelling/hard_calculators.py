"""Calculators that fail in the ways that calculators fail; imported by the processes that label."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones


class Moody(LennardJones):
    """Lennard-Jones that treats structures by the name in their header."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        mood = atoms.info.get("mood", "")
        if mood == "raise":
            raise RuntimeError("the density\ndoes not converge")
        if mood == "crash":
            os.abort()
        if mood == "hang":
            time.sleep(60)
        super().calculate(atoms, properties, system_changes)
        if mood == "sick":
            self.results["forces"] = np.full((len(atoms), 3), np.nan)


def eat() -> None:
    """Take memory until there is none."""
    kept = []
    while True:
        kept.append(np.ones(2**21))  # 16 MB, in use
        time.sleep(0.01)


def hold_the_interpreter(seconds: int) -> None:
    """Call C code that lets no other thread of Python run."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(seconds * 10**6))


def run_a_program(seconds: int) -> None:
    """Run another program, as calculators of quantum chemistry do."""
    subprocess.run([sys.executable, "-S", "-c", f"import time; time.sleep({seconds})"], check=True)


def slow(pause: float = 0.05, **options) -> Calculator:
    """Lennard-Jones that takes its time."""

    class Slow(LennardJones):
        def calculate(self, *args, **kwargs):
            time.sleep(pause)
            super().calculate(*args, **kwargs)

    return Slow(**options)


class Charged(Calculator):
    """The energy is the charge plus a tenth of the multiplicity."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, charge: int, multiplicity: int) -> None:
        super().__init__()
        self.state = charge + multiplicity / 10

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": self.state, "forces": np.zeros((len(atoms), 3))}


def unable():
    """No calculator."""
    raise OSError("there is no licence server")
