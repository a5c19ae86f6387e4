"""The three scripts and the command, run in the process of a test, which has imported torch."""

import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from dynsize import __main__ as command

ROOT = Path(__file__).parents[1]
# the global names of each
SCRIPTS = {
    name: runpy.run_path(str(ROOT / name))["main"].__globals__
    for name in ("train.py", "prune.py", "evaluate.py")
}
SCRIPTS["dynsize"] = vars(command)
SCRIPTS["train.py"]["draw"] = lambda folder: None  # pictures are for tests/test_plots.py
TINY = (
    "--sample-rate 8000 --mel-bins 12 --hop-ms 10 --highest-hz 3900 --vocabulary 12 --blocks 2 "
    "--width 16 --attention-heads 2 --kernel 3 --front-end-channels 4 4 --sizes 3 5 8 "
    "--updates 12 --batch-seconds 5 --log-every 4 --validate-every 6 --save-every 6 "
    "--precision float32 --device cpu"
).split()


class Stream(StringIO):
    """What was written to a stream."""

    encoding = "utf-8"


def run(script: str, *arguments: object, cwd: str | Path = ".") -> subprocess.CompletedProcess:
    """Return the exit code and the output of a script."""
    out, err = Stream(), Stream()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            SCRIPTS[script]["main"]()
        except SystemExit as stop:
            code = stop.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def done_well(*command: object, cwd: str | Path = ".") -> subprocess.CompletedProcess:
    """Run a script that should end well; return its output."""
    done = run(*command, cwd=cwd)
    assert not done.returncode, done.stderr
    return done


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(script: str, *arguments: object, cwd: Path) -> str:
    """Run a script that refuses its arguments and changes nothing; return its one line."""
    before = sorted((path, path.lstat().st_mtime_ns) for path in cwd.rglob("*"))
    done = run(script, *arguments, cwd=cwd)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: "), done.stderr
    assert sorted((path, path.lstat().st_mtime_ns) for path in cwd.rglob("*")) == before
    return done.stderr
