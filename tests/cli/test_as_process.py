"""``mta`` as a process: pipes, signals, and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mta.cli import main


def test_a_pipe_is_read_once(tmp_path):
    """A file can be opened several times, a pipe cannot."""
    rows = [json.dumps({"person": f"p{n}", "input": "x" * 5000, "output": str(n)}) for n in range(500)]
    os.mkfifo(tmp_path / "pipe")
    words = [sys.executable, "-m", "mta", "data", "describe", str(tmp_path / "pipe"), "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "pipe", "w") as pipe:
        pipe.write("\n".join(rows))
    out, err = process.communicate(timeout=600)
    assert (process.returncode, json.loads(out)["people"]) == (0, 500), err


def test_a_terminal_that_cannot_show_a_character_shows_its_number(tmp_path):
    form = 'item: {prompt: "{text}", target: mood}\ntext: "{text}"\n'
    (tmp_path / "mood.yaml").write_text(f'name: mood\nversion: 1\nmetric: accuracy\n{form}labels: ["😀", "★"]\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"person": "ann", "text": "Fine.", "mood": "😀"}))
    words = [sys.executable, "-m", "mta", "data", "describe", "a.jsonl", "--task", "mood.yaml"]
    how = {"env": os.environ | {"PYTHONIOENCODING": "latin-1"}, "capture_output": True, "cwd": tmp_path, "check": True}
    assert b"labels: \\U0001f600 100.0%  \\u2605 0.0%" in subprocess.run(words, **how).stdout


def test_no_text_stays_behind_when_a_process_is_terminated(tmp_path):
    words = [sys.executable, "-m", "mta", "data", "describe", "-"]
    where = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env=where, stderr=subprocess.PIPE, text=True)
    while not any(path.name == "stdin" for path in tmp_path.rglob("*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert not any(tmp_path.iterdir())


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
    assert (ended.value.code, said[0].startswith("out of memory: "), "memory=" in said[1], len(said)) == (
        1,
        True,
        True,
        2,
    )


def test_ctrl_c_says_that_nothing_is_lost(tmp_path):
    os.mkfifo(tmp_path / "slow.jsonl")  # reading waits for a writer
    words = [sys.executable, "-m", "mta", "data", "describe", str(tmp_path / "slow.jsonl")]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )
    with (tmp_path / "slow.jsonl").open("w"):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate()  # the closed pipe ends a read that began just after the signal
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "Interrupted. Nothing is half written; repeat the command."


def test_a_mistake_in_a_real_process_exits_with_1_and_without_a_traceback(tmp_path):
    words = ["data", "describe", str(tmp_path / "no.jsonl")]
    done = subprocess.run([sys.executable, "-m", "mta", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("DataError: no such file: ")
