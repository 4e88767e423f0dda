"""Which devices a run uses, and how several processes find each other, agree on one run, and notice who is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed import PrefixStore, TCPStore

from torchmdnet.config.launcher import check_places, launcher_found, rendezvous_seconds
from torchmdnet.errors import ConfigError, PeerError
from torchmdnet.processes import end_with_parent

__all__ = [
    "BoundedDDPStrategy",
    "SrunEnvironment",
    "World",
    "choose_strategy",
    "choose_world",
    "cluster_environment",
    "end_with_launcher",
    "launched_world",
    "rendezvous_seconds",
]

log = logging.getLogger(__name__)

#: Processes that are started on a machine without GPUs, however few its cores.
MOST_ON_ANY_CPU = 8

#: Seconds between two signs of life of a process.
BEAT_SECONDS = 1.0

#: The process that started this one as part of its run, an environment variable.
_LAUNCHER = "TORCHMDNET_LAUNCHER"

_T = TypeVar("_T")


# ----------------------------------------------------------------------------------------------------- devices


class World(NamedTuple):
    """The processes of a run."""

    accelerator: str
    devices: int  # processes on each node
    num_nodes: int


def launched_world() -> tuple[int, int, str] | None:
    """Processes a node, nodes and name of the launcher that started this process, torchrun or srun; None without one.

    Raises:
        ConfigError: If the launcher's nodes have different numbers of processes, or a variable that it sets is missing
            or does not fit the others; the message names it.
    """
    launcher = launcher_found()
    if launcher == "torchrun":
        size, per_node = _told(launcher, "WORLD_SIZE", 1), _told(launcher, "LOCAL_WORLD_SIZE", 1)
        nodes, places = size // per_node, {"RANK": size, "LOCAL_RANK": per_node}
    elif launcher == "srun":
        size = _told(launcher, "SLURM_NTASKS", 1)
        known = [name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if os.environ.get(name)]
        nodes = _told(launcher, known[0], 1) if known else 1
        per_node = size // nodes
        places = {"SLURM_PROCID": size, "SLURM_LOCALID": per_node, "SLURM_NODEID": nodes}
    else:
        return None
    if per_node * nodes != size or not per_node:
        raise ConfigError(
            f"{launcher} started {size} processes on {nodes} nodes. Start the same number on every node, e.g. with "
            "--nproc-per-node or --ntasks-per-node."
        )
    for name, count in places.items():
        _told(launcher, name, 0, count - 1)
    return per_node, nodes, launcher


def _told(launcher: str, name: str, lowest: int, highest: int | None = None) -> int:
    """A number that a launcher has put into the environment."""
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(
            f"{name}: not in the environment, but {launcher} sets it. Start the run with {launcher} itself."
        )
    if int(text) < lowest or (highest is not None and int(text) > highest):
        expected = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
        raise ConfigError(
            f"{name}: {text} in the environment, where {launcher} would say a number {expected}. Start the run with "
            f"{launcher} itself, or remove it (unset {name})."
        )
    return int(text)


class SrunEnvironment(SLURMEnvironment):
    """The processes that srun started, however their number was given to SLURM; nothing is put into the queue again."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_used() -> None: ...

    @staticmethod
    def _validate_srun_variables() -> None: ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing: the settings are those of :func:`launched_world`."""


def cluster_environment() -> ClusterEnvironment:
    """Where a process finds its place among the others: what :func:`launched_world` goes by, and no other launcher."""
    launched = launched_world()
    if launched is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if launched[2] == "torchrun" else SrunEnvironment()


def choose_world(ngpus: int, num_nodes: int) -> World:
    """Accelerator and numbers of processes: those of the launcher, if there is one, else as the options say.

    Args:
        ngpus: Number of devices per node; -1 is every visible accelerator, or one process on the CPU without any.
        num_nodes: Number of nodes.

    Raises:
        ConfigError: If there are not that many, the launcher started other processes, or the environment names a place
            that is none of theirs.
    """
    launched = launched_world()
    if launched is None:
        world = World(*_choose_devices(ngpus), num_nodes)
        most = max(MOST_ON_ANY_CPU, os.cpu_count() or 1)
        if world.accelerator == "cpu" and world.devices > most:
            raise ConfigError(
                f"ngpus: {ngpus} processes are too many for the {os.cpu_count()} cores of this machine, which has no "
                f"GPU. Choose {most} or fewer."
            )
        check_places(world.devices, num_nodes)
        return world
    per_node, nodes, launcher = launched
    for option, given, default, found in (("ngpus", ngpus, -1, per_node), ("num_nodes", num_nodes, 1, nodes)):
        if given not in (default, found):
            where = "a node" if option == "ngpus" else "nodes"
            raise ConfigError(
                f"{option}: {given} does not fit what {launcher} started, {found} "
                f"{'processes' if option == 'ngpus' else ''} {where}. Leave {option} out, or start as many."
            )
    return World(*_choose_devices(per_node), nodes)


def _choose_devices(ngpus: int) -> tuple[str, int]:
    if torch.cuda.is_available():
        kind, available = "gpu", torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        kind, available = "mps", 1
    else:
        return "cpu", 1 if ngpus == -1 else _positive(ngpus)
    if ngpus == -1:
        return kind, available
    if _positive(ngpus) > available:
        raise ConfigError(
            f"ngpus: {ngpus} asked for, but {available} visible. Choose {available} or fewer, -1 for all, or make more "
            "visible with CUDA_VISIBLE_DEVICES."
        )
    return kind, ngpus


def _positive(ngpus: int) -> int:
    if ngpus < 1:
        raise ConfigError(f"ngpus: {ngpus} is no number of devices. Give 1 or more, or -1 for all.")
    return ngpus


# -------------------------------------------------------------------------------------------------- rendezvous


def end_with_launcher() -> None:
    """Let this process end with the one that started it, if that is another process of the run, or torchrun's agent.

    Processes that a user has started one by one do not depend on the shell in which that was.

    Raises:
        PeerError: If the process that started this one as a further process of its run has ended in the meantime.
    """
    launcher = os.environ.get(_LAUNCHER)
    if "TORCHELASTIC_RUN_ID" in os.environ or launcher == str(os.getppid()):
        end_with_parent()
    elif launcher not in (None, str(os.getpid())) and os.environ.get("LOCAL_RANK", "0") != "0":
        raise PeerError(f"Process {launcher}, which started this one as part of its run, has ended.")


def choose_strategy(world: World, facts: Mapping[str, Any]) -> Strategy | str:
    """One process needs no strategy; several share gradients, and wait a bounded time for each other.

    Args:
        world: The processes.
        facts: What has to be the same in all of them, by the name to show, see :class:`BoundedDDPStrategy`.
    """
    if world.devices * world.num_nodes == 1:
        return "auto"
    if launched_world() is None:
        os.environ[_LAUNCHER] = str(os.getpid())  # for processes that Lightning starts
    return BoundedDDPStrategy(rendezvous_seconds(), facts)


class BoundedDDPStrategy(DDPStrategy):
    """Data-parallel training whose processes run the same settings, wait a bounded time, and say for whom.

    Args:
        wait: Seconds to wait for the other processes, at the start and at any later step.
        facts: What has to be the same in all processes; values that JSON can hold.
    """

    def __init__(self, wait: float, facts: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wait = wait
        self.facts = dict(facts or {})
        self.beat: _Heartbeat | None = None

    def setup_environment(self) -> None:
        """Meet the other processes, then let Lightning go on.

        Raises:
            ConfigError: If they do not come, or run something else.
        """
        if not torch.distributed.is_initialized():
            self._meet()
        super().setup_environment()

    def _meet(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        self.set_world_ranks()
        rank, size = environment.global_rank(), environment.world_size()
        address, port = environment.main_address, environment.main_port
        os.environ.update(MASTER_ADDR=str(address), MASTER_PORT=str(port))
        backend = "nccl" if self.root_device.type == "cuda" else "gloo"
        # under torchrun its agent serves the store
        is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        prefix = f"torchmdnet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        began = time.monotonic()
        until = began + self.wait

        def connect(serve: bool) -> Any:
            wait = timedelta(seconds=max(0.5, until - time.monotonic()))
            if not serve:
                _find_listener(str(address), int(port), until)
            store = TCPStore(address, port, None, serve, wait, wait_for_workers=False)
            store.set_timeout(wait)
            return PrefixStore(prefix, store)

        try:
            store = _bounded(lambda: connect(rank == 0 and not is_served), until, _NO_RUN)
            facts = {"number of processes": size, **self.facts}
            _bounded(lambda: _agree(store, rank, size, facts, until), until + 15, _NO_ANSWER)
            until = max(until, time.monotonic() + 10)
            _bounded(
                lambda: torch.distributed.init_process_group(
                    backend,
                    store=PrefixStore("group", store),
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=self.wait),
                ),
                until,
                _NO_ANSWER,
            )
            self.beat = _Heartbeat(_bounded(lambda: connect(False), until, _NO_ANSWER), rank, size)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            reason, waited = _reason(error), time.monotonic() - began
            if rank == 0 and reason and waited < 1:  # no other was waited for
                told = f"MASTER_PORT: process 0 of {size} cannot open port {port} of {address}"
            else:
                role = f"waited for the other {size - 1}" if rank == 0 else "could not reach process 0"
                told = f"Process {rank} of {size} {role} at {address}:{port} for {waited:.0f} s"
            raise ConfigError(f"{told}{reason}. {_ADVICE}") from error

    def explained(self, error: BaseException) -> BaseException:
        """A :class:`~torchmdnet.errors.PeerError` with the missing processes if ``error`` comes from a lost connection.

        Any other error is returned as it is.
        """
        if self.beat is None or not _is_connection_error(error):
            return error
        beat, after = self.beat, time.monotonic() - self.beat.began
        missing = beat.missing()
        who = (
            f"process {', '.join(map(str, missing))} is gone or has stopped"
            if missing
            else f"a message did not arrive within {self.wait:g} s, although all still answer"
        )
        return PeerError(
            f"Process {beat.rank} of {beat.size} lost its connection to the others {after:.0f} s after the start of "
            f"training: {who}. Processes wait {self.wait:g} s for each other."
        )

    def teardown(self) -> None:
        """Stop the signs of life."""
        if self.beat is not None:
            self.beat.stop()
        super().teardown()


#: What may be wrong where an answer does not come.
_NO_RUN = "something answers there, but it is no run of torchmd-train"
_NOBODY = "nothing listens there: process 0 has not started, or has ended"
_NO_ANSWER = "it has stopped, or ended, while the processes were meeting"

#: What libraries say of a port or an address, and what to say of it.
_REASONS = {
    "in use": "another program holds the port",
    "eaddrinuse": "another program holds the port",
    "permission denied": "ports below 1024 are not open to users",
    "resolve": "the address is not known",
    "not known": "the address is not known",
}

_ADVICE = (
    "Start the same command on every node, with the same MASTER_ADDR (node 0), MASTER_PORT (free and open there) and "
    "--num-nodes, and with NODE_RANK 0, 1, ...; srun and torchrun set these. TORCHMDNET_RENDEZVOUS_TIMEOUT sets the "
    "wait in seconds."
)


def _agree(store: Any, rank: int, size: int, facts: Mapping[str, Any], until: float) -> None:
    """Compare what every process is about to run; process 0 collects, and tells all of them the result.

    Raises:
        ConfigError: In all processes, if one does not come or has other settings.
    """
    if store.add(f"arrivals/{rank}", 1) > 1:
        raise ConfigError(f"Two processes say that they are process {rank} of {size}. {_ADVICE}")
    mine = json.dumps(facts, sort_keys=True, default=str)
    store.set(f"facts/{rank}", mine)
    if rank == 0:
        problem = _problem(store, size, json.loads(mine), until)
        store.set("verdict", json.dumps({"problem": problem, "facts": json.loads(mine)}))
        if problem:
            with contextlib.suppress(TimeoutError):  # process 0 serves the store until all have read it
                _wait_for(lambda: store.add("informed", 0) >= size - 1, time.monotonic() + 5)
            raise ConfigError(problem)
        return
    _wait_for(lambda: store.check(["verdict"]), until + 10)
    verdict = json.loads(store.get("verdict"))
    store.add("informed", 1)
    problem = verdict["problem"] or _difference(verdict["facts"], json.loads(mine), rank)
    if problem:
        raise ConfigError(problem)


def _problem(store: Any, size: int, facts: Mapping[str, Any], until: float) -> str:
    """What keeps the processes from running together, or nothing."""
    waiting = set(range(1, size))

    def all_came() -> bool:
        waiting.difference_update([r for r in waiting if store.check([f"facts/{r}"])])
        return not waiting

    try:
        _wait_for(all_came, until)
    except TimeoutError:
        who = ", ".join(map(str, sorted(waiting)))
        return f"Process 0 of {size} waited for the other {size - 1}, but process {who} did not come. {_ADVICE}"
    return next(filter(None, (_difference(facts, json.loads(store.get(f"facts/{r}")), r) for r in range(1, size))), "")


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    names = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    if not names:
        return ""
    words = "; ".join(f"{key}: {first.get(key)!r} in process 0, {other.get(key)!r} in process {rank}" for key in names)
    return f"The processes of this run do not have the same settings. {words}. Start the same command on every node."


def _wait_for(is_true: Callable[[], bool], until: float) -> None:
    while not is_true():
        if time.monotonic() > until:
            raise TimeoutError("time is up")
        time.sleep(0.05)


def _bounded(call: Callable[[], _T], until: float, told: str) -> _T:
    """The result of a call that may wait for longer than it was told to; the thread it hangs in is left behind.

    Raises:
        TimeoutError: With ``told``, if there is no result a second after ``until``.
    """
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((call(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, until - time.monotonic()) + 1)
    if not result:
        raise TimeoutError(told)
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _find_listener(address: str, port: int, until: float) -> None:
    """Wait until something listens, for a store that finds nothing can end the process when it gives up.

    Raises:
        TimeoutError: If nothing does by then; the reason is what the system says of the last attempt.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.5, until - time.monotonic())).close()
            return
        except socket.gaierror:
            raise
        except OSError as error:
            if time.monotonic() >= until:
                raise TimeoutError(_NOBODY) from error
            time.sleep(0.1)


