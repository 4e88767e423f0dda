"""A bad word of a launcher is told before anything is made."""

import pytest

from torchmdnet.config.launcher import check_launcher
from torchmdnet.errors import ConfigError
from torchmdnet.scripts.train import main

NAMES = ("NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
         "SLURM_NTASKS", "SLURM_NNODES", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


BAD = {"abc", "", "-1", "1.5", "²"}


@pytest.mark.parametrize("value", sorted(BAD))
@pytest.mark.parametrize("name", ["NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS"])
def test_a_number_that_is_none_is_refused_by_name(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}: {value!r} in the environment is no whole number"):
        check_launcher(1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("MASTER_PORT", value) for value in sorted(BAD | {"0", "99999"})],
        *[("MASTER_ADDR", value) for value in ("", "nowhere.invalid", "a b", "x" * 70)],
        ("NODE_RANK", "2"),
        ("NODE_RANK", "99999"),
        ("NODE_RANK", "abc"),
    ],
)
def test_a_place_where_nodes_cannot_meet_is_refused_before_anything_is_made(name, value, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MASTER_PORT", "12910")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["--dataset", "TinyQM", "--num-nodes", "2", "--log-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert f"error: {name}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nodes_need_a_port_and_one_process_needs_nothing(monkeypatch):
    check_launcher(1)
    with pytest.raises(ConfigError, match="MASTER_PORT: not set, but num_nodes is 2"):
        check_launcher(2)
    monkeypatch.setenv("MASTER_PORT", "12910")
    check_launcher(2)
    monkeypatch.setenv("NODE_RANK", "1")
    check_launcher(2)
