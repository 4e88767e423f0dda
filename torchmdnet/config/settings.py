"""From the command line and the files it names to the settings of a run.

Settings come from three layers: the defaults of the option table; files, that is ``--conf`` and the settings saved
with ``--load-model``, of which a later one wins; and flags, which win over files wherever they stand.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchmdnet.config.reader import Setting, plain, read_yaml
from torchmdnet.config.rundir import companion, other_checkpoint
from torchmdnet.config.values import as_truth, coerce, number, takes_truth
from torchmdnet.errors import CheckpointError, ConfigError, did_you_mean
from torchmdnet.files import expanded, not_a_file
from torchmdnet.options import OPTIONS, RENAMED, RETIRED, SYNONYMS
from torchmdnet.parse import parse_json
from torchmdnet.priors import named_priors

__all__ = [
    "add_reference_prior",
    "hyper_parameters",
    "merge",
    "number",
    "read_saved_settings",
]

logger = logging.getLogger(__name__)

#: Settings that belong to the run that wrote them, not to one that continues it.
_OF_ONE_RUN = ("conf", "load_model", "load_weights", "overwrite", "reset_trainer", "accept_changed_data")

#: Settings that may differ within one run: what a run that goes on is given again, and what is filled in on the way.
_ALIKE = frozenset({*_OF_ONE_RUN, "log_dir", "num_epochs", "ngpus", "num_nodes", "num_workers", "prior_model",
                    "prior_args", "redirect", "report"})  # fmt: skip

#: The kind of file whose unknown keys cannot be corrected by hand.
_CHECKPOINT = "the checkpoint's own settings"

#: Names that older releases gave to an architecture.
_FORMER_MODELS = {"tensornetv2_alt": "tensornet2", "tensornet-nqe": "tensornet2"}

#: The prior that delta learning keeps for adding the reference energies back.
_REFERENCE_PRIOR: dict[str, Any] = {"Atomref": {"enable": False}}


class Settings:
    """The layers of a configuration, and where each value comes from."""

    def __init__(self) -> None:
        self.files: dict[str, Setting] = {}
        self.flags: dict[str, Setting] = {}
        self.unknown: dict[str, tuple[Setting, str]] = {}  # and the kind of file they stand in

    def __contains__(self, key: str) -> bool:
        """Whether somebody gave this setting."""
        return key in self.files or key in self.flags

    def values(self) -> dict[str, Any]:
        """Every option, and whatever else a model of the user's own reads."""
        defaults = {key: copy.copy(option.default) for key, option in OPTIONS.items()}
        given = {key: setting.value for layer in (self.files, self.flags) for key, setting in layer.items()}
        return defaults | given

    def source(self, key: str) -> str:
        """Where the value in use was written: ``"--lr"``, ``"conf.yaml, line 3"``, ``"default"``."""
        setting = self.flags.get(key) or self.files.get(key)
        return setting.source if setting else "default"

    def add_flag(self, key: str, value: Any, flag: str) -> None:
        setting, before = Setting(coerce(key, value, flag), flag), self.flags.get(key)
        if OPTIONS[key].type == "mapping" and before is not None and before.value and setting.value:
            setting = setting._replace(value={**before.value, **setting.value})
        self.flags[key] = setting
        if key == "conf":
            self._add_file(read_yaml(self.flags[key].value), "config file")
        elif key == "load_model" and self.flags[key].value is not None:
            self._add_file(*read_saved_settings(self.flags[key].value))

    def _add_file(self, found: Mapping[str, Setting], where: str) -> None:
        settings, unknown = _adopt(found)
        self.unknown |= {key: (setting, where) for key, setting in unknown.items()}
        if "prior_model" in settings:
            self.files.pop("prior_args", None)
        for key, setting in settings.items():
            flag = self.flags.get(key)
            if flag is not None and flag.value != setting.value:
                logger.warning(
                    "%s: %s=%r is not used, because %s was given as well (a flag wins over a file, also when it "
                    "stands before it; releases up to 3 took the later one).",
                    setting.source, key, setting.value, flag.source,
                )  # fmt: skip
        self.files.update(settings)


