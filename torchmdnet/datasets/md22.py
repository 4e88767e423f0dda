"""MD22: molecular dynamics of biomolecules and supramolecules of 42 to 370 atoms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torchmdnet.datasets.md17 import Trajectory

__all__ = ["MD22"]


class MD22(Trajectory):
    """MD22: 5,000 to 85,000 frames of one large molecule, with energies and forces.

    Samples: ``z``, ``pos`` in Å, ``y`` (1, 1) in kcal/mol in double precision, ``neg_dy`` in kcal/mol/Å.

    Chmiela et al., Sci. Adv. 9, eadf0873 (2023), https://doi.org/10.1126/sciadv.adf0873.

    Args:
        root: Folder for the files.
        molecules: One of :attr:`file_names`.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        mirror: Where to get the file instead of from its publisher.

    Raises:
        ConfigError: If the molecule is unknown.
    """

    file_names: ClassVar[Mapping[str, str]] = {
        "AT-AT-CG-CG": "md22_AT-AT-CG-CG.npz",
        "AT-AT": "md22_AT-AT.npz",
        "Ac-Ala3-NHMe": "md22_Ac-Ala3-NHMe.npz",
        "DHA": "md22_DHA.npz",
        "buckyball-catcher": "md22_buckyball-catcher.npz",
        "dw-nanotube": "md22_dw_nanotube.npz",
        "stachyose": "md22_stachyose.npz",
    }

    level_of_theory = "PBE+MBD"
    citation = "Chmiela et al., Sci. Adv. 9, eadf0873 (2023), doi:10.1126/sciadv.adf0873"
