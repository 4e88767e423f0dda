"""Whole programs as targets: commands, small trainings, runs that continue, the cache, and the environment.

Each is called in a process of its own, see :mod:`isolate`, in a folder of its own. The property is that of
:mod:`targets`; what is stopped after a time that it may well need counts as accepted.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import targets
import yaml

from torchmdnet.config.values import NONE_WORDS

#: Seconds of the processor after which a program gets SIGINT, and its status then.
ENOUGH, INTERRUPTED = 15, 130
#: What stands for memory that could not be had, where the package has to say how much is needed.
_NO_MEMORY = ("Unable to allocate", "error: MemoryError", "allocate memory", "Cannot allocate")
#: What is not for people, anywhere and at the beginning of a message.
_ADVICE = ("Traceback (most recent call last)", "weights_only=False")
_SLIPS = ("AttributeError", "TypeError", "KeyError", "IndexError", "NameError", "AssertionError", "'", "(", "[Errno")


@contextlib.contextmanager
def place(environment: Mapping[str, str | None] | None = None) -> Iterator[Path]:
    """A working folder with a home, some folders deep, and an environment in which variables are set or left out."""
    before, here = dict(os.environ), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as name:
        folder = Path(name, "a", "b", "c")
        folder.mkdir(parents=True)
        os.chdir(folder)
        os.environ.update(HOME=name, TORCHMDNET_CACHE=f"{name}/cache", TORCHMDNET_RENDEZVOUS_TIMEOUT="3")
        os.environ.pop("TORCHMDNET_LOG_DIR", None)
        for key, value in (environment or {}).items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        try:
            yield folder
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def program(main: Callable[[list[str]], Any], words: Sequence[str], *, may_stop: bool = False) -> int:
    """The status of a program; what it prints is looked at and dropped.

    Args:
        main: The function that takes the arguments.
        words: They.
        may_stop: Whether it may take long, and is interrupted then.
    """
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    if may_stop:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_PROF, ENOUGH)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main(list(words))
        except SystemExit as end:
            status = end.code or 0
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    check_words(status, out.getvalue(), err.getvalue(), may_stop)
    return status


def check_words(status: Any, out: str, err: str, may_stop: bool = False) -> None:
    """See that a program ended with a status that scripts know, and said why in words for people.

    Raises:
        Wrong: If not.
    """
    expected = {0, 1, 2, INTERRUPTED} if may_stop else {0, 1, 2}
    told = err.strip() or out.strip()
    if status not in expected or (status and not told):
        raise targets.Wrong(f"status {status!r}: {told[-600:]!r}")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for words in _NO_MEMORY:
        if words in err:
            raise targets.Wrong(f"no memory: {err[-600:]!r}")
    if any(words in err + out for words in _ADVICE) or any(line[7:].startswith(_SLIPS) for line in errors):
        raise targets.Wrong(f"not for people: {err[-1500:]!r}")
    if any(len(line) > targets.LONGEST for line in errors):
        raise targets.Wrong(f"a message of {max(map(len, errors))} characters: {err[:300]!r}")


# ------------------------------------------------------------------------------------------------------------ commands

#: Files of a few structures, one of them with an atom of an element that no model knows.
FILES: dict[str, bytes] = {
    "water.extxyz": targets.EXTXYZ.encode(),
    "water.xyz": targets.XYZ.encode(),
    "one.xyz": b"1\n\nH 0 0 0\n",
    "big.xyz": ("200\n\n" + "".join(f"C {i % 6} {i // 6 % 6} {i // 36}\n" for i in range(200))).encode(),
    "rare.xyz": b"2\n\nOg 0 0 0\nH 0 0 1\n",
    "coincident.xyz": b"2\n\nH 0 0 0\nH 0 0 0\n",
    "huge.xyz": b"2\n\nH 0 0 0\nH 1e300 0 0\n",
    "thin.extxyz": targets.EXTXYZ.replace("7.0", "1e-3").encode(),
    "empty.xyz": b"",
    "text.xyz": b"no structures here\n",
    "conf.yaml": yaml.safe_dump(targets.BASE).encode(),
    "odd name é #1.xyz": targets.XYZ.encode(),
    "-dash.xyz": targets.XYZ.encode(),
    "data.npz": targets.npz(**targets.arrays()),
    "data.h5": targets.hdf5(pos=targets.arrays()["R"], types=targets.arrays()["z"], energy=targets.arrays()["E"]),
}  # fmt: skip
MODELS = ("model.ckpt", "model.safetensors", "model.zip")


def lay_out(files: Mapping[str, bytes]) -> None:
    """Write files, the usual ones too, into the current folder."""
    for name in MODELS:
        Path(name).write_bytes(targets.model_bytes(Path(name).suffix))
    Path("folder").mkdir()
    for name, content in {**FILES, **files}.items():
        with contextlib.suppress(UnicodeEncodeError):  # no file has such a name
            Path(name).write_bytes(content)


def _stubbed() -> None:
    """Leave out what takes seconds or minutes and does not depend on the input: recording and compiling a package."""
    import torch

    import torchmdnet.export

    def record(model: Any, inputs: str) -> tuple[Any, list[Any]]:
        torchmdnet.export._architecture(model)
        return torch.nn.Identity(), []

    def write(program: Any, *, package_path: str, **_: Any) -> None:
        Path(package_path).write_bytes(b"package")

    setattr(torchmdnet.export, "recorded", record)  # noqa: B010
    setattr(torch.export, "export", lambda *_, **__: None)  # noqa: B010
    setattr(torch._inductor, "aoti_compile_and_package", write)  # noqa: B010


def _in_one_process() -> None:
    """Let labelling and sampling calculate here, without worker processes, which take seconds to start."""
    import torchmdnet.labelling.label
    import torchmdnet.labelling.sample
    from torchmdnet.errors import ConfigError
    from torchmdnet.labelling.workers import _told

    def run(work: Any, pieces: Any, **_: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        compute = None
        for key, piece in pieces:
            if compute is None:
                try:
                    compute = work.prepare()
                except Exception as error:
                    if isinstance(error, ConfigError):
                        raise
                    raise ConfigError(f"the calculator cannot be made: {_told(error)}") from None
            try:
                yield key, {"result": compute(piece)}
            except Exception as error:  # as in a worker
                yield key, {"error": _told(error)}

    setattr(torchmdnet.labelling.label, "run", run)  # noqa: B010
    setattr(torchmdnet.labelling.sample, "run", run)  # noqa: B010


def command(
    words: Sequence[str], files: Mapping[str, bytes], environment: Mapping[str, str | None], has_workers: bool
) -> bool:
    """A line of ``torchmd-net``, with files beside the usual ones and with variables of the environment."""
    from torchmdnet.scripts.main import main

    _stubbed()
    if not has_workers:
        _in_one_process()
    with place(environment):
        lay_out(files)
        status = program(main, words, may_stop=True)
        _no_drafts()
        return status in (0, INTERRUPTED)


def _no_drafts() -> None:
    """See that nothing half written lies beside the results."""
    left = [str(path) for path in Path().rglob(".*.tmp")] + [str(path) for path in Path().rglob(".[0-9]*-*")]
    if left:
        raise targets.Wrong(f"left behind: {left}")


# ----------------------------------------------------------------------------------------------------------- trainings

#: A training of two steps.
TRAINING: dict[str, Any] = {**targets.BASE, "train_size": 4, "val_size": 2, "test_size": 2, "batch_size": 2,
                            "num_epochs": 1, "num_workers": 0, "report": False, "lr": 0.001}  # fmt: skip


def train(words: Sequence[str]) -> int:
    """The status of ``torchmd-train``, which must not write outside of the folder it is called in."""
    import torchmdnet.scripts.train as script

    sys.argv = [str(Path(__file__).with_name("again.py")), *words]  # what Lightning starts as further processes
    inherited = os.environ.get("TORCHMDNET_LOG_DIR")
    with contextlib.suppress(*targets.ANSWERS, SystemExit, OSError):
        from torchmdnet.config import resolve

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = resolve(list(words))
        roots = args.dataset_root if isinstance(args.dataset_root, list) else [args.dataset_root]
        inside = Path().resolve().parents[2]
        for path in (args.log_dir, *roots):
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                if path and not Path(os.path.expanduser(path)).resolve().is_relative_to(inside):
                    return 2
    os.environ.pop("TORCHMDNET_LOG_DIR", None)
    if inherited is not None:
        os.environ["TORCHMDNET_LOG_DIR"] = inherited
    return program(script.main, words, may_stop=True)


def training(content: bytes, files: Mapping[str, bytes], environment: Mapping[str, str | None]) -> bool:
    """A settings file that is trained with."""
    with place(environment):
        lay_out(files)
        Path("conf.yaml").write_bytes(content)
        status = train(["--conf", "conf.yaml"])
        _no_drafts()
        if status == 0:
            _finished(Path())
        return status in (0, INTERRUPTED)


def _finished(folder: Path) -> None:
    """See that a run that ended well left what it promises."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")):
        return
    found = list(folder.rglob("potential*.safetensors"))
    if not found:
        raise targets.Wrong(f"status 0 without a potential: {sorted(map(str, folder.rglob('*')))}")


