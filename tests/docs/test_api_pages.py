"""The pages of the API reference: what has to be on them, and docstrings that say what a reader needs."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from doc_pages import DOCS

from torchmdnet.datasets import DATASETS
from torchmdnet.heads import HEADS
from torchmdnet.models import ARCHITECTURES
from torchmdnet.priors import PRIORS

PAGES = sorted((DOCS / "api").glob("*.md"))


def entries() -> dict[str, list[str]]:
    """Addresses on the pages, and the members that are shown of each."""
    found = {}
    for page in PAGES:
        for address, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(encoding="utf-8"), re.M):
            found[address] = (yaml.safe_load(options) or {}).get("options", {}).get("members", [])
    return found


def thing_at(address: str) -> Any:
    module, _, name = address.rpartition(".")
    return getattr(importlib.import_module(module), name)


def documented() -> list[Any]:
    """Every address, and those of the members."""
    addresses = []
    for address, members in entries().items():
        addresses += [address, *(f"{address}.{member}" for member in members)]
    return addresses


@pytest.mark.parametrize(
    "table", [ARCHITECTURES, HEADS, PRIORS, DATASETS], ids=["models", "heads", "priors", "data sets"]
)
def test_everything_that_an_option_can_name_is_in_the_reference(table) -> None:
    on_pages = {thing_at(address) for address in entries()}
    assert [name for name in table if table[name] not in on_pages] == []


@pytest.mark.parametrize("address", documented())
def test_a_name_of_the_reference_exists_and_states_its_arguments(address) -> None:
    owner, _, name = address.rpartition(".")
    thing = getattr(thing_at(owner), name) if owner in entries() else thing_at(address)
    text = inspect.getdoc(thing) or ""
    assert text.partition("\n")[0], "no docstring"
    if isinstance(thing, property) or not callable(thing) or is_plain(thing) or name in CALLED_BY_OTHERS:
        return
    if inspect.isclass(thing):
        text = "\n".join(inspect.getdoc(base) or "" for base in thing.__mro__)
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    wanted = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if re.search(r"\((N|S|E|max_z)['\w]*,|arguments of|for the arguments", text) and owner in entries():
        return  # a method with the shape of what it returns, or with the arguments of another
    if "testing.contract" not in address and not text.startswith("Sum "):
        assert [word for word in wanted if not re.search(rf"(?m)^ *{word}: |`{word}`", text)] == []


#: Methods that Lightning and ASE call, with arguments that they document.
CALLED_BY_OTHERS = {"calculate", "setup", "test_step", "training_step", "validation_step"}


def is_plain(thing: Any) -> bool:
    """Whether a class has no constructor of its own: a named tuple, whose fields say what it holds, or an exception."""
    return inspect.isclass(thing) and issubclass(thing, tuple | Exception)


def test_every_page_of_the_reference_is_in_the_navigation_and_the_table() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    overview = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"api/{page.name}" in navigation
        assert page.stem == "index" or f"({page.name})" in overview
