"""Reading the pages of the documentation and doing what they say.

A page is followed from top to bottom, in a folder of its own. Python is executed, settings are resolved, and of
commands the arguments are checked; a fence with ``title="name"`` puts its text into a file of that name. A comment
before a fence asks for something else:

========================  ==========================================================================================
``<!-- test: run -->``    run the commands; whatever follows the word is added to each, to make it small
``<!-- test: fails -->``  this has to be refused
``<!-- test: output -->`` this text is what the fence before it printed, logged or was refused with (``...``: anything)
``<!-- test: names -->``  look only whether names and keyword arguments exist: doing it would take a download
``<!-- test: file -->``   only write the file: wrong on purpose, or for another program
========================  ==========================================================================================
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")])
LANGUAGES = {"python", "bash", "cpp", "yaml", "text", "csv", "bibtex"}


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int  # of its first line of text, from 1
    language: str
    title: str
    wish: str  # first word of the comment before it
    extra: list[str]  # and the others
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    comment, number = "", 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if match := re.match(r"\s*<!-- test: (.*?) -->", line):
            comment = match[1]
        elif fence := re.match(r"(\s*)```(\w*)(.*)$", line):
            indent, language, options = fence.groups()
            end = next(i for i in range(number, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(row.removeprefix(indent) for row in lines[number:end]) + "\n"
            title = re.search(r'title="([^"]+)"', options)
            wish, *extra = shlex.split(comment) or [""]
            found.append(Block(page, number + 1, language, title[1] if title else "", wish, extra, text))
            comment, number = "", end + 1
        elif line.strip():
            assert not comment, f"{page.name}:{number}: no fence follows the comment {comment!r}"
    return found


class Reader:
    """Somebody who follows a page in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.said = ""

    def follow(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is not among {sorted(LANGUAGES)}"
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        if block.language == "text":
            if block.wish == "output":
                self.compare(block)
            return
        if block.wish == "file" or (block.title and block.language == "python"):
            return
        act = getattr(self, f"do_{block.language}", None)
        if act is None:
            return
        with listening() as heard:
            try:
                act(block)
            except (Exception, SystemExit) as error:
                if block.wish != "fails":
                    raise AssertionError(
                        f"{block.place}: {type(error).__name__}: {error}\n{heard.getvalue()}"
                    ) from error
                self.said = f"{heard.getvalue()}{type(error).__name__}: {error}"
            else:
                assert block.wish != "fails", f"{block.place}: nothing was refused"
                self.said = heard.getvalue()

    def compare(self, block: Block) -> None:
        heard, at = " ".join(self.said.split()), 0
        for piece in " ".join(block.text.split()).split("..."):
            at = heard.find(piece.strip(), at)
            assert at >= 0, f"{block.place}: the page says\n{block.text}\nbut it was\n{self.said}"

    # ------------------------------------------------------------------------------------------------ languages

    def do_python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + block.text
        if block.wish == "names":
            check_names(source, self.names)
        else:
            exec(compile(source, str(block.page), "exec"), self.names)

    def do_yaml(self, block: Block) -> None:
        from torchmdnet.config import resolve
        from torchmdnet.datasets import DATASETS

        path = Path(block.title or "settings.yaml")
        path.write_text(block.text, encoding="utf-8")
        has_dataset = "dataset" in yaml.safe_load(block.text)
        args = resolve(["--conf", str(path), *([] if has_dataset else ["--dataset", "TinyQM"])])
        parameters = inspect.signature(DATASETS[args.dataset]).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert set(args.dataset_arg or {}) <= set(parameters), f"{block.place}: dataset_arg {args.dataset_arg}"

    def do_bash(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            settings = {}
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                name, _, value = words.pop(0).partition("=")
                settings[name] = value
            if words:
                with environment(settings):
                    self.command(words, block)

    def command(self, words: list[str], block: Block) -> None:
        if ">" in words:
            words = words[: words.index(">")]
        program, arguments = words[0], words[1:]
        if program == "torchmd-train":
            if not {"--help", "--version"} & set(arguments):
                train(arguments + block.extra, only_resolve=block.wish not in ("run", "fails"))
        elif program == "torchmd-net":
            from torchmdnet.scripts.main import main

            if "--help" not in arguments:
                main(arguments + (block.extra if block.wish == "run" and "torchmd-train" not in block.text else []))
        elif program == "pip":
            check_pip(arguments)
        elif program == "make":
            makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), f"{block.place}: no target {arguments[0]}"
        elif program == "export":
            os.environ.update({name: value for name, _, value in (word.partition("=") for word in arguments)})
        elif program not in ("git", "cd"):
            raise AssertionError(f"{block.place}: {program!r} is not a command this test knows")


def train(arguments: list[str], only_resolve: bool) -> None:
    from torchmdnet.config import resolve
    from torchmdnet.scripts.train import main

    if only_resolve:
        resolve(arguments)
    else:
        main(arguments)


def extras() -> set[str]:
    """The optional dependencies of the project, by name."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def check_pip(arguments: list[str]) -> None:
    """What is installed is this package with extras that exist, or comes from elsewhere."""
    assert arguments[0] == "install"
    for word in arguments[1:]:
        if match := re.match(r"(torchmd-net|\.)\[(.*)\]$", word):
            assert set(match[2].split(",")) <= extras(), word


def check_names(source: str, names: dict[str, Any]) -> None:
    """Import what is imported; look up every name that is called, and whether it takes the keywords."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "<imports>", "exec"), names)
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                function = {**vars(builtins), **names}[call.func.id]
                keywords = {word.arg: None for word in call.keywords if word.arg}
                inspect.signature(function).bind_partial(*[None] * len(call.args), **keywords)


# ---------------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """Everything that is printed or logged."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logger = logging.getLogger("torchmdnet")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            yield heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def folder_of_its_own(folder: Path) -> Iterator[None]:
    """Work in a folder that has the examples in it and nothing of the user's, and leave the process as it was."""
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    before, modules, path = os.getcwd(), set(sys.modules), list(sys.path)
    with environment({"HOME": str(folder), "TORCHMDNET_CACHE": str(folder / ".cache")}):
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None)
                if file and Path(file).is_relative_to(folder):
                    del sys.modules[name]