#: A finished run of two epochs, made once: name -> content.
_RUN: dict[str, bytes] = {}


def finished_run() -> dict[str, bytes]:
    """The files of a run of two epochs."""
    if not _RUN:
        from torchmdnet.scripts.train import main

        with place():
            Path("conf.yaml").write_text(yaml.safe_dump({**TRAINING, "num_epochs": 2, "save_interval": 1}))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                main(["--conf", "conf.yaml"])
            for path in sorted(Path("run").iterdir()):
                if path.is_file():
                    _RUN[path.name] = path.read_bytes()
    return _RUN


def continued(
    name: str, damaged: Mapping[str, bytes | None], words: Sequence[str], environment: Mapping[str, str | None]
) -> bool:
    """A run in a folder of some name, with files that are missing (None) or changed, goes on for an epoch.

    Args:
        name: Of the folder.
        damaged: Files with other content, None for none, ``b"/"`` for a folder in their place.
        words: Further arguments, in which ``{run}`` stands for the folder; none continues with ``last.ckpt``.
        environment: Variables.
    """
    whole = finished_run()
    with place(environment):
        run = Path(name)
        try:
            run.mkdir(parents=True)
        except (OSError, ValueError):
            return False  # no name of a folder
        for file, content in {**whole, **damaged}.items():
            if content == b"/":
                (run / file).mkdir()
            elif content is not None:
                (run / file).write_bytes(content)
        line = [word.replace("{run}", os.path.join(".", name)) for word in words]
        is_plain = not line and not damaged and not environment
        line = line or [f"--load-model={os.path.join('.', name, 'last.ckpt')}", "--num-epochs=3"]
        status = train(line)
        _no_drafts()
        if is_plain and status != 0:
            raise targets.Wrong(f"a whole run in {name!r} is refused")
        if status == 0:
            _finished(Path())
        return status in (0, INTERRUPTED)


