"""The package beside another one that is called `kernels`, as pip installs them."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THEIRS = 'from setuptools import setup\nsetup(name="kernels", version="1", packages=["kernels"])\n'
LOOK = """
import kernels, dynsize.kernels, dynsize.config
print(kernels.WHOSE, hasattr(dynsize.kernels, "triton_runs"), dynsize.__file__, kernels.__file__)
"""


def called(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command that sees no package of the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def sources(tmp_path) -> Path:
    """A folder with our sources in `ours`, and those of the other package in `theirs`."""
    for name in ("dynsize", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "ours" / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", tmp_path / "ours")
    (tmp_path / "theirs" / "kernels").mkdir(parents=True)
    (tmp_path / "theirs" / "setup.py").write_text(THEIRS)
    (tmp_path / "theirs" / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    return tmp_path


@pytest.mark.parametrize("paths", [["./theirs", "./ours"], ["./theirs", "-e", "./ours"]])
def test_both_packages_work_after_both_are_installed(sources, paths):
    called(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=sources)
    python = sources / "venv" / "bin" / "python"
    (packages,) = (sources / "venv").glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, setuptools
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *flags]
    called(*pip, *paths, cwd=sources)
    whose, ours, file, other = called(python, "-c", LOOK, cwd=sources / "venv").split()
    assert (whose, ours) == ("theirs", "True")
    home = sources / "ours" if "-e" in paths else sources / "venv"
    assert Path(file).is_relative_to(home) and Path(other).is_relative_to(packages)
