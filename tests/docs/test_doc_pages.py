"""Everything the pages tell a reader to do, done in order."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from conftest import REPOSITORY
from daily import rarely
from doc_pages import DOCS, PAGES, Reader, blocks_of, folder_of_its_own

from torchmdnet.config import options_markdown
from torchmdnet.config.command_line import get_argparse
from torchmdnet.scripts.main import COMMANDS

#: Pages that take longest to follow.
LONG = [page for page in PAGES if page.stem in ("in-the-shell", "making-data", "own-data", "speed", "train")]


@pytest.mark.parametrize("page", rarely(PAGES, *LONG), ids=lambda page: page.stem)
def test_following_a_page_works(page, tmp_path):
    with folder_of_its_own(tmp_path):
        reader = Reader()
        for block in blocks_of(page):
            reader.follow(block)


def test_the_readme_goes_from_structures_to_dynamics_at_the_temperature_asked_for(tmp_path):
    blocks = blocks_of(REPOSITORY / "README.md")
    (settings,) = [block for block in blocks if block.language == "yaml"]
    (command,) = [block for block in blocks if "--conf my.yaml" in block.text]
    (dynamics,) = [block for block in blocks if block.language == "python"]
    small = ["--num-epochs", "1", "--embedding-dimension", "8", "--num-rbf", "8", "--batch-size", "8"]
    with folder_of_its_own(tmp_path):
        write("my_data.extxyz", list(labelled_copper(20)))
        Path("my.yaml").write_text(settings.text, encoding="utf-8")
        reader = Reader()
        reader.follow(command._replace(wish="run", extra=small))
        assert "dynamics.run(1000)" in dynamics.text
        reader.follow(dynamics._replace(text=dynamics.text.replace("run(1000)", "run(300)")))
    table = [line.split() for line in reader.said.splitlines() if re.match(r"\d+\.\d+ ", line)]
    assert len(table) == 4  # every hundred steps
    temperatures = [float(row[-1]) for row in table]
    assert 100 < temperatures[0] < 700  # 300 K, of 8 atoms
    assert 100 < sum(temperatures[1:]) / 3 < 900


def labelled_copper(number):
    """Periodic frames of eight atoms with energies, forces and stress of ASE's EMT potential."""
    rng = np.random.default_rng(3)
    for _ in range(number):
        atoms = bulk("Cu", cubic=True) * (2, 1, 1)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces()
        yield atoms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_a_page_mentions_exists(page):
    known = set(get_argparse()._option_string_actions)
    for _, address in COMMANDS.values():
        known |= set(importlib.import_module(address.partition(":")[0]).get_parser()._option_string_actions)
    for flag in re.findall(r"`(--[a-z][\w-]*)[^`]*`", page.read_text(encoding="utf-8")):
        assert flag in known, f"{page.name} mentions {flag}"


def test_the_reference_page_is_made_from_the_option_table():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == options_markdown(), "run: python tools/build_docs_reference.py"


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.stem)
def test_every_module_and_name_a_page_mentions_exists(page):
    for address in sorted(set(re.findall(r"\btorchmdnet(?:\.\w+)+", page.read_text(encoding="utf-8")))):
        module, _, name = address.rpartition(".")
        if not is_module(address):  # modules that need a program beside ours are looked for, not imported
            assert is_module(module), f"{page.name} mentions {address}"
            assert name in defined_in(module), f"{page.name} mentions {address}"


def is_module(address):
    try:
        return importlib.util.find_spec(address) is not None
    except ModuleNotFoundError:
        return False


def defined_in(module):
    try:
        return dir(importlib.import_module(module))
    except ModuleNotFoundError:
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        return [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.stem)
def test_every_file_a_page_links_to_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, heading = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not heading or heading in headings(linked), f"{page.name} links to {target}"


def headings(page):
    """The anchors of a page, as MkDocs makes them."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title)).strip("-") for title in titles}


#: What the extra ``docs`` installs.
SITE_NEEDS = ("latex2mathml", "material", "mkdocstrings_handlers")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, SITE_NEEDS)), reason="the extra docs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setLevel(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert heard.getvalue() == ""
    site = tmp_path / "site"
    for page in PAGES:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    assert 'id="torchmdnet.potential.TorchMD_Net"' in (site / "api" / "models.html").read_text(encoding="utf-8")
    assert (site / "search" / "search_index.js").is_file()  # read instead of the JSON file where there is no server
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)", text)
        assert [address for address in fetched if re.match(r"(https?:)?//", address)] == [], page.name
        assert not re.search(r":(class|func|meth|attr|data|mod|math):`", text), page.name