def merge(given: Iterable[tuple[str, Any, str]]) -> Settings:
    """Layer flags, as ``(key, text, flag)`` in their order, over the files that they name; check every value."""
    settings = Settings()
    for key, value, flag in given:
        settings.add_flag(key, value, flag)
    _accept_own_parameters(settings)
    if "prior_model" in settings.flags and "prior_args" not in settings.flags:
        settings.files.pop("prior_args", None)
    values = settings.values()
    if values["prior_args"] is not None:
        # One form from here on: the arguments of a prior stand beside its name.
        source = settings.source("prior_args")
        priors = coerce("prior_model", _join_priors(values["prior_model"], values["prior_args"], source), source)
        settings.flags["prior_model"] = Setting(priors, settings.source("prior_model"))
        settings.flags["prior_args"] = Setting(None, settings.source("prior_args"))
    return settings


def _adopt(found: Mapping[str, Setting]) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """Check settings that were read from a file, setting retired keys aside; known ones and unknown ones."""
    known: dict[str, Setting] = {}
    unknown: dict[str, Setting] = {}
    for word, (value, source) in found.items():
        key = word.replace("-", "_")
        if key in RENAMED:
            logger.warning("%s: %s is now spelt %s.", source, key, RENAMED[key])
            key = RENAMED[key]
        if key == "model" and isinstance(value, str) and value in _FORMER_MODELS:
            value = _FORMER_MODELS[value]
        if key in RETIRED:
            logger.warning("%s: %s is set aside: %s.", source, key, RETIRED[key])
        elif key in OPTIONS:
            known[key] = Setting(coerce(key, value, source), source)
        else:
            unknown[key] = Setting(value, source)
    return known, unknown


def _accept_own_parameters(settings: Settings) -> None:
    """Keep keys that the chosen architecture reads beside the options; refuse the others."""
    if not settings.unknown:
        return
    from torchmdnet.build import representation_arguments
    from torchmdnet.models import ARCHITECTURES

    architecture = ARCHITECTURES[settings.values()["model"]]
    own = representation_arguments(architecture)
    for key, (setting, where) in settings.unknown.items():
        if key in own:
            value = as_truth(setting.value) if takes_truth(own[key], architecture) else setting.value
            settings.files[key] = setting._replace(value=value)
        elif where == _CHECKPOINT:
            logger.warning("%s: %s=%r is not known here and set aside.", setting.source, key, setting.value)
        else:
            hint = f" Did you mean {SYNONYMS[key]!r}?" if key in SYNONYMS else did_you_mean(key, [*OPTIONS, *own])
            raise ConfigError(
                f"Unknown argument in {where}: {key} ({setting.source}).{hint} `torchmd-train --help` lists all."
            )


def read_saved_settings(checkpoint: str | os.PathLike[str]) -> tuple[dict[str, Setting], str]:
    """The settings of the run that wrote a checkpoint.

    They stand in ``hparams.yaml`` beside the checkpoint, or, where there is none or it is of another run, in the
    checkpoint itself. What belongs to that one run (the checkpoint it started from, for example) and the prior that
    delta learning added are left out.

    Returns:
        The settings, not yet checked, and what kind of file they stand in.

    Raises:
        ConfigError: There is no such file, or it holds no settings.
        CheckpointError: The file cannot be read, or asks for more than plain values.
    """
    path = expanded(checkpoint)
    if wrong := not_a_file(path):
        raise ConfigError(f"load_model: {wrong}{other_checkpoint(path)}")
    from torchmdnet.checkpoint import hyper_parameters_of, read_checkpoint

    content = read_checkpoint(path)
    sidecar = companion(path, "hparams.yaml")
    is_there = sidecar.is_file()
    saved = {} if is_there and not content.get("hyper_parameters") else hyper_parameters_of(content)
    found, where = (read_yaml(sidecar) if is_there else {}), "the model checkpoint"
    other = _differences(found, saved)
    if other:
        logger.warning(
            "%s is of another run than %s, or was changed: they differ in %s. The settings inside the checkpoint are "
            "used; change them with flags or --conf.",
            sidecar, path, ", ".join(other),
        )  # fmt: skip
    if other or not is_there:
        if not saved.get("model"):
            raise CheckpointError(
                f"load_model: {str(path)!r} does not say how its model was built, and there is no {sidecar.name} "
                "beside it. Put the hparams.yaml of its run there, or give the settings with --conf and the weights "
                "with --load-weights."
            )
        if not is_there:
            logger.info("Settings are taken from %s itself; there is no %s beside it.", path, sidecar.name)
        found, where = {key: Setting(plain(value), str(path)) for key, value in saved.items()}, _CHECKPOINT
    found = {key: setting for key, setting in found.items() if key not in _OF_ONE_RUN}
    _go_on_beside(path, found)
    return _without_reference_prior(found), where


