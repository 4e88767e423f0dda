"""Triton is tried once on each device; where it does not run, definitions do, and a warning tells why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from torchmdnet.ops import kernels
from torchmdnet.ops.kernels import triton_found

pytest.importorskip("triton.language")
CARD, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _try_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    triton_found.forget()
    yield
    triton_found.forget()


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[torch.device]:
    from torchmdnet.ops.triton import probe

    tried: list[torch.device] = []

    def fail(device: torch.device) -> None:
        tried.append(device)
        raise error

    monkeypatch.setattr(probe, "probe", fail)
    return tried


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set more."),
            "Install a C compiler (apt install gcc, conda install gcc), or name one in the variable CC.",
        ),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "another one can be named in the variable CC"),
        (RuntimeError("Quadro P2000 has compute capability 6.1, 7.0 is needed"), "Nothing can be done about it"),
        (RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version"), "Update the driver"),
    ],
)
def test_a_device_that_fails_is_told_of_once_with_what_helps(error, told, monkeypatch, caplog) -> None:
    tried = failing(monkeypatch, error)
    with caplog.at_level("WARNING"):
        assert [triton_found.has_triton(CARD) for _ in range(3)] == [False] * 3
    assert tried == [CARD]
    (record,) = caplog.records
    assert record.message.startswith(f"Triton does not run on cuda:0 ({type(error).__name__}: ")
    assert str(error).partition("\n")[0] in record.message
    assert told in record.message
    assert "\n" not in record.message


def test_missing_headers_of_python_are_named(monkeypatch, caplog, tmp_path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    failing(monkeypatch, subprocess.CalledProcessError(1, ["gcc", "main.c"]))
    assert not triton_found.has_triton(CARD)
    assert f"apt install python{sys.version_info.major}.{sys.version_info.minor}-dev" in caplog.text


def test_devices_are_tried_one_by_one(monkeypatch) -> None:
    from torchmdnet.ops.triton import probe

    tried = failing(monkeypatch, RuntimeError("no"))
    assert not triton_found.has_triton(CARD)
    monkeypatch.setattr(probe, "probe", tried.append)
    assert triton_found.has_triton(OTHER)
    assert not triton_found.has_triton(CARD)
    assert tried == [CARD, OTHER]


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch) -> None:
    tried = failing(monkeypatch, RuntimeError("no"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_found.has_triton(CARD)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not triton_found.has_triton(CARD)
    assert tried == [CARD]


def test_old_cards_are_refused_before_anything_is_compiled(monkeypatch) -> None:
    from torchmdnet.ops.triton import probe

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro P2000")
    with pytest.raises(RuntimeError, match=r"Quadro P2000 has compute capability 6.1, 7.0 is needed"):
        probe.probe(CARD)


def test_the_kernel_that_is_tried_runs_and_its_result_is_looked_at(monkeypatch) -> None:
    from torchmdnet.ops.triton import probe

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    probe.probe(device)
    assert triton_found.has_triton(device)

    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(probe, "double", Idle())
    with pytest.raises(RuntimeError, match="does not"):
        probe.probe(device)


def test_plain_operations_are_chosen_without_a_trial(monkeypatch) -> None:
    tried = failing(monkeypatch, RuntimeError("no"))
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")
    assert not triton_found.has_triton(CARD)
    assert tried == []


def test_tensors_on_a_device_that_fails_take_the_definitions(monkeypatch) -> None:
    from torchmdnet.tracing import as_if_on

    monkeypatch.setattr("torchmdnet.ops.kernels.support.has_triton", lambda device: False)
    with as_if_on("cuda"):
        assert not kernels.has_kernel(torch.zeros(2, 16))


def test_a_machine_without_a_compiler_is_recognised() -> None:
    """Triton's own message, with no compiler on the path."""
    code = (
        "from triton.runtime.build import _build\n"
        "from torchmdnet.ops.triton.probe import advice\n"
        "try:\n    _build('main', 'main.c', '.', [], [], [], [])\n"
        "except Exception as error:\n    print(advice(error))\n"
    )
    environment = {**os.environ, "PATH": "/nowhere"}
    environment.pop("CC", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("Install a C compiler"), done.stderr
