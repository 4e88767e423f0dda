"""A file under its final name is complete and right, whatever the network, the server or the disk did."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from file_server import serve

from torchmdnet.datasets import download
from torchmdnet.datasets.download import Remote, fetch, unpack, verify
from torchmdnet.errors import DataError

CONTENT = bytes(range(256)) * 5000


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "RETRIES", 3)
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.delenv("TORCHMDNET_MIRROR", raising=False)


@pytest.fixture
def publisher():
    with serve() as it:
        it.files["data.h5"] = CONTENT
        yield it


def remote(publisher, checksum: str | None = None) -> Remote:
    return Remote("sub/data.h5", (f"{publisher.address}/data.h5",), checksum)


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content).hexdigest()


def names(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_download_is_complete_and_its_checksum_is_noted(publisher, tmp_path):
    path = fetch(remote(publisher), tmp_path, what="Set")
    assert path == tmp_path / "sub" / "data.h5"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == {"data.h5", "data.h5.sha256"}
    assert (tmp_path / "sub/data.h5.sha256").read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}  data.h5\n"


def test_a_file_that_is_there_is_not_fetched_again(publisher, tmp_path):
    for _ in range(2):
        fetch(remote(publisher), tmp_path, what="Set")
    assert len(publisher.requests) == 1


@pytest.mark.parametrize("fault", ["truncate", "stall", "reset", "abort", "unsized", "redirect", 408, 429, 500, 503])
def test_passing_faults_are_survived(publisher, tmp_path, fault):
    publisher.faults = [fault]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT


def test_an_interrupted_download_goes_on_where_it_stopped(publisher, tmp_path):
    publisher.faults = ["truncate"]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert [span for _, span in publisher.requests] == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_reset_in_the_middle_costs_only_the_rest(publisher, tmp_path):
    publisher.faults = ["abort"]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert [span for _, span in publisher.requests] == [None, f"bytes={len(CONTENT) // 2}-"]


def test_the_rest_is_asked_for_behind_a_redirect_too(publisher, tmp_path):
    publisher.faults = ["redirect", "truncate", "redirect"]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert [span for _, span in publisher.requests[-2:]] == [f"bytes={len(CONTENT) // 2}-"] * 2


def test_a_run_that_was_killed_is_taken_up_by_the_next(publisher, tmp_path):
    publisher.faults = ["stall"]
    script = (
        "import sys; from torchmdnet.datasets.download import Remote, fetch;"
        "fetch(Remote('sub/data.h5', (sys.argv[1],)), sys.argv[2], what='Set')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, f"{publisher.address}/data.h5", str(tmp_path)])
    part, deadline = tmp_path / "sub" / "data.h5.part", time.monotonic() + 60
    while not part.exists() or part.stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    size = part.stat().st_size
    publisher.requests.clear()
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert publisher.requests == [("/data.h5", f"bytes={size}-")]
    assert names(tmp_path) == {"data.h5", "data.h5.sha256"}


def test_a_later_run_goes_on_where_an_earlier_one_stopped(publisher, tmp_path):
    publisher.faults = ["truncate", 500, 500, 500]
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert "data.h5" not in names(tmp_path)
    publisher.requests.clear()
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert publisher.requests == [("/data.h5", f"bytes={len(CONTENT) // 2}-")]


def test_a_start_from_another_version_of_the_file_is_not_used(publisher, tmp_path):
    publisher.faults = ["truncate", 500, 500, 500]
    with pytest.raises(DataError):
        fetch(remote(publisher), tmp_path, what="Set")
    publisher.files["data.h5"], publisher.etag = CONTENT[::-1], '"two"'
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("validator", ["etag", "modified", "deaf"])
def test_a_file_that_changes_between_two_attempts_is_fetched_from_its_start(
    publisher, tmp_path, monkeypatch, validator
):
    if validator == "modified":
        publisher.etag, publisher.modified = None, "Wed, 21 Oct 2015 07:28:00 GMT"
    publisher.faults = ["truncate", "deaf" if validator == "deaf" else 500]

    def change(_: float) -> None:
        publisher.files["data.h5"] = CONTENT[::-1]
        publisher.etag, publisher.modified = (None, "later") if publisher.modified else ('"two"', None)

    monkeypatch.setattr(download.time, "sleep", change)
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT[::-1]


def test_without_a_checksum_nor_a_version_every_attempt_starts_anew(publisher, tmp_path):
    publisher.etag, publisher.faults = None, ["truncate"]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert [span for _, span in publisher.requests] == [None, None]


def test_a_checksum_makes_up_for_a_server_that_states_no_version(publisher, tmp_path):
    publisher.etag, publisher.faults = None, ["truncate"]
    assert fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set").read_bytes() == CONTENT
    assert [span for _, span in publisher.requests] == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_mixture_of_two_versions_is_seen_by_the_checksum_and_fetched_anew(publisher, tmp_path, monkeypatch):
    publisher.etag, publisher.faults = None, ["truncate"]
    publisher.files["data.h5"] = CONTENT[::-1]
    monkeypatch.setattr(download.time, "sleep", lambda _: publisher.files.update({"data.h5": CONTENT}))
    assert fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set").read_bytes() == CONTENT


def test_a_length_that_is_too_long_is_never_taken_for_a_complete_file(publisher, tmp_path):
    publisher.faults = ["longer"] * 20
    with pytest.raises(DataError, match="closed early"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert "data.h5" not in names(tmp_path)


def test_a_length_that_is_too_short_is_seen_by_the_checksum(publisher, tmp_path):
    publisher.faults = ["shorter"] * 20
    with pytest.raises(DataError, match="wrong checksum"):
        fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set")
    assert names(tmp_path) == set()


def test_an_empty_answer_is_not_taken_for_the_file(publisher, tmp_path):
    publisher.faults = ["empty"]
    with pytest.raises(DataError, match="sends an empty file"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert names(tmp_path) == set()
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT


def test_a_bar_shows_how_much_of_how_much_has_come(publisher, tmp_path, monkeypatch):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def close(self) -> None:
            bars.append((self.n, self.total, self.desc))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", lambda **options: Bar(**{**options, "disable": False, "file": io.StringIO()}))
    publisher.faults = ["truncate"]
    fetch(remote(publisher), tmp_path, what="Set")
    assert bars[0][:2] == (len(CONTENT), len(CONTENT))
    assert "Set: data.h5" in bars[0][2]


def test_a_web_page_is_not_taken_for_the_file(publisher, tmp_path):
    publisher.kind = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="sends a web page instead of the file"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert names(tmp_path) == set()


def test_a_file_that_proves_unreadable_does_not_stand_in_the_way_of_the_right_one(publisher, tmp_path):
    publisher.files["data.h5"] = b"not an archive"
    archive = fetch(remote(publisher), tmp_path, what="Set")
    with pytest.raises(DataError, match="Delete it to fetch it again"):
        unpack(archive, tmp_path, ["x"], what="Set")
    archive.unlink()
    publisher.files["data.h5"] = CONTENT
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_still_delivers(publisher, tmp_path):
    publisher.resumes, publisher.faults = False, ["truncate"]
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_missing_file_is_reported_at_once_with_what_to_do(publisher, tmp_path, status):
    publisher.faults = [status]
    with pytest.raises(DataError, match=str(status)) as caught:
        fetch(remote(publisher), tmp_path, what="Set")
    assert len(publisher.requests) == 1
    assert f"{publisher.address}/data.h5" in str(caught.value)
    assert str(tmp_path / "sub" / "data.h5") in str(caught.value)
    assert "mirror=" in str(caught.value)


@pytest.mark.parametrize(("fault", "word"), [(500, "500"), ("reset", "closed early"), ("stall", "no data for")])
def test_a_lasting_fault_gives_up_and_leaves_nothing_under_the_name(publisher, tmp_path, fault, word):
    publisher.files["data.h5"] = b"x"
    publisher.faults = [fault] * 10
    with pytest.raises(DataError, match=word):
        fetch(remote(publisher), tmp_path, what="Set")
    assert "data.h5" not in names(tmp_path)
    assert len(publisher.requests) == 3


def test_no_connection_is_reported_with_address_and_place(tmp_path):
    with serve() as gone:
        address = gone.address
    with pytest.raises(DataError, match="refused") as caught:
        fetch(Remote("data.h5", (f"{address}/data.h5",)), tmp_path, what="Set")
    assert str(caught.value).startswith(f"Set: data.h5 cannot be fetched from {address}/data.h5")


def test_a_host_that_does_not_exist_is_reported_with_address_and_place(tmp_path):
    with pytest.raises(DataError, match=r"http://nowhere.invalid/data.h5 \(.*put it at .*data.h5, or name") as caught:
        fetch(Remote("data.h5", ("http://nowhere.invalid/data.h5",)), tmp_path, what="Set")
    assert str(tmp_path / "data.h5") in str(caught.value)


def test_a_wrong_checksum_leaves_nothing_behind_each_time(publisher, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"wrong checksum: MD5 \w+ instead of 0123. Nothing was kept"):
            fetch(remote(publisher, "md5:0123"), tmp_path, what="Set")
        assert names(tmp_path) == set()


def test_a_right_checksum_passes(publisher, tmp_path):
    fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set")


def test_a_damaged_start_is_replaced_when_the_checksum_shows_it(publisher, tmp_path):
    publisher.faults = ["truncate", 500, 500, 500]
    with pytest.raises(DataError):
        fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set")
    part = tmp_path / "sub" / "data.h5.part"
    part.write_bytes(b"?" * part.stat().st_size)
    assert fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set").read_bytes() == CONTENT


def test_the_second_address_helps_when_the_first_fails(publisher, tmp_path):
    addresses = (f"{publisher.address}/gone.h5", f"{publisher.address}/data.h5")
    assert fetch(Remote("data.h5", addresses), tmp_path, what="Set").read_bytes() == CONTENT


def test_a_file_that_changed_since_its_first_use_is_refused(publisher, tmp_path):
    path = fetch(remote(publisher), tmp_path, what="Set")
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DataError, match="has changed since it was first used"):
        fetch(remote(publisher), tmp_path, what="Set")


def test_another_file_than_the_one_first_used_is_refused(publisher, tmp_path):
    fetch(remote(publisher), tmp_path, what="Set").unlink()
    publisher.files["data.h5"] = CONTENT[::-1]
    with pytest.raises(DataError, match="is not the file that was used first"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert names(tmp_path) == {"data.h5.sha256"}


def test_a_file_put_there_by_hand_is_used_with_a_warning(publisher, tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/data.h5").write_bytes(b"an excerpt")
    with caplog.at_level(logging.WARNING):
        fetch(remote(publisher, md5(CONTENT)), tmp_path, what="Set")
    assert "is not the file that was published" in caplog.text
    assert publisher.requests == []


def test_verify_states_the_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert verify(path, what="Set") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("kind", ["folder", "file", "address", "environment"])
def test_a_mirror_replaces_the_publisher(publisher, tmp_path, monkeypatch, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data.h5").write_bytes(CONTENT)
    mirror = {"folder": str(elsewhere), "file": str(elsewhere / "data.h5"), "address": publisher.address}.get(kind)
    if kind == "environment":
        monkeypatch.setenv("TORCHMDNET_MIRROR", str(elsewhere))
    unreachable = Remote("sub/data.h5", ("https://example.invalid/data.h5",), md5(CONTENT))
    path = fetch(unreachable, tmp_path / "raw", what="Set", mirror=mirror)
    assert path.read_bytes() == CONTENT
    assert (elsewhere / "data.h5").read_bytes() == CONTENT


def test_a_mirror_with_the_wrong_file_is_refused(tmp_path):
    (tmp_path / "data.h5").write_bytes(b"wrong")
    with pytest.raises(DataError, match="wrong checksum"):
        fetch(
            Remote("x/data.h5", ("https://example.invalid",), md5(CONTENT)), tmp_path, what="Set", mirror=str(tmp_path)
        )
    assert not (tmp_path / "x" / "data.h5").exists()


def test_too_small_a_disk_is_noticed_before_the_download(publisher, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"disk of .* is full"):
        fetch(remote(publisher), tmp_path, what="Set")
    assert "data.h5" not in names(tmp_path)


def test_a_disk_that_fills_up_keeps_what_came_and_goes_on_later(publisher, tmp_path, monkeypatch):
    real = download.os.fsync

    def full(descriptor: int) -> None:
        download.os.ftruncate(descriptor, 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(DataError, match=r"disk of .* is full"):
        fetch(remote(publisher), tmp_path, what="Set")
    monkeypatch.setattr(download.os, "fsync", real)
    publisher.requests.clear()
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert publisher.requests == [("/data.h5", "bytes=1000-")]


def test_a_file_that_cannot_grow_keeps_what_came_and_goes_on_later(publisher, tmp_path):
    script = (
        "import resource, sys; from torchmdnet.datasets.download import Remote, fetch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "fetch(Remote('sub/data.h5', (sys.argv[1],)), sys.argv[2], what='Set')"
    )
    command = [sys.executable, "-c", script, f"{publisher.address}/data.h5", str(tmp_path)]
    end = subprocess.run(command, capture_output=True, text=True)
    assert "is full, or takes no file so large. Free some space and run again" in end.stderr
    assert (tmp_path / "sub" / "data.h5.part").stat().st_size == 100_000
    publisher.requests.clear()
    assert fetch(remote(publisher), tmp_path, what="Set").read_bytes() == CONTENT
    assert publisher.requests == [("/data.h5", "bytes=100000-")]


def test_a_disk_that_fills_up_while_unpacking_is_told_and_leaves_no_half_file(tmp_path, monkeypatch):
    archive = tmp_path / "a.tar.gz"
    make_tar(archive, {"good": b"1" * 1000})

    def full(source, target, size):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(DataError, match=r"disk of .* is full"):
        unpack(archive, tmp_path / "out", ["good"], what="Set")
    assert names(tmp_path) == {"a.tar.gz"}


def test_two_processes_fetch_once(publisher, tmp_path):
    script = (
        "import sys; from torchmdnet.datasets.download import Remote, fetch;"
        "fetch(Remote('data.h5', (sys.argv[1],)), sys.argv[2], what='Set')"
    )
    command = [sys.executable, "-c", script, f"{publisher.address}/data.h5", str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert len(publisher.requests) == 1
    assert (tmp_path / "data.h5").read_bytes() == CONTENT


# ------------------------------------------------------------------------------------------------------------ archives


def make_tar(path, members: dict[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["w:gz", "w:bz2", "w", "zip"])
def test_the_files_wanted_are_unpacked(tmp_path, kind):
    archive = tmp_path / "archive"
    members = {"./a/one.h5": b"1", "two.txt": b"2", "three": b"3"}
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        make_tar(archive, members, kind)
    unpack(archive, tmp_path / "out", ["a/one.h5", "three"], what="Set")
    assert names(tmp_path / "out") == {"one.h5", "three"}
    assert (tmp_path / "out/a/one.h5").read_bytes() == b"1"


def test_folders_at_the_front_of_a_name_may_differ(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    make_tar(archive, {"version 2/a/one.h5": b"1", "two.h5": b"2", "another-two.h5": b"3"})
    unpack(archive, tmp_path / "out", ["a/one.h5", "b/two.h5"], what="Set")
    assert (tmp_path / "out/a/one.h5").read_bytes() == b"1"
    assert (tmp_path / "out/b/two.h5").read_bytes() == b"2"


def test_members_that_lead_elsewhere_are_never_written(tmp_path):
    archive = tmp_path / "evil.tar.gz"
    make_tar(archive, {"../outside": b"!", "/tmp/outside": b"!", "good": b"1"})
    unpack(archive, tmp_path / "out", ["good"], what="Set")
    assert names(tmp_path) == {"evil.tar.gz", "good"}


def test_links_in_archives_are_not_followed(tmp_path):
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as file:
        info = tarfile.TarInfo("good")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    with pytest.raises(DataError, match="does not hold good"):
        unpack(archive, tmp_path / "out", ["good"], what="Set")


def test_a_damaged_archive_is_named(tmp_path):
    archive = tmp_path / "a.tar.gz"
    make_tar(archive, {"good": bytes(range(256)) * 100})
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(DataError, match=r"a.tar.gz is damaged"):
        unpack(archive, tmp_path / "out", ["good"], what="Set")
    assert not (tmp_path / "out" / "good").exists()


def test_a_member_that_is_missing_is_named(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other", b"1")
    with pytest.raises(DataError, match="does not hold good, but other"):
        unpack(archive, tmp_path / "out", ["good"], what="Set")