def _go_on_beside(path: Path, found: dict[str, Setting]) -> None:
    """Let a run go on in the folder of its checkpoint, also where that was moved, copied or renamed since."""
    folder, log_dir = path.parent, found.get("log_dir")
    if log_dir is None or not isinstance(log_dir.value, str) or Path(log_dir.value).resolve() == folder.resolve():
        return
    is_moved = folder.resolve().as_posix().endswith(f"/{Path(log_dir.value).as_posix()}")  # another working folder
    if is_moved or any((folder / name).is_file() for name in ("hparams.yaml", "input.yaml")):
        found["log_dir"] = Setting(str(folder), log_dir.source)


def _differences(found: Mapping[str, Setting], saved: Mapping[str, Any]) -> list[str]:
    """Keys whose values say that a file of settings is of another run than a checkpoint."""
    if "dataset" not in saved:  # the options of a model alone
        return []
    return [
        key
        for key, setting in found.items()
        if key in saved and key not in _ALIKE and _comparable(setting.value) != _comparable(plain(saved[key]))
    ]


def _comparable(value: Any) -> Any:
    """A value without what writing it to a file can change."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return _comparable(parse_json(value, "setting"))
    if isinstance(value, Mapping):
        return {str(key): _comparable(item) for key, item in value.items()}
    return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_reference_prior(found: dict[str, Setting]) -> dict[str, Setting]:
    """Undo :func:`add_reference_prior`, however often earlier releases applied it."""
    names = found.get("prior_model", Setting(None, "")).value
    arguments = found.get("prior_args", Setting(None, "")).value
    source = found.get("prior_model", Setting(None, "")).source
    if names is not None:
        coerce("prior_model", names, source)  # a file may hold anything
    if arguments is not None:
        coerce("prior_args", arguments, found["prior_args"].source)
    priors = named_priors(names)
    if arguments is not None:
        arguments = [arguments] if isinstance(arguments, Mapping) else list(arguments)
        # The file holds the priors that were built: the shorter of the two lists.
        priors = [(name, dict(given or {})) for (name, _), given in zip(priors, arguments, strict=False)]
    if found.get("remove_ref_energy", Setting(False, "")).value:
        while priors and priors[-1][0] == "Atomref" and priors[-1][1].get("enable") is False:
            priors.pop()
    elif arguments is None:
        return found
    if "prior_model" in found:
        source = found["prior_model"].source
        found["prior_model"] = Setting([{name: given} if given else name for name, given in priors] or None, source)
        found["prior_args"] = Setting(None, source)
    return found


def _join_priors(names: Any, arguments: Any, source: str) -> list[dict[str, dict[str, Any]]]:
    """``prior_model`` with the arguments of ``prior_args`` in place of its own."""
    priors = named_priors(names)
    arguments = [arguments] if isinstance(arguments, Mapping) else list(arguments)
    if len(arguments) != len(priors):
        raise ConfigError(
            f"{source}: prior_args has {len(arguments)} entries, but prior_model names {len(priors)} priors "
            f"({', '.join(name for name, _ in priors) or 'none'}). Give one mapping for each, {{}} where there is "
            "nothing to say."
        )
    return [{name: dict(given or {})} for (name, _), given in zip(priors, arguments, strict=True)]


def add_reference_prior(prior_model: Any) -> list[Any]:
    """The priors of a delta-learning run: those given, then a disabled ``Atomref`` that keeps the reference energies.

    Applying it again changes nothing.

    >>> add_reference_prior(add_reference_prior("ZBL"))
    ['ZBL', {'Atomref': {'enable': False}}]
    """
    priors = [] if not prior_model else list(prior_model) if isinstance(prior_model, (list, tuple)) else [prior_model]
    if priors and named_priors(priors[-1])[-1:] == [("Atomref", {"enable": False})]:
        return priors
    return [*priors, copy.deepcopy(_REFERENCE_PRIOR)]


def hyper_parameters(args: argparse.Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """The settings to save with a model: those that release 3 reads, and newer ones that differ from their default."""
    values = dict(args) if isinstance(args, Mapping) else vars(args)
    return {
        key: value
        for key, value in values.items()
        if key not in OPTIONS or OPTIONS[key].established or value != OPTIONS[key].default
    }
