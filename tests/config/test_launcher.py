"""A bad word of a launcher is told before anything is made."""

import pytest

from torchmdnet.config.launcher import check_environment, check_launcher, check_places
from torchmdnet.errors import ConfigError
from torchmdnet.scripts.train import main

NAMES = ("NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
         "SLURM_NTASKS", "SLURM_NNODES", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT",
         "TORCHMDNET_RENDEZVOUS_TIMEOUT")  # fmt: skip


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
        *[("MASTER_PORT", value) for value in sorted(BAD | {"0", "99999", "9" * 5000})],
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "2"),
     ("NODE_RANK", "1"), ("GROUP_RANK", "3"), ("SLURM_PROCID", "2")],
)  # fmt: skip
def test_a_place_that_the_settings_do_not_have_is_refused(name, value, monkeypatch):
    check_places(1, 1)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{name}: {value} in the environment.*ask for 1 process \(ngpus 1"):
        check_places(1, 1)


def test_places_that_fit_are_taken(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "NODE_RANK": "1", "LOCAL_RANK": "1", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    check_places(2, 2)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match=r"RANK: 2 in the environment.*4 processes \(ngpus 2, num_nodes 2\); 3 would"):
        check_places(2, 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TORCHMDNET_RENDEZVOUS_TIMEOUT", "abc", "no number of seconds"),
        ("TORCHMDNET_RENDEZVOUS_TIMEOUT", "-1", "no number of seconds"),
        ("TORCHMDNET_RENDEZVOUS_TIMEOUT", "0", "no number of seconds"),
        ("TORCHMDNET_RENDEZVOUS_TIMEOUT", "nan", "no number of seconds"),
        ("TORCHMDNET_RENDEZVOUS_TIMEOUT", "1e9", "no number of seconds"),
        ("MASTER_PORT", "abc", "is no port"),
        ("MASTER_PORT", "0", "is no port"),
        ("MASTER_PORT", "99999", "is no port"),
        ("WORLD_SIZE", "9" * 5000, "no whole number"),
        ("WORLD_SIZE", "2", "ask for 1 process"),
    ],
)
def test_the_environment_is_looked_at_before_anything_is_made(name, value, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["--dataset", "TinyQM", "--ngpus", "1", "--log-dir", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"error: {name}: " in told
    assert words in told
    assert not (tmp_path / "run").exists()


def test_names_that_are_nearly_ours_are_told(monkeypatch, caplog):
    monkeypatch.setenv("TORCHMDNET_RENDEZVOUS_TIME", "5")
    check_environment()
    assert "TORCHMDNET_RENDEZVOUS_TIME in the environment is not read" in caplog.text
    assert "Did you mean 'TORCHMDNET_RENDEZVOUS_TIMEOUT'" in caplog.text
