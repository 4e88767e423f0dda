"""Freeze the numbers that tests/gates compares with: ``python tools/freeze_gates.py``.

Only a change that is meant to move numbers needs it. With ``--check`` nothing is written, and deviations from the
frozen numbers are printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gates"))
import gates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--check", action="store_true", help="print deviations and write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    frozen = dict(np.load(gates.FROZEN)) if check else {}
    for name in gates.MODELS:
        for mode in gates.MODES:
            found = gates.all_numbers(name, mode, torch.float64)
            if check:
                told = gates.deviations(found, frozen)
            else:
                frozen.update(found)
                spreads = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    spreads.append(gates.deviations(gates.all_numbers(name, mode, torch.float32), found))
                torch.set_num_threads(1)
                told = {quantity: max(spread[quantity] for spread in spreads) for quantity in gates.QUANTITIES}
                frozen[f"spread/{name}/{mode}"] = np.asarray([max(told[q], 1e-7) for q in gates.QUANTITIES])
            print(f"{name:32} {mode:6}", *(f"{quantity} {value:.1e}" for quantity, value in told.items()))
    if not check:
        np.savez_compressed(gates.FROZEN, **frozen)
        print(f"{gates.FROZEN}: {len(frozen)} arrays, {gates.FROZEN.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