def named(name: str) -> bool:
    """A run in a folder of some name, which then goes on there."""
    with place():
        try:
            Path(name).mkdir(parents=True)
            Path(name).rmdir()
        except (OSError, ValueError):
            return False
        words = [f"--{key.replace('_', '-')}={value}" for key, value in {**TRAINING, "log_dir": name}.items()]
        if train(words) != 0:
            raise targets.Wrong(f"log_dir {name!r} is refused")
        (made,) = Path("runs").iterdir() if name in NONE_WORDS else [name]
        _finished(Path(made))
        if train([f"--load-model={os.path.join(made, 'last.ckpt')}", "--num-epochs=2"]) != 0:
            raise targets.Wrong(f"a run in {name!r} does not continue")
        return True


# --------------------------------------------------------------------------------------------------------------- cache

_CACHE: dict[str, bytes] = {}


def _dataset() -> Any:
    from torchmdnet.datasets import ASE

    return ASE("water.extxyz")


def _numbers(dataset: Any) -> list[Any]:
    return [
        {key: value.tolist() if hasattr(value, "tolist") else value for key, value in dataset[i].to_dict().items()}
        for i in range(len(dataset))
    ]


def cache_files() -> dict[str, bytes]:
    """The files of a cache that holds one data set, by their place in it."""
    if not _CACHE:
        with place():
            lay_out({})
            _dataset()
            cache = Path(os.environ["TORCHMDNET_CACHE"])
            for path in sorted(cache.rglob("*")):
                if path.is_file():
                    _CACHE[str(path.relative_to(cache))] = path.read_bytes()
    return _CACHE


def cache(damaged: Mapping[str, bytes | None]) -> bool:
    """A cache with files that are missing or changed gives the data that it was made from."""
    whole = cache_files()
    with place(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lay_out({})
        root = Path(os.environ["TORCHMDNET_CACHE"])
        for name, content in {**whole, **damaged}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == b"/":
                path.mkdir()
            elif content is not None:
                path.write_bytes(content)
        found = _numbers(_dataset())
        os.environ["TORCHMDNET_CACHE"] = str(root.with_name("other"))
        expected = _numbers(_dataset())
        if found != expected:
            raise targets.Wrong("a damaged cache changes the data")
        return True


# --------------------------------------------------------------------------------------------------------- environment


def environment(variables: Mapping[str, str | None], line: Sequence[str], is_new: bool) -> bool:
    """A line that is right, under variables of the environment.

    Args:
        variables: Values, None for none.
        line: ``train`` and settings, or a line of ``torchmd-net``.
        is_new: Whether in a new process, whose modules see the variables as they are loaded.
    """
    with place(variables):
        lay_out({})
        shutil.rmtree("run", ignore_errors=True)
        if line[0] == "train":
            settings = [f"--{key.replace('_', '-')}={value}" for key, value in TRAINING.items()] + list(line[1:])
            status = _new("torchmdnet.scripts.train", settings) if is_new else train(settings)
            if status == 0:
                _finished(Path())
        elif is_new:
            status = _new("torchmdnet.scripts.main", line)
        else:
            from torchmdnet.scripts.main import main

            _stubbed()
            status = program(main, line, may_stop=True)
        _no_drafts()
        return status in (0, INTERRUPTED)


def _new(module: str, words: Sequence[str]) -> int:
    """The status of a program in a process of its own, which is interrupted where it takes long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = psutil.Popen([sys.executable, "-m", module, *words], stdout=out, stderr=err)
        is_asked = False
        while process.poll() is None:
            time.sleep(0.05)
            with contextlib.suppress(psutil.Error):
                if not is_asked and sum(process.cpu_times()[:2]) > ENOUGH:
                    is_asked = True
                    process.send_signal(signal.SIGINT)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    check_words(process.returncode, *texts, may_stop=True)
    return process.returncode
