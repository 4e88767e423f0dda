"""Torsion scans: the records of one method, in eV."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from file_server import serve

from torchmdnet.datasets.genentech import GenentechTorsions
from torchmdnet.errors import DataError

FILE = "QM_MM_Gas_Phase_Torsion_Scan_Individual_Results_with_CCSD_T_CBS_baseline.sdf"
KCAL_MOL = 0.0433641153087705
SYMBOLS, NUMBERS = ["C", "H", "O", "Cl", "N"], [6, 1, 8, 17, 7]
RNG = np.random.default_rng(0)
RECORDS = [
    {
        "pos": np.round(RNG.normal(size=(3 + i % 3, 3)), 4),
        "MinMethod": ["CCSD_T_CBS_MP2", "HF_6-31G"][i % 2],
        "Number": i // 2,
        "deltaE": round(float(abs(RNG.normal())), 4),
        "energy": round(float(RNG.normal()), 4),
    }
    for i in range(8)
]


def sdf(records=RECORDS) -> str:
    lines = []
    for record in records:
        size = len(record["pos"])
        lines += ["scan", "  -OEChem-05061609463D", ""]
        lines.append(f"{size:3d}{size - 1:3d}  0     0  0  0  0  0  0999 V2000")
        lines += [
            f"{x:10.4f}{y:10.4f}{z:10.4f} {SYMBOLS[i]:<3s} 0  0  0  0  0  0  0  0  0  0  0  0"
            for i, (x, y, z) in enumerate(record["pos"])
        ]
        lines += [f"  1{i + 2:3d}  1  0  0  0  0" for i in range(size - 1)]
        lines.append("M  END")
        for name in ("MinMethod", "Number", "deltaE", "energy"):
            if name in record:
                lines += [f"> <{name}>", str(record[name]), ""]
        lines += ["> <ScanAtoms_1>", "2 1 3 4", "", "$$$$"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / FILE).write_text(sdf())
    return tmp_path


@pytest.mark.parametrize("theory", ["CCSD_T_CBS_MP2", "HF_6-31G"])
@pytest.mark.parametrize("field", ["deltaE", "energy"])
def test_the_records_of_one_method_are_read(root, theory, field):
    data = GenentechTorsions(root, theory=theory, energy_field=field)
    chosen = [record for record in RECORDS if record["MinMethod"] == theory]
    assert len(data) == 4
    for sample, record in zip(data, chosen, strict=True):
        assert sample.z.tolist() == NUMBERS[: len(record["pos"])]
        assert sample.y.tolist() == [[record[field] * KCAL_MOL]]
        np.testing.assert_array_equal(sample.pos, record["pos"].astype(np.float32))
        assert set(sample.keys()) == {"z", "pos", "y"}


def test_scans_are_named_in_iterated_samples(root):
    samples = list(GenentechTorsions(root).sample_iter(mol_ids=True))
    assert [sample.mol_id for sample in samples] == [0, 1, 2, 3]
    assert samples[0].scan_atoms == [2, 1, 3, 4]


def test_methods_do_not_share_arrays(root):
    first, second = GenentechTorsions(root), GenentechTorsions(root, theory="HF_6-31G")
    assert first[0].y != second[0].y
    assert GenentechTorsions(root)[0].y == first[0].y


def test_filters_are_applied(root):
    assert len(GenentechTorsions(root, pre_filter=lambda sample: len(sample.z) == 3)) == 2
    with pytest.raises(DataError, match="no system is left"):
        GenentechTorsions(root, pre_filter=lambda sample: False)


def test_an_unknown_method_lists_the_known_ones(root):
    with pytest.raises(DataError, match=r"no 'CCSD_T_CBS'\. Did you mean 'CCSD_T_CBS_MP2'\? Choose from .*, HF_6-31G"):
        GenentechTorsions(root, theory="CCSD_T_CBS")


def test_a_missing_energy_is_named(root):
    broken = [dict(record) for record in RECORDS]
    del broken[2]["deltaE"]
    (root / "raw" / FILE).write_text(sdf(broken))
    with pytest.raises(DataError, match=r"record 3 has no item 'deltaE'\. It has MinMethod, Number, energy"):
        GenentechTorsions(root)
    broken[2]["deltaE"] = "n/a"
    (root / "raw" / f"{FILE}.sha256").unlink()
    (root / "raw" / FILE).write_text(sdf(broken))
    with pytest.raises(DataError, match="record 3: 'n/a' is not a number"):
        GenentechTorsions(root)


def test_the_archive_is_downloaded_and_unpacked(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"si/{FILE}", sdf())
        file.writestr("si/other.sdf", "...")
    with serve() as publisher:
        publisher.files["ci6b00614_si_002.zip"] = archive.getvalue()
        assert len(GenentechTorsions(tmp_path, mirror=publisher.address)) == 4
        assert len(GenentechTorsions(tmp_path, theory="HF_6-31G")) == 4
        assert len(publisher.requests) == 1


def test_units_and_method_are_stated(root):
    data = GenentechTorsions(root)
    assert (data.energy_unit, data.length_unit, data.level_of_theory) == ("eV", "Å", "CCSD(T)/CBS")
    assert GenentechTorsions(root, theory="HF_6-31G").level_of_theory == "HF_6-31G"
