"""The three scripts, run in the process of a test, which has imported torch already."""

import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    name: runpy.run_path(str(ROOT / name)) for name in ("train.py", "prune.py", "evaluate.py")
}
TINY = (
    "--sample-rate 8000 --mel-bins 12 --hop-ms 10 --highest-hz 3900 --vocabulary 12 --blocks 2 "
    "--width 16 --attention-heads 2 --kernel 3 --front-end-channels 4 4 --sizes 3 5 8 "
    "--updates 12 --batch-seconds 5 --log-every 4 --validate-every 6 --save-every 6 "
    "--precision float32 --device cpu"
).split()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Trainings of a module that imports this draw none: tests/test_plots.py looks at them."""
    monkeypatch.setitem(SCRIPTS["train.py"]["main"].__globals__, "draw", lambda folder: None)


class Terminal(StringIO):
    """What was written to a stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def says(script: str, *arguments: object) -> tuple[int, str, str]:
    """Return the exit code, the output and the errors of a script that runs here."""
    done = run(script, *map(str, arguments))
    return done.returncode, done.stdout, done.stderr


def run(
    script: str, *arguments: str | Path, cwd: str | Path = ".", terminal: bool = False
) -> subprocess.CompletedProcess:
    """Return the exit code and the output of a script; `terminal`: as on one."""
    stream = Terminal if terminal else StringIO
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(stream()) as out,
        redirect_stderr(stream()) as err,
    ):
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


def refused(script: str, *arguments: str | Path, cwd: Path) -> str:
    """Run a script that refuses its arguments and changes nothing; return its one line."""
    before = sorted((path, path.stat().st_mtime_ns) for path in cwd.rglob("*"))
    done = run(script, *arguments, cwd=cwd)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: "), done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in cwd.rglob("*")) == before
    return done.stderr
