"""What a call would start on a GPU is counted on the CPU: operations, waits of the host, arrays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from torchmdnet.graph import build_graph
from torchmdnet.testing import tiny_model
from torchmdnet.testing.launches import counting
from torchmdnet.tracing import as_if_on, device_kind


def test_operations_count_and_views_do_not() -> None:
    x = torch.ones(4, 3)
    with counting() as counts:
        y = (x @ x.t() + 1).view(2, 8).transpose(0, 1)[1:]
        y.detach()
        torch.where(x > 0, 1.0, x)  # the number is sent with the kernel
        torch.zeros(0, 3) + 1  # nothing to do
    assert dict(counts.launches) == {"aten::mm": 1, "aten::add": 1, "aten::gt": 1, "aten::where": 1}
    assert counts.num_waits == 0
    assert "4 launches, 0 waits" in str(counts)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.unique(x),
        lambda x: torch.linalg.inv(x[:, None] * torch.eye(3)),
        lambda x: torch.equal(x, x),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_the_host_has_to_wait_for_counts(reads) -> None:
    with counting() as counts:
        reads(torch.arange(1.0, 4.0))
    assert counts.num_waits == 1


def test_what_it_need_not_wait_for_does_not() -> None:
    x, y = torch.arange(3), torch.ones(3)
    with counting() as counts:
        torch.repeat_interleave(x, torch.ones(3, dtype=torch.long), output_size=3)
        y[x] + y.index_select(0, x)
        y[y > 0] = 2.0  # is filled where the mask is
        y.to(torch.float64)
    assert counts.num_waits == 0


def test_the_largest_array_and_what_is_sent_are_found() -> None:
    with counting() as counts:
        torch.empty(10, 7, dtype=torch.float64)
        torch.tensor([1.0, 2.0])
    assert counts.largest == 560
    assert dict(counts.copies) == {"tensor": 1}


def test_triton_kernels_count_and_do_not_run() -> None:
    pytest.importorskip("triton.language")
    model = tiny_model("tensornet").eval()
    pos = torch.tensor([[0.0, 0.1, 0.2], [1.3, 0.2, -0.1], [0.2, 1.4, 0.3]], dtype=torch.float64)
    with counting() as counts:
        model(torch.ones(3, dtype=torch.long), pos)
    assert sum(name.startswith("triton::") for name in counts.launches) > 5


def test_tensors_take_the_code_of_another_device_and_its_numbers_are_the_same() -> None:
    pos = 4 * torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.ones(20, dtype=torch.long)
    here = build_graph(z, pos, cutoff_upper=3.0)
    assert device_kind(pos) == "cpu"
    with as_if_on("mps"):
        assert device_kind(pos) == device_kind(pos.device) == "mps"
        there = build_graph(z, pos, cutoff_upper=3.0)
    assert device_kind(pos) == "cpu"
    assert there.guard is not None  # no value was looked at
    torch.testing.assert_close(there.edge_dist.sort().values, here.edge_dist.sort().values)


def test_the_benchmark_prints_and_writes_what_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton.language")
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import launches

    path = tmp_path / "counts.json"
    monkeypatch.setitem(
        launches.OPTIONS, "tensornet", {**launches.OPTIONS["tensornet"], "embedding_dimension": 8, "num_layers": 1}
    )
    monkeypatch.setattr(sys, "argv", ["launches.py", "--only", "22 atoms, open, captured", "--json", str(path)])
    launches.main()
    (row,) = json.loads(path.read_text()).values()
    printed = capsys.readouterr().out.splitlines()[1]
    assert str(sum(row["launches"].values())) in printed
    assert row["waits"] == {}