# --------------------------------------------------------------------------------------------------- lost peers


class _Heartbeat:
    """Signs of life of every process, by which the others tell who is missing."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.began = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                with self._lock:
                    self.store.add(f"beats/{self.rank}", 1)
            except Exception:  # process 0 and its store are gone
                return

    def _counts(self) -> list[int]:
        with self._lock:
            return [self.store.add(f"beats/{rank}", 0) for rank in range(self.size)]

    def _counts_after(self, seconds: float) -> list[int]:
        time.sleep(seconds)
        return _bounded(self._counts, time.monotonic() + 4 * BEAT_SECONDS, _NO_ANSWER)

    def missing(self) -> list[int]:
        """Processes without a sign of life for some seconds. Process 0 answers for a while longer, for the others."""
        try:
            before, after = (self._counts_after(seconds) for seconds in (0, 4 * BEAT_SECONDS))
        except Exception:  # process 0, which holds the counts, has ended, or does not answer because it has stopped
            return [0]
        silent = [rank for rank in range(self.size) if before[rank] == after[rank] and rank != self.rank]
        if self.rank == 0 and len(silent) < self.size - 1:
            time.sleep(4 * BEAT_SECONDS)
        return silent

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


def _is_connection_error(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _reason(error: BaseException) -> str:
    """What went wrong, in brackets, where that is known here; the library's own words are in the traceback alone."""
    text = str(error)
    if text in (_NO_RUN, _NOBODY, _NO_ANSWER):
        return f" ({text})"
    known = (word for sign, word in _REASONS.items() if sign in text.lower())
    return f" ({word})" if (word := next(known, "")) else ""
