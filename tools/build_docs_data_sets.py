"""Write docs/data-sets/, one page for each data set, from what its class says and the tables of docs/data-sets.md.

python tools/build_docs_data_sets.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.download import Remote
from torchmdnet.datasets.mdcath import _PLACE as MDCATH_PLACE

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "data-sets"

#: Arguments to show in the example, where there are any that matter.
EXAMPLES: dict[str, str] = {
    "Ace": "dataset_root: ~/data\ndataset_arg: {paths: molecules.h5}",
    "AceHF": "dataset_root: parquet\ndataset_arg: {paths: [train.parquet]}",
    "ASE": 'dataset_root: "~/data/*.extxyz"',
    "Custom": "coord_files: coords_*.npy\nembed_files: embed_*.npy\nenergy_files: energies_*.npy",
    "GenentechTorsions": "dataset_root: ~/data\ndataset_arg: {theory: CCSD_T_CBS_MP2}",
    "HDF5": "dataset_root: ~/data/molecules.h5",
    "MACEOFF": "dataset_root: ~/data\ndataset_arg: {max_gradient: 50.0}    # eV/Å",
    "MD17": "dataset_root: ~/data\ndataset_arg: {molecules: revised_aspirin}\nderivative: true",
    "MD22": "dataset_root: ~/data\ndataset_arg: {molecules: stachyose}\nderivative: true",
    "MDCATH": 'dataset_root: ~/data\ndataset_arg: {temperatures: ["320", "348"], numResidues: 100}\n'
    "derivative: true\ny_weight: 0.0    # there are no energies",
    "QM9": "dataset_root: ~/data\ndataset_arg: {label: energy_U0}\nremove_ref_energy: true",
    "QM9q": "dataset_root: ~/data\ndataset_arg: {paths: qm9q.h5}\ncharge: true\nderivative: true",
    "SPICE": "dataset_root: ~/data\ndataset_arg: {version: 2.0.1, max_gradient: 50.94}    # eV/Å\nderivative: true",
    "TinyQM": "dataset_arg: {level: GFN2-xTB}\nsplits: dataset\nderivative: true",
    "WaterBox": "dataset_root: ~/data\ndataset_arg: {units: eV}\nderivative: true",
}

#: Arguments that are configuration keys of their own, or cannot be written in YAML.
ELSEWHERE = {"root", "filename", "coordglob", "embedglob", "energyglob", "forceglob", "dataset_preload_limit"}
ELSEWHERE |= {"preload_memory_limit", "transform", "pre_transform", "pre_filter", "labels"}

MEANINGS = {
    "z": ("(N,)", "atomic numbers", ""),
    "pos": ("(N, 3)", "positions", "{length}"),
    "y": ("(1, 1)", "energy", "{energy}"),
    "neg_dy": ("(N, 3)", "forces", "{energy}/{length}"),
    "box": ("(1, 3, 3)", "lattice vectors as rows", "{length}"),
    "q": ("()", "total charge", "e"),
    "pq": ("(N,)", "partial charges", "e"),
    "dp": ("(1, 3)", "dipole moment", "e·Å"),
    "info": ("", "where the frame comes from", ""),
}


def file_of(name: str) -> str:
    """The file for a data set, below :data:`FOLDER`."""
    return f"{name.lower()}.md"


def page(name: str) -> str:
    """The page of a data set."""
    kind = DATASETS[name]
    about, arguments = described(kind)
    parts = [
        f"# {name}",
        f"This page is written by `tools/build_docs_data_sets.py` from `{kind.__module__}.{kind.__name__}`; "
        "[all data sets](../data-sets.md) are on one page.",
        markdown(about),
        table(["", ""], facts(name, kind)),
    ]
    fields = fields_of(kind)
    if fields:
        parts += ["## Fields of a sample", table(["field", "shape", "meaning", "unit"], fields)]
    has_forces = any("`neg_dy`" in row for row in fields)
    example = EXAMPLES.get(name, "dataset_root: ~/data\nderivative: true" if has_forces else "dataset_root: ~/data")
    parts.append(f"## Use\n\n```yaml\ndataset: {name}\n{example}\n```")
    if arguments:
        choices = {key: [variant[key] for variant in variants_of(kind) if key in variant] for key in arguments}
        rows = []
        for key, text in arguments.items():
            listed = ", ".join(f"`{choice}`" for choice in choices[key])
            rows.append([f"`{key}`", f"One of {listed}." if listed else markdown(text)])
        parts.append("Arguments beside the folder go into `dataset_arg`.\n\n" + table(["argument", "meaning"], rows))
    if files := files_of(kind):
        parts += [
            "## Download",
            "Files are fetched on first use, into `raw` in the folder of the set, and "
            "[compared with their checksums](../data-sets.md#downloads). Where none is published, the SHA-256 of the "
            "first download is noted and compared.",
            table(["file", "address", "checksum"], files),
        ]
    return "\n\n".join(parts) + "\n"


def facts(name: str, kind: Any) -> list[list[str]]:
    """What is known of a set as a whole; its number of systems is in the table of the page of all sets."""
    overview = rows_of_overview().get(name, [])
    rows = []
    if len(overview) == 6:
        what, systems, _, units, level, _ = overview
        rows += [["what", what], ["systems", systems], ["energies; forces", units], ["level of theory", level]]
    elif getattr(kind, "energy_unit", None):
        rows.append(["energies; forces", f"{kind.energy_unit}; {kind.energy_unit}/{kind.length_unit}"])
    else:
        rows.append(["units", "those of the files"])
    if lengths := kind.length_unit or ("Bohr; Å with `units: eV`" if name == "WaterBox" else None):
        rows.append(["lengths", lengths])
    if len(overview) == 6:
        rows += [
            ["cite", kind.citation or overview[-1]],
            ["licence", kind.licence or "not recorded here; see the publisher"],
        ]
    elif kind.citation:
        rows.append(["made by", kind.citation])
    return rows


def rows_of_overview() -> dict[str, list[str]]:
    """Cells of the tables of docs/data-sets.md after the first, by the name in the first."""
    found: dict[str, list[str]] = {}
    for line in (DOCS / "data-sets.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        name = cells[0].partition("](")[0].strip("[`")
        if line.startswith("| ") and name in DATASETS and name not in found:
            found[name] = cells[1:]
    return found


def fields_of(kind: Any) -> list[list[str]]:
    """Fields as the docstring of the class, or of what it stands on, lists them after ``Samples:``."""
    for base in (kind, *getattr(kind, "PARTS", ()), *kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        if match := re.search(r"Samples: (.*?)(?:\n\n|\Z)", text, re.DOTALL):
            break
    else:
        return []
    plain, _, asked = match[1].partition("With ``labels``")
    rows = []
    units = {"energy": kind.energy_unit or "*", "length": kind.length_unit or "*"}
    for part, note in ((plain, ""), (asked, ", when [`properties`](../train.md#several-properties) names it")):
        for name in dict.fromkeys(re.findall(r"(?<!no )``(\w+)``", part)):
            if name in MEANINGS and not any(row[0] == f"`{name}`" for row in rows):
                shape, meaning, unit = MEANINGS[name]
                text = "property chosen by `label`" if kind.__name__ == "QM9" and name == "y" else meaning
                shown = unit.format(**units)
                rows.append([f"`{name}`", shape, text + note, "see above" if "*" in shown else shown])
    return rows


def files_of(kind: Any) -> list[list[str]]:
    """What is downloaded: file, addresses and checksum."""
    if kind.__name__ == "MDCATH":
        return [
            ["`mdcath_source.h5`", f"<{MDCATH_PLACE}/mdcath_source.h5>", ""],
            ["`mdcath_dataset_<domain>.h5`", f"`{MDCATH_PLACE}/data/mdcath_dataset_<domain>.h5`", ""],
        ]
    rows: dict[str, list[str]] = {}
    for remote in remotes_of(kind):
        addresses = " or ".join(f"<{url}>" for url in remote.urls)
        rows[remote.path] = [f"`{remote.path}`", addresses, f"`{remote.checksum}`" if remote.checksum else ""]
    return list(rows.values())


def remotes_of(kind: Any) -> Iterator[Remote]:
    """The files of every version or molecule of a set."""
    for part in getattr(kind, "PARTS", (kind,)):
        for variant in variants_of(part):
            blank = object.__new__(part)  # the addresses depend on nothing else
            blank.__dict__.update(variant, is_revised=variant.get("molecules", "").startswith("revised_"))
            if hasattr(part, "remotes"):
                yield from blank.remotes


def variants_of(kind: Any) -> Sequence[dict[str, str]]:
    """The versions or molecules that a set comes in, as arguments."""
    if hasattr(kind, "VERSIONS"):
        return [{"version": version} for version in kind.VERSIONS]
    if hasattr(kind, "file_names"):
        return [{"molecules": molecule} for molecule in kind.file_names]
    return [{}]


# ------------------------------------------------------------------------------------------------- docstrings to pages


def described(kind: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its arguments, and the arguments with their texts."""
    own = inspect.cleandoc(kind.__doc__ or "")
    about = own.partition("\nArgs:")[0].strip()
    arguments: dict[str, str] = {}
    for base in kind.__mro__:
        if base is FramesDataset:
            break
        text = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:")[2].partition("\n\n")[0]
        if text:
            for match in re.finditer(r"^    (\w+): (.*(?:\n     .*)*)", text, re.MULTILINE):
                if match[1] not in ELSEWHERE and match[1] in inspect.signature(kind).parameters:
                    arguments[match[1]] = " ".join(match[2].split())
            break
    return about, arguments


