"""``mta`` as a process: signals, and exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from mta.cli import main


def test_a_terminal_that_cannot_show_a_character_shows_its_number(tmp_path):
    form = 'item: {prompt: "{text}", target: mood}\ntext: "{text}"\n'
    (tmp_path / "mood.yaml").write_text(f'name: mood\nversion: 1\nmetric: accuracy\n{form}labels: ["😀", "★"]\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"person": "ann", "text": "Fine.", "mood": "😀"}))
    words = [sys.executable, "-m", "mta", "data", "describe", "a.jsonl", "--task", "mood.yaml"]
    how = {"env": os.environ | {"PYTHONIOENCODING": "latin-1"}, "capture_output": True, "cwd": tmp_path, "check": True}
    assert b"labels: \\U0001f600 100.0%  \\u2605 0.0%" in subprocess.run(words, **how).stdout


def test_windows_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mta", "--version"])
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "mta does not run on Windows. Install and run it in WSL 2.\n")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\n…"), MemoryError()])
def test_too_little_memory_is_no_traceback(monkeypatch, capsys, error):
    def fails():
        raise error

    monkeypatch.setattr("mta.cli.app.app", fails)
    monkeypatch.setattr("mta.cli.app._prepare", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(said)) == (1, 2)
    assert said[0].startswith("out of memory: ")
    assert "memory=" in said[1]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "Interrupted. Nothing is half written; repeat the command."),
        (signal.SIGTERM, -signal.SIGTERM, ""),
    ],
)
def test_a_signal_while_people_are_read_leaves_no_file(tmp_path, number, code, said):
    program = f"""
import os, signal, sys
from mta.cli import main
from mta.data.readers import people
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
def killed(*_):
    print(*os.listdir())
    os.kill(os.getpid(), {number:d})
people.iter_parts = killed
main()
"""
    words = [sys.executable, "-c", program, "data", "describe", "a.jsonl", "--skip-bad", "bad.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (code, said)
    assert done.stdout.startswith(".bad.jsonl.")  # it was begun
    assert not any(tmp_path.iterdir())
