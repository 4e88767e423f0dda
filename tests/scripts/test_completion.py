"""Completion scripts, sourced by the shells they are for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS
from torchmdnet.scripts.completion import SHELLS, main
from torchmdnet.scripts.main import COMMANDS


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    main(["bash"])
    path = tmp_path / "completion"
    path.write_text(capsys.readouterr().out)
    return path


def completed(script: Path, line: str) -> set[str]:
    """What bash offers for the last word of the line."""
    words = line.split(" ")
    code = (
        f"source {script}; COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; "
        f"_shtab_{words[0].replace('-', '_')}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    end = subprocess.run([str(shutil.which("bash")), "-c", code], capture_output=True, text=True, cwd=script.parent)
    assert not end.stderr
    return set(end.stdout.split())


def test_commands_flags_values_and_files_are_completed(script: Path) -> None:
    (script.parent / "model.ckpt").touch()
    assert completed(script, "torchmd-net ") >= set(COMMANDS)
    assert completed(script, "torchmd-net be") == {"bench"}
    assert completed(script, "torchmd-net bench --dev") == {"--device"}
    assert completed(script, "torchmd-net bench mod") == {"model.ckpt"}
    assert completed(script, "torchmd-train --model ") == set(ARCHITECTURES)
    assert completed(script, "torchmd-train --precision ") == {"32", "64"}
    assert completed(script, "torchmd-train --derivative f") == {"false"}
    assert completed(script, "torchmd-train --load-model mod") == {"model.ckpt"}
    assert completed(script, "torchmd-train --") >= {option.flag for option in OPTIONS.values()}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_for_both_programs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([shell])
    printed = capsys.readouterr().out
    assert "torchmd-net" in printed
    assert "y-loss-per-atom" in printed
    program = shutil.which(shell)
    if program is not None:  # it can at least be read there
        words = [program, *(["-f"] if shell == "tcsh" else []), "-n"]
        assert subprocess.run(words, input=printed, text=True, capture_output=True).stderr == ""


def test_a_reader_that_ends_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from torchmdnet.scripts.main import main; main(['completion', 'bash'])"
    end = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert end.stderr == b""
    assert end.returncode == 128 + signal.SIGPIPE