def markdown(text: str) -> str:
    """reStructuredText as the docstrings use it, as Markdown."""
    text = re.sub(r"(?m)^(=[= ]+)\n(.*)\n\1\n((?:.+\n)*?)\1$", _table, text)
    text = re.sub(r"\.\. code-block:: (\w+)\n\n((?:    .*\n|\n)+)", _code, text)
    text = re.sub(r":(?:class|meth|attr|func):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return re.sub(r"(?<![<(`])(https://[^\s;,|]+[^\s;,.|)])", r"<\1>", text)


def _table(match: re.Match[str]) -> str:
    """A simple table: columns start where the rows of equals signs do."""
    starts = [found.start() for found in re.finditer(r"=+", match[1])]
    ends = [*starts[1:], None]

    def cells(line: str) -> list[str]:
        return [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]

    rows: list[list[str]] = []
    for line in match[3].splitlines():
        found = cells(line)
        if found[0] or not rows:
            rows.append(found)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], found, strict=True)]
    return table(cells(match[2]), rows)


def _code(match: re.Match[str]) -> str:
    lines = "\n".join(line.removeprefix("    ") for line in match[2].rstrip().splitlines())
    return f"```{match[1]}\n{lines}\n```\n\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for each in DATASETS:
        (FOLDER / file_of(each)).write_text(page(each), encoding="utf-8")
    print(f"wrote {len(DATASETS)} pages in {FOLDER}")
