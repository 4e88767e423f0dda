"""The published sets keep their names and arguments, and say where they come from and in which units."""

from __future__ import annotations

import inspect

import pytest
from torch_geometric.data import Dataset

from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.memdataset import MemmappedDataset

PLAIN = "root, transform=None, pre_transform=None, pre_filter=None"
OPTIONAL = "root=None, transform=None, pre_transform=None, pre_filter=None"
CATH = (
    "source_file='mdcath_source.h5', file_basename='mdcath_dataset', numAtoms=5000, numNoHAtoms=None, "
    "numResidues=1000, temperatures=('348',), skip_frames=1, pdb_list=None, min_gyration_radius=None, "
    "max_gyration_radius=None, alpha_beta_coil=None, solid_ss=None, numFrames=None"
)
ARGUMENTS = {
    "Ace": f"{OPTIONAL}, paths=None, max_gradient=None, subsample_molecules=1",
    "AceHF": "root='parquet', paths=None, split='train', max_gradient=None",
    "ANIMD": PLAIN,
    "ANI1": PLAIN,
    "ANI1CCX": PLAIN,
    "ANI1X": f"{PLAIN}, properties=('y', 'neg_dy')",
    "ANI2X": f"{PLAIN}, properties=('y', 'neg_dy')",
    "COMP6v1": PLAIN,
    "COMP6v2": f"{PLAIN}, properties=('y', 'neg_dy')",
    "DrugBank": PLAIN,
    "GDB07to09": PLAIN,
    "GDB10to13": PLAIN,
    "GenentechTorsions": f"{OPTIONAL}, paths=None, theory='CCSD_T_CBS_MP2', energy_field='deltaE'",
    "MDCATH": f"{PLAIN}, {CATH}",
    "MD17": "root, molecules, train=None, transform=None, pre_transform=None, pre_filter=None",
    "MD22": "root, molecules, transform=None, pre_transform=None, pre_filter=None",
    "QM9": "root, transform=None, label=None",
    "QM9q": f"{OPTIONAL}, paths=None",
    "S66X8": PLAIN,
    "SPICE": f"{OPTIONAL}, version='1.1.3', subsets=None, max_gradient=None, subsample_molecules=1",
    "Tripeptides": PLAIN,
    "WaterBox": "root, transform=None, pre_transform=None",
    "MACEOFF": f"{OPTIONAL}, version='1.0', max_gradient=None",
}
OWN_DATA = {"Ace", "AceHF", "QM9q"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_keep_their_names_order_and_defaults(name):
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    established = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in established)
    assert found == ARGUMENTS[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_set_states_its_facts(name):
    kind = DATASETS[name]
    for fact in ("energy_unit", "length_unit", "level_of_theory", "citation", "licence"):
        assert hasattr(kind, fact), fact
    if name not in OWN_DATA:
        assert kind.length_unit is not None or name == "WaterBox"  # which knows it once its units are chosen
        source = f"{kind.citation} {inspect.getdoc(kind)}"
        assert "doi" in source
    assert issubclass(kind, (FramesDataset, Dataset))
    assert issubclass(kind, MemmappedDataset) or name in ("AceHF", "MDCATH")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_explained(name):
    kind = DATASETS[name]
    text = inspect.getdoc(kind) or ""
    if "Args:" not in text:  # a part of a family, explained there
        text = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__ if base.__module__ == kind.__module__)
    for parameter in inspect.signature(kind).parameters:
        assert f"{parameter}:" in text, parameter
