"""The three scripts as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from conftest import write_tones
from in_process import ROOT, SCRIPTS, TINY, Stream, done_well, refused, run

from dynsize import checkpoint, config, run_directory, spoken
from dynsize.algorithms import ALGORITHMS
from dynsize.subnet import cut, parameters


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory) -> Path:
    """A directory with the supernet `run` and the network of one size `full`. Not to be changed."""
    folder, command = tmp_path_factory.mktemp("work"), ["train.py", "--corpus", tones, *TINY]
    done = done_well(*command, "--run", "run", cwd=folder)
    (folder / "train.out").write_text(done.stdout)
    done_well(*command, "--run", "full", "--method", "none", cwd=folder)
    return folder


@pytest.fixture
def work(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


def test_train_leaves_and_shows_what_it_promises(trained):
    names = "config.json metrics.jsonl ranking.json left-out.txt corpus.txt lock best.pt "
    names += "checkpoint.pt checkpoint-1.pt"
    assert {path.name for path in (trained / "run").iterdir()} == {*names.split()}
    values = json.loads((trained / "run" / "config.json").read_text())
    assert values["sizes"] == [3, 5, 8] and values["updates"] == 12 and values["seed"] == 0
    shown = (trained / "train.out").read_text()
    assert "24 utterances" in shown and "0 left out" in shown
    for update in (6, 12):
        block = re.search(rf"^update {update}, word error rate on dev:\n((?:  .*\n)+)", shown, re.M)
        rows = re.findall(r"^  size +(\d+) +[\d.]+%  ([fcm.]{4} [fcm.]{4})$", block[1], re.M)
        assert [(int(size), 8 - map.count(".")) for size, map in rows] == [(8, 8), (5, 5), (3, 3)]


def test_prune_cuts_each_size(work):
    pruned = done_well("prune.py", "run", cwd=work)
    number = r"([\d,]+)"
    row = rf"^(supernet|size \d+) +(\d+) +{number} +{number} +([\d,]+|-) +([\d.]+) +(\S+)$"
    rows = re.findall(row, pruned.stdout, re.M)
    assert [row[:2] for row in rows] == [("supernet", "8"), ("size 5", "5"), ("size 3", "3")]
    for column in (2, 3):  # parameters and MACs
        numbers = [int(row[column].replace(",", "")) for row in rows]
        assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 3
    bytes_of = [f"{(work / row[6]).stat().st_size:,}" for row in rows]
    assert [row[4] for row in rows] == ["-", *bytes_of[1:]]
    assert "exists already" in refused("prune.py", "run", cwd=work)


def test_prune_by_budget_and_by_other_rankings(work):
    def pruned(flags: str) -> subprocess.CompletedProcess:
        return done_well("prune.py", "run", *flags.split(), cwd=work)

    most = parameters(cut(checkpoint.load(work / "run").model, 4))
    done = pruned(f"--max-params {most} --max-macs 10e6")
    assert re.search(rf"^size 4 +4 +{most:,} ", done.stdout, re.M)
    assert "size 4 was never trained; the nearest: 3 and 5" in done.stderr
    assert "size  3  fcm. ....\n" in pruned("--sizes 3 --ranking first").stdout
    assert "size  3  " in pruned("--sizes 3 --ranking random").stdout
    pruned("--sizes 3 --max-latency-ms 9000")
    for name in ("size-3-first.pt", "size-3-random.pt", "size-3.pt", "size-8.pt"):
        assert (work / "run" / name).exists()


@pytest.mark.parametrize("method", ALGORITHMS)
def test_prune_learns_the_layers_of_a_full_model(work, method):
    def flags(words: str) -> list[str]:
        return ["prune.py", *words.split(), "--method", method]

    shown = done_well(*flags("full --updates 0 --output nothing"), cwd=work).stdout
    assert "nothing was learned" in shown and "size  2  fc.. ....\n" in shown
    (work / "moved").symlink_to(checkpoint.load(work / "full").model.config.corpus)
    done_well(*flags("full --sizes 3 5 --updates 6 --corpus moved"), cwd=work)
    folder = work / "full" / method
    assert checkpoint.load(folder).model.config.corpus == "moved"
    for name in ("checkpoint.pt", "size-3.pt", "size-5.pt", "metrics.jsonl"):
        assert (folder / name).is_file()
    pairs = zip(*encoders(work / "full", folder), strict=True)
    assert 0 < max((a - b).abs().max() for a, b in pairs) < 0.1  # from the model's weights on
    assert "exists already" in refused(*flags("full"), cwd=work)
    assert "cut" in refused(*flags(f"full/{method}/size-3.pt --output x"), cwd=work)


def test_sigusr1_saves_and_training_goes_on_until_sigterm(tones, tmp_path, monkeypatch):
    def log(folder: Path, record: dict) -> None:
        logged(folder, record)
        if number := {2: signal.SIGUSR1, 7: signal.SIGTERM}.get(record["update"]):
            saved.append(checkpoint.history(folder) and checkpoint.load(folder).training["update"])
            os.kill(os.getpid(), number)

    logged, saved = run_directory.log, []
    monkeypatch.setattr(run_directory, "log", log)
    never = "--save-every 100 --validate-every 100 --updates 100 --log-every 1".split()
    done = run("train.py", "--corpus", tones, "--run", "run", *TINY, *never, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert saved == [[], 2]
    assert "saved at update 8; python train.py --resume run goes on" in done.stdout
    assert checkpoint.load(tmp_path / "run").training["update"] == 8


def test_a_log_has_a_line_for_each_interval_and_a_terminal_a_bar(tones, tmp_path, monkeypatch):
    flags = ["--corpus", tones, *TINY, "--method", "iterative-zero-out", "--step1-share", "0.5"]
    log = run("train.py", "--run", "log", *flags, cwd=tmp_path)
    loss = r"-?\d+\.\d\d"
    lines = re.findall(rf"^update (\d+)/12  loss 8: {loss} (\w+).*left$", log.stdout, re.M)
    assert lines == [("4", "4"), ("8", "5"), ("12", "5")]
    assert not log.stderr
    monkeypatch.setenv("COLUMNS", "132")
    monkeypatch.setattr(Stream, "isatty", lambda stream: True)
    bar = run("train.py", "--run", "bar", *flags, cwd=tmp_path)
    drawn = [text for text in re.split(r"[\r\n]", bar.stderr) if "%|" in text]
    assert drawn and max(map(len, drawn)) <= 80
    assert all(re.match(rf"loss 8: {loss} ", text) for text in drawn[1:])
    assert "12/12" in drawn[-1] and "update 4/12" not in bar.stdout


REFUSED = [
    ("train.py --corpus nowhere --run new", "nowhere: no such directory"),
    ("train.py --corpus CORPUS --run new --train-splits train-100", "train-100.*no such split"),
    ("train.py --run new --attention-heads 5", "--attention-heads 5.*width 96"),
    ("train.py --run new --sizes 7 13 21", "--sizes 7 13 21.*20"),
    ("train.py --resume nowhere", "nowhere"),
    ("train.py --run new --size 8", "--size 8.*--method none"),
    ("train.py --corpus= --run new", "--corpus ''.*a directory, or spoken"),
    ("train.py --run new --method none --size 21", "--size 21.*0 to 20"),
    ("train.py --init-from nowhere --run new", "nowhere: can't be read"),
    ("train.py --resume run --updates 9", "--updates 9 with --resume"),
    ("train.py --resume=run --study", "--study with --resume"),
    ("train.py --resume run --run other", "--run with --resume"),
    ("train.py --resume run --preset demo", "--preset with --resume"),
    ("train.py --overwrite --resume=run", "--overwrite with --resume"),
    ("train.py --init-from run --run new --width 32", "--width.*run/checkpoint.pt"),
    ("train.py --init-from run --run new --initial-score 9", "--initial-score.*run/checkpoint.pt"),
    ("train.py --init-from run --run new --method none", "--method"),
    ("train.py --init-from run --run new --preset demo", "--preset with --init-from"),
    ("train.py --study 0 --method none", "--method with --study"),
    ("train.py --init-from run --run new --resume run", "--resume with --init-from"),
    ("prune.py nowhere", "nowhere: can't be read"),
    ("prune.py run --sizes 3 9", "no size 9.*1 to 8 layers"),
    ("prune.py run --sizes 0", "no size 0.*1 to 8 layers"),
    ("prune.py run --updates 9", "--updates.*--method"),
    ("prune.py run --corpus CORPUS", "--corpus.*--method"),
    ("prune.py run --method simple-top-k --ranking first", "--method.*ranking"),
    ("prune.py run --method simple-top-k --sizes 9 --output new", "--sizes.*8"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_bad_input_is_one_line_and_changes_nothing(trained, tones, command, said):
    script, *arguments = command.replace("CORPUS", str(tones)).split()
    line = refused(script, *arguments, cwd=trained)
    assert re.search(said, line), line


def test_the_preset_follows_from_the_corpus():
    parse = SCRIPTS["train.py"]["parse"]
    assert parse([]).preset == "demo"
    assert parse(["--corpus", "mine"]).preset == "small"
    assert parse(["--corpus", "mine", "--preset", "demo"]).preset == "demo"


@pytest.mark.parametrize("method", config.METHODS)
@pytest.mark.parametrize("preset", list(config.PRESETS))
def test_help_tells_every_flag_with_its_default(preset, method, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["train.py"]["parse"](["--preset", preset, "--method", method, "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    defaults = config.preset(preset, method=method)
    for field in config.fields():
        default = config.shown(getattr(defaults, field.name)) or "none"
        flag = field.name.replace("_", "-")
        assert f"--{flag} " in text or f"--{flag}, --no-{flag} " in text
        assert all(choice in text for choice in field.metadata["choices"])
        assert f"{field.metadata['help']} ({default})" in text


def test_a_terminal_without_unicode_shows_escapes(tones, tmp_path, monkeypatch):
    out, err = (TextIOWrapper(BytesIO(), encoding="ascii") for _ in range(2))
    (tmp_path / "tönes").symlink_to(tones)
    for script, *flags in [
        ("train.py", "--corpus", "tönes", "--run", "é", *TINY, "--updates", "2"),
        ("prune.py", "é", "--sizes", "3"),
        ("evaluate.py", "é", "--split", "test-clean"),
        ("evaluate.py", "é/ø"),
    ]:
        with suppress(SystemExit), monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in dict(argv=[script, *flags], stdout=out, stderr=err).items():
                patch.setattr(sys, name, value)
            SCRIPTS[script]["main"]()
    out.flush()
    for shown in (b"done: \\xe9/checkpoint.pt", b"\\xe9/size-3.pt", b"\\xe9/evaluation"):
        assert shown in out.buffer.getvalue()
    told = b"evaluate.py: \\xe9/\\xf8: can't be read: No such file or directory\n"
    assert err.buffer.getvalue() == told


def encoders(first: Path, second: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    models = [checkpoint.load(path).model for path in (first, second)]
    return tuple(list(model.encoder.parameters()) for model in models)


def test_a_cut_size_is_trained_on_from_its_weights(work):
    done = done_well("prune.py", "run", "--sizes", "3", cwd=work)
    assert done.stdout.endswith("python evaluate.py run/size-3.pt measures its word error rate\n")
    flags = "--init-from run/size-3.pt --updates 1 --peak-learning-rate 1e-9".split()
    done = done_well("train.py", *flags, "--teacher", "run", "--run", "tuned", cwd=work)
    assert "weights    of run/size-3.pt" in done.stdout
    assert re.search(r"^training   none, sizes 3, 1 update, in tuned$", done.stdout, re.M)
    assert "python evaluate.py tuned measures its word error rate" in done.stdout
    before, after = (checkpoint.load(work / path) for path in ("run/size-3.pt", "tuned"))
    assert after.model.sizes == (3,) and after.model.ranking == before.model.ranking
    assert after.tokenizer.model == before.tokenizer.model
    expected = before.model.state_dict()
    for name, weight in after.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)

    with_new_letters = write_tones(work / "words")
    for path in with_new_letters.rglob("*.txt"):
        path.write_text(path.read_text().replace("LOW", "BASS").replace("TOP", "JAZZ"))
    flags += ["--corpus", with_new_letters, "--run", "other"]
    line = refused("train.py", *flags, cwd=work)
    assert "unknown to the tokenizer" in line and "--vocabulary" in line
    done_well("train.py", *flags, "--vocabulary", "16", cwd=work)
    other = checkpoint.load(work / "other")
    assert other.tokenizer.decode(other.tokenizer.encode("BASS JAZZ")) == "BASS JAZZ"
    torch.testing.assert_close(*encoders(work / "run/size-3.pt", work / "other"), rtol=0, atol=1e-6)
    done_well("train.py", "--resume", "other", cwd=work)


def test_a_supernet_is_trained_on_with_its_ranking(work):
    flags = "--init-from run --step1-share 0 --updates 1 --peak-learning-rate 1e-9".split()
    done_well("train.py", *flags, "--run", "tuned", cwd=work)
    before, after = (checkpoint.load(work / path).model for path in ("run", "tuned"))
    assert after.sizes == (3, 5, 8) and after.ranking == before.ranking
    assert torch.equal(after.scores, before.scores)
    torch.testing.assert_close(*encoders(work / "run", work / "tuned"), rtol=0, atol=1e-6)


def test_prune_never_replaces_its_source(work):
    for flags in ("--method simple-top-k --output run --overwrite --updates 2", "--output run"):
        source = work / "run" / "checkpoint.pt"
        before = source.read_bytes()
        run("prune.py", "run", *flags.split(), cwd=work)
        assert source.read_bytes() == before
    shutil.copy(source, work / "size-5.pt")
    said = refused("prune.py", "size-5.pt", "--sizes", "5", "--overwrite", cwd=work)
    assert "size-5.pt" in said and "supernet" in said


def test_a_full_disk_while_the_corpus_is_spoken_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/cache/x.flac")

    monkeypatch.setattr(spoken, "speak_split", full)
    monkeypatch.setattr(spoken, "Espeak", lambda seed: None)
    with pytest.raises(SystemExit) as stop:
        spoken.main([str(tmp_path / "corpus")])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    ended = subprocess.CompletedProcess([], 2, "", capsys.readouterr().err)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    line = refused("train.py", cwd=tmp_path / "work")
    assert "No space left on device" in line and "/cache/x.flac" in line


def test_a_cache_that_cannot_be_made_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert re.search(r"file.*Not a directory.*XDG_CACHE_HOME", refused("train.py", cwd=tmp_path))


def test_the_embedded_corpus_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="pip install -e '.[demo]' brings it")

    def speak_less(command: list[str], **options) -> subprocess.CompletedProcess:
        minutes = dict.fromkeys(spoken.MINUTES, 0.1) | dict(train=1)
        code = f"from dynsize import spoken; spoken.MINUTES.update({minutes}); spoken.main()"
        return speak([command[0], "-c", code, *command[3:]], **options)

    speak = subprocess.run
    monkeypatch.setattr(spoken.subprocess, "run", speak_less)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = "--updates 2 --batch-seconds 20 --width 16 --attention-heads 2 --vocabulary 40"
    done_well("train.py", *short.split(), cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "checkpoint.pt").exists()
    kept = [path.name.partition("-")[0] for path in (tmp_path / "cache" / "dynsize").iterdir()]
    assert sorted(kept) == ["headers", "spoken"]
    assert os.listdir(tmp_path / "cache" / "dynsize" / "spoken-1")


# The package beside another one that is called `kernels`, as pip installs them.

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


def test_both_packages_work_after_both_are_installed(tmp_path):
    for name in ("dynsize", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "ours" / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", tmp_path / "ours")
    (tmp_path / "theirs" / "kernels").mkdir(parents=True)
    (tmp_path / "theirs" / "setup.py").write_text(THEIRS)
    (tmp_path / "theirs" / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    venv = tmp_path / "venv"
    called(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, setuptools
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index"]
    called(*pip, *flags, "./theirs", "./ours", cwd=tmp_path)
    whose, ours, *files = called(venv / "bin" / "python", "-c", LOOK, cwd=venv).split()
    assert (whose, ours) == ("theirs", "True")
    assert all(Path(file).is_relative_to(packages) for file in files) and len(files) == 2
