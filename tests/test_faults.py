"""What can happen to a run of days: kills, full disks, damage, signals, two starts at once."""

import dataclasses
import errno
import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import sys
import termios
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import begun, everything_in, finish, limited, logged, same, tiny, write_tones
from in_process import ROOT, SCRIPTS, TINY, wait_until

from dynsize import checkpoint, files, training
from dynsize.batching import epoch_plan
from dynsize.run_directory import check_new, forget_after
from dynsize.training import Trainer

fork = multiprocessing.get_context("fork")


def elsewhere(function: Callable, *arguments) -> fork.Process:
    """Start a function in another process, with one thread: a fork has no other threads."""

    def alone() -> None:
        torch.set_num_threads(1)
        function(*arguments)

    process = fork.Process(target=alone)
    process.start()
    return process


def stopped(trainer: Trainer, updates: int) -> Trainer:
    """Train some updates, then let another training have the directory."""
    list(itertools.islice(trainer.updates(), updates))
    trainer.locked.close()
    return trainer


def failing(number: int) -> Callable:
    """Return what takes the place of a system call that fails."""

    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def complaint(file: Path) -> str:
    """Return why a checkpoint is not read; nothing where it is."""
    try:
        checkpoint.load(file)
    except ValueError as error:
        return str(error)
    return ""


def test_a_full_disk_and_one_that_fails_leave_the_older_checkpoints(tones, tmp_path, monkeypatch):
    expected = finish(begun(tones, tmp_path / "unbroken", save_every=3))
    trainer, run = begun(tones, tmp_path / "run", save_every=3, keep=3), tmp_path / "run"
    updates = trainer.updates()
    list(itertools.islice(updates, 7))
    before = {path: path.read_bytes() for path in checkpoint.history(run)}
    size = len(before[run / checkpoint.NAME])
    with limited(resource.RLIMIT_FSIZE, size // 2):  # what a process sees of a full disk
        with pytest.raises(OSError, match=r"untouched.*checkpoint\.pt"):
            list(updates)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=r"untouched.*checkpoint\.pt"):
        trainer.save()
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in checkpoint.history(run)} == before
    assert len(before) == 2 and not list(run.glob("*.unfinished"))
    resumed = Trainer.resume(run)
    assert resumed.done == 6 and same(finish(resumed), expected)


def test_the_checkpoint_before_a_damaged_one_is_used(tones, tmp_path, monkeypatch):
    run = tmp_path / "run"
    expected = finish(begun(tones, run, save_every=4, keep=2))
    assert [path.name for path in checkpoint.history(run)] == ["checkpoint.pt", "checkpoint-1.pt"]
    newest, whole = run / checkpoint.NAME, (run / checkpoint.NAME).read_bytes()
    newest.unlink()  # killed between two renames
    assert checkpoint.load(run).path == run / "checkpoint-1.pt"
    newest.write_bytes(whole)

    def read(path: Path) -> bytes:
        with open(path, "rb") as file:
            if path.name == checkpoint.NAME:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return file.read()

    with warnings.catch_warnings(record=True) as told, monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        warnings.simplefilter("default")
        assert [checkpoint.load(run).training["update"] for _ in range(2)] == [8, 8]
    assert [os.strerror(errno.EIO) in str(warning.message) for warning in told] == [True]

    newest.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint\.pt: damaged.*one before"):
        resumed = Trainer.resume(run)
    assert resumed.done == 8 and same(finish(resumed), expected)
    for path in checkpoint.history(run):
        path.write_bytes(b"noise")
    with pytest.warns(UserWarning, match="damaged"):
        with pytest.raises(ValueError, match="none that is whole"):
            checkpoint.load(run)


@pytest.fixture(scope="module")
def written(tones, tmp_path_factory) -> Path:
    """A checkpoint, and what is in it. Not to be changed."""
    run = tmp_path_factory.mktemp("written") / "run"
    finish(begun(tones, run, updates=2))
    return run / checkpoint.NAME


class Payload:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Another file: bits are wrong, it is cut, has a hole or zeros in it, is longer, or noise."""
    a, b = sorted(draw.sample(range(len(data)), 2))
    kinds = [data[:a], data[a:], data[:a] + data[b:], data[:a] + bytes(b - a) + data[b:], b""]
    kinds += [data + data[a:b], draw.randbytes(a), data[:a] + pickle.dumps(Payload())]
    flipped = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 50])):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return draw.choice([bytes(flipped), draw.choice(kinds)])


def values(file: Path) -> bytes:
    """What a checkpoint holds, without what stands between its tensors."""
    content = io.BytesIO()
    torch.save(torch.load(file, weights_only=True), content)
    return content.getvalue()


def test_a_damaged_checkpoint_is_an_error_or_has_the_same_values(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, draw, file = written.read_bytes(), random.Random(0), Path("checkpoint.pt")
    for _ in range(150):
        file.write_bytes(damaged(data, draw))
        said = complaint(file)
        refused = re.match(r"checkpoint\.pt: (damaged|not a checkpoint)", said)
        assert refused if said else values(file) == values(written)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]  # nothing was executed


def changed(content: object, draw: random.Random) -> object:
    """A checkpoint's content, of which one value, at any depth, is of another type or missing."""
    if isinstance(content, dict) and draw.random() < 0.8:
        key = draw.choice([*content])
        rest = {other: value for other, value in content.items() if other != key}
        return rest if draw.random() < 0.2 else rest | {key: changed(content[key], draw)}
    others = [None, -1, math.nan, 2**70, "x", b"x", [], [content], (), {}, {"x": 1}, True]
    return draw.choice([*others, torch.zeros(3), torch.tensor(math.inf), "\ud800"])


def test_a_checkpoint_with_other_values_is_an_error_in_one_line(written, tmp_path):
    content, draw, refused = torch.load(written, weights_only=True), random.Random(0), 0
    file = tmp_path / "other.pt"
    for _ in range(60):
        torch.save(changed(content, draw), file)
        said = complaint(file)
        assert re.fullmatch(r"|.*other\.pt: damaged, or not a checkpoint: .+", said)
        refused += bool(said)
    assert refused > 30  # the others are of the training's state, or settings that do no harm


def test_a_whole_file_with_other_content_says_what_is_wrong(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(written, weights_only=True)
    name, weight = next(item for item in content["weights"].items() if torch.is_tensor(item[1]))
    infinite = content["weights"] | {name: torch.full_like(weight, math.inf)}
    for change, said in [
        (dict(format="other"), "its format is 'other'.*train it again"),
        (dict(training=Payload()), "more than tensors and plain values$"),
        (dict(longest_seconds=math.nan), "longest_seconds is nan"),
        (dict(weights=infinite), "is not finite"),
    ]:
        torch.save(content | change, "other.pt")
        with pytest.raises(ValueError, match=rf"other\.pt: .*not a checkpoint: .*{said}"):
            checkpoint.load(Path("other.pt"))
    assert not Path("executed").exists()


def test_a_checkpoint_with_compressed_entries_is_refused(written, tmp_path):
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "x.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"x\.pt: .*compressed"):
        checkpoint.load(tmp_path / "x.pt")


def test_one_training_at_a_time_has_a_run_directory(tones, tmp_path):
    def live(run: Path, ready) -> None:
        trainer = begun(tones, run)
        next(trainer.updates())
        trainer.save()
        ready.set()
        time.sleep(600)

    run, ready = tmp_path / "run", fork.Event()
    process = elsewhere(live, run, ready)
    assert ready.wait(60)
    content = {path: path.read_bytes() for path in run.iterdir()}
    for start in (Trainer.resume, lambda run: begun(tones, run)):
        with pytest.raises(ValueError, match="another training is at work"):
            start(run)
    assert {path: path.read_bytes() for path in run.iterdir()} == content
    process.kill()
    process.join()
    assert Trainer.resume(run).done == 1


def test_a_run_goes_on_where_it_was_moved_and_when_the_clock_jumps(tones, tmp_path, monkeypatch):
    expected = finish(begun(tones, tmp_path / "unbroken"))
    jumps = itertools.cycle([0.0, 4e9, 1.0, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    stopped(begun(tones, tmp_path / "run", save_every=5), 7)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / checkpoint.NAME, (4e9, 4e9))
    resumed = Trainer.resume(tmp_path / "elsewhere")
    assert resumed.done == 6 and same(finish(resumed), expected) and not (tmp_path / "run").exists()


def test_a_checkpoint_every_so_many_minutes_and_when_asked(tones, tmp_path, monkeypatch):
    now, at = [0.0], []
    clock = SimpleNamespace(**vars(time) | dict(monotonic=lambda: now[0]))
    monkeypatch.setattr(training, "time", clock)
    trainer = begun(tones, tmp_path / "run", save_every=100, save_minutes=5.0)
    updates = trainer.updates()
    for minutes in (0, 4, 6, 7, 11.5, 12, 13):
        now[0] = 60.0 * minutes
        trainer.requests.save = minutes == 13
        next(updates)
        saved = checkpoint.history(trainer.run)
        at.append(checkpoint.load(trainer.run).training["update"] if saved else 0)
    assert at == [0, 0, 3, 3, 5, 6, 7]  # one comes before the validation after update 6


def test_the_best_network_is_kept(tones, tmp_path):
    run, weights, totals = tmp_path / "run", {}, {}
    often = dict(save_every=3, validate_every=2, peak_learning_rate=1e-2)
    trainer = begun(tones, run, updates=20, step1_share=0.5, **often)
    for record in trainer.updates():
        weights[record["update"]] = {n: w.clone() for n, w in trainer.model.named_parameters()}
        if "dev" in record:
            totals[record["update"]] = sum(result["wer"] for result in record["dev"].values())
    assert len(set(totals.values())) > 1 and trainer.dev_errors == pytest.approx(totals)
    best = min(totals, key=totals.get)
    loaded = checkpoint.load(run / "best.pt")
    assert same(dict(loaded.model.named_parameters()), weights[best])
    assert loaded.longest_seconds == trainer.data.longest_seconds == pytest.approx(0.8)
    with pytest.raises(ValueError, match="not a directory with the checkpoint"):
        Trainer.resume(run / "best.pt")


def test_too_little_memory_is_an_error_before_the_first_update(tones, tmp_path, monkeypatch):
    trainer, seen = begun(tones, tmp_path / "run", batch_seconds=3.0), []
    frames, run = trainer.data.examples.frames(), trainer.add_gradients

    def full(update, batches, *arguments, **named):
        (batch,) = batches
        seen.append(batch.lengths.max().item() * len(batch.lengths))
        if len(seen) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return run(update, batches, *arguments, **named)

    monkeypatch.setattr(trainer, "add_gradients", full)
    told = r"largest batch.*--checkpoint-activations.*--batch-seconds 3 .*--accumulate"
    with pytest.raises(ValueError, match=told):
        next(trainer.updates())
    plans = [epoch_plan(frames, trainer.config, epoch) for epoch in range(3)]
    most = [max(len(batch) * max(frames[i] for i in batch) for batch in plan) for plan in plans]
    assert seen == [most[0]] * 2 and max(most) <= 1.2 * most[0]


@pytest.mark.parametrize("name", ["config.json", "lock/file", "train/1/2/1-2.trans.txt"])
def test_a_directory_of_others_is_never_touched(tones, tmp_path, name):
    (tmp_path / "theirs" / name).parent.mkdir(parents=True)
    (tmp_path / "theirs" / name).write_text("{}")
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"weights")
    before = everything_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a run directory"):
            check_new(tmp_path / "theirs", overwrite)
    with pytest.raises(ValueError, match="not a run directory"):
        begun(tones, tmp_path / "theirs")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_that_is_there_is_renamed_and_whole(tones, tmp_path, monkeypatch, linked):
    run = tmp_path / "run"
    if linked:
        (tmp_path / "disk").mkdir()
        run.symlink_to(tmp_path / "disk")
    finish(begun(tones, run, updates=2))
    (run / "notes.txt").write_text("mine")
    first = everything_in(run)
    kept = run.resolve()
    told = "--resume .*run goes on .* --overwrite renames it, --run"
    with pytest.raises(ValueError, match=told):
        check_new(run, overwrite=False)
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="start in another directory"):
        begun(tones, Path("."), updates=2)
    monkeypatch.chdir(tmp_path)
    for number in ("", "2"):
        check_new(run, overwrite=True)
        with pytest.warns(UserWarning, match=f"now in .*{kept.name}.old{number}"):
            finish(begun(tones, run, updates=1))
    assert everything_in(kept.with_name(f"{kept.name}.old")) == first
    assert checkpoint.load(kept.with_name(f"{kept.name}.old2")).training["update"] == 1
    assert run.is_symlink() == linked and not (run / "notes.txt").exists()


def test_a_training_never_replaces_what_it_starts_from(tones, tmp_path):
    run = tmp_path / "full"
    finish(begun(tones, run, updates=2))
    before = everything_in(run)
    loaded = dataclasses.replace(checkpoint.load(run), training=None)
    with pytest.raises(ValueError, match="from which this training starts"):
        Trainer(tiny(corpus=str(tones)), run, loaded).begin()
    alone = tiny(corpus=str(tones), method="none", sizes=(8,), size=3, layers_from=str(run))
    with pytest.raises(ValueError, match="from which this training starts"):
        Trainer(alone, run).begin()
    assert everything_in(run) == before


def test_damaged_lines_of_metrics_do_not_stop_a_resume(tones, tmp_path):
    run = tmp_path / "run"
    trainer = stopped(begun(tones, run, log_every=1), 7)
    trainer.save()
    metrics, draw = run / "metrics.jsonl", random.Random(0)
    whole = metrics.read_bytes().splitlines(keepends=True)
    noise = [b"\n", b"\0" * 40 + b"\n", b"{}\n", b"[3]\n", b'{"update": null}\n', b"\xff\xfe\n"]
    noise += [b"[" * 9999 + b"\n", b'{"update": 1e999}\n', whole[0][:50] + b"\n"]
    damaged = draw.sample([*whole, *noise], len(whole) + len(noise))
    metrics.write_bytes(b"".join(damaged) + whole[1][:30])
    resumed = Trainer.resume(run)
    assert resumed.dev_errors == trainer.dev_errors and list(resumed.dev_errors) == [6]
    for _ in range(100):  # one bit is wrong
        changed = bytearray(b"".join(whole))
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        (tmp_path / "metrics.jsonl").write_bytes(changed)
        resumed.dev_errors |= forget_after(tmp_path, 7)
    finish(resumed)
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert sorted(lines[: len(whole)]) == sorted(whole)
    assert all("update" in json.loads(line) for line in lines)


def test_a_file_system_without_locks_is_told_and_used(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(errno.ENOLCK))
    with pytest.warns(UserWarning, match="no locks"):
        trainer = begun(tones, tmp_path / "run", updates=2)
    finish(trainer)


def test_what_dead_processes_left_unfinished_is_deleted(tones, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dead = elsewhere(int)
    dead.join()
    features = tmp_path / "features"
    gone, kept = [], []
    for place in (files.user_cache() / "x", features / "ab" / "cd", tmp_path / "run" / "best.pt"):
        gone.append(Path(f"{place}.{files.HOST}.{dead.pid}.unfinished"))
        others = (f"{files.HOST}.{os.getpid()}.", f"elsewhere.{dead.pid}.", "")
        kept += [Path(f"{place}.{other}unfinished") for other in others]
    for path in gone + kept:
        (path / "folder").mkdir(parents=True)
    begun(tones, tmp_path / "run", cache_features=str(features))
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)


@pytest.mark.parametrize(
    "changed",
    [dict(update=None), dict(batches="many"), dict(optimizer={}), dict(optimizer=[3]), dict(), [7]],
)
def test_a_state_with_which_no_training_can_go_on_is_one_line(written, tones, tmp_path, changed):
    content = torch.load(written, weights_only=True)
    state = content["training"] | changed if changed and isinstance(changed, dict) else changed
    config = content["config"] | dict(corpus=str(tones))
    torch.save(content | dict(training=state, config=config), tmp_path / checkpoint.NAME)
    told = r"checkpoint\.pt: (no training can go on|a checkpoint without)"
    with pytest.raises(ValueError, match=told):
        Trainer.resume(tmp_path)


def test_a_resumed_training_takes_what_does_not_change_what_is_learned(tones, tmp_path):
    expected = finish(begun(tones, tmp_path / "unbroken"))
    run = tmp_path / "run"
    stopped(begun(tones, run), 6)
    for name, value in dict(seed=7, updates=99, sizes=(2, 8), dropout=0.5, teacher="x").items():
        with pytest.raises(ValueError, match=f"--{name}.* with --resume"):
            Trainer.resume(run, {name: value})
    with pytest.raises(ValueError, match="--workers -1"):
        Trainer.resume(run, dict(workers=-1))
    moved = shutil.copytree(tones, tmp_path / "moved")
    changes = dict(corpus=str(moved), workers=1, log_every=5, save_every=3, keep=2, seed=0)
    resumed = Trainer.resume(run, changes)
    assert same(finish(resumed), expected) and resumed.config.log_every == 5
    assert json.loads((run / "config.json").read_text())["corpus"] == str(moved)


def test_a_resumed_training_tells_what_makes_its_result_another(tmp_path):
    root = write_tones(tmp_path / "corpus")
    run = tmp_path / "run"
    stopped(begun(root, run), 6)
    with pytest.warns(UserWarning, match="--batch-seconds 3.*not that of an unbroken training"):
        Trainer.resume(run, dict(batch_seconds=3.0)).locked.close()
    transcript = root / "train" / "0" / "7" / "0-7.trans.txt"
    transcript.write_text(transcript.read_text().replace("LOW", "MID", 1))
    with pytest.warns(UserWarning, match="corpus: the ids or texts of its 24 utterances"):
        Trainer.resume(run)


UPDATES = 2000  # more than are done before the signal


def started(
    tones: Path, run: Path, workers: int = 0, output: int = -1, ready: Callable[[], object] = int
) -> fork.Process:
    """Start a long training by the script, and wait for the first line of its log.

    It runs in a fork of this process, which has imported torch. Where it has worker processes it is
    a new Python, as their end depends on how Python ends. It leads a session, and writes to a
    descriptor, or to the file RUN.out. `ready` is called first.
    """
    flags = f"--corpus {tones} --run {run} --workers {workers} --updates {UPDATES} --threads 1 "
    flags += f"--log-every 1 --validate-every {UPDATES} --save-every {UPDATES}"
    arguments = ["train.py", *TINY, *flags.split()]

    def script() -> None:
        os.setsid()
        ready()
        written_to = os.open(f"{run}.out", os.O_CREAT | os.O_WRONLY) if output < 0 else output
        for stream in (1, 2):
            os.dup2(written_to, stream)
        if workers:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, *arguments])
        sys.argv, sys.stdout, sys.stderr = arguments, os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 0
        try:
            SCRIPTS["train.py"]["main"]()
        except SystemExit as stop:
            code = stop.code
        sys.exit(code)

    process = elsewhere(script)
    wait_until(lambda: (run / "metrics.jsonl").exists() or not process.is_alive())
    return process


def ended(process: fork.Process) -> int:
    """Wait for the end of a script and of its worker processes; return its exit code."""
    process.join(60)
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0)
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError("processes are left")
            time.sleep(0.01)
    return process.exitcode


@pytest.mark.parametrize("workers, number", [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_the_process_group_saves_and_ends(tones, tmp_path, workers, number):
    torch.set_num_threads(1)
    run = tmp_path / "run"
    process = started(tones, run, workers)
    time.sleep(0.1)
    for _ in range(2):  # as timeout and torchrun do
        os.killpg(process.pid, number)
    assert ended(process) == 128 + number
    stopped = checkpoint.load(run)
    update = stopped.training["update"]
    said = (tmp_path / "run.out").read_text()
    assert 1 <= update < UPDATES and f"stopped and saved at update {update};" in said
    resumed = Trainer.resume(run, dict(workers=0))
    list(itertools.islice(resumed.updates(), 2))
    unbroken = Trainer(resumed.config, tmp_path / "unbroken").begin()
    list(itertools.islice(unbroken.updates(), update + 2))
    assert same(*(dict(trainer.model.named_parameters()) for trainer in (resumed, unbroken)))


def test_a_training_of_nohup_goes_on_when_its_terminal_closes(tones, tmp_path):
    run = tmp_path / "run"
    process = started(tones, run, ready=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(process.pid, signal.SIGHUP)
    before = updates_in(run)
    wait_until(lambda: updates_in(run) >= before + 3 or not process.is_alive())
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM


def test_a_training_whose_terminal_closes_saves_and_ends(tones, tmp_path):
    run = tmp_path / "run"
    ours, theirs = os.openpty()

    def of_terminal() -> None:
        os.close(ours)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started the tests
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = started(tones, run, output=theirs, ready=of_terminal)
    os.close(theirs)
    os.close(ours)
    assert ended(process) == 128 + signal.SIGHUP
    assert checkpoint.load(run).training["update"] == updates_in(run)


def test_a_training_that_is_killed_leaves_no_worker_processes(tones, tmp_path):
    process = started(tones, tmp_path / "run", workers=2)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL


def updates_in(run: Path) -> int:
    """The lines of a training's log."""
    return len((run / "metrics.jsonl").read_bytes().splitlines())


def test_a_worker_that_dies_leads_to_a_save_and_a_clear_message(tones, tmp_path):
    run = tmp_path / "run"
    # an epoch of 17 batches or more, of which workers read at most 4 ahead
    changes = dict(workers=2, updates=300, save_every=300, validate_every=300, batch_seconds=1.0)
    trainer = begun(tones, run, **changes)
    updates = trainer.updates()
    list(itertools.islice(updates, 3))
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(ChildProcessError, match=r"a loader process died.*--workers 2"):
        list(updates)
    assert checkpoint.load(run).training["update"] == trainer.done >= 3


def test_a_corpus_that_disappears_ends_a_training_with_workers(tones, tmp_path):
    corpus = shutil.copytree(tones, tmp_path / "corpus")
    process = started(corpus, tmp_path / "run", workers=2)
    shutil.rmtree(corpus)
    assert ended(process) == 2 and "--most-left-out" in (tmp_path / "run.out").read_text()


class CrashAt:
    """Ends this process, without any cleaning up, at the n-th operation on files of a folder.

    Counted are the opening of files to write, renames, deletions, new directories and fsyncs. A
    crash at an fsync leaves half of the file: what a power failure leaves of data in memory.
    """

    def __init__(self, folder: Path, number: int, count: Callable[[int], None]) -> None:
        self.folder, self.left, self.count = os.fspath(folder), number, count
        self.done = 0
        self.fsync = os.fsync
        os.fsync = self.synced
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        counted = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event in counted and str(arguments[0]).startswith(self.folder):
            self.operation(lambda: None)

    def synced(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        name = f"/proc/self/fd/{descriptor}"  # the descriptor itself may be open to read only
        self.operation(lambda: is_file and os.truncate(name, size // 2))
        self.fsync(descriptor)

    def operation(self, last: Callable[[], object]) -> None:
        self.done += 1
        self.count(self.done)
        if self.done == self.left:
            self.left = 0
            last()
            os._exit(9)


SHORT = dict(updates=4, step1_share=0.5, save_every=1, validate_every=2, log_every=1, keep=2)


def crashed(tones: Path, run: Path, number: int) -> int:
    """Train in another process, which crashes at the n-th operation; return those done."""
    counted = fork.Value("i", 0)

    def train() -> None:
        CrashAt(run, number, lambda done: setattr(counted, "value", done))
        finish(begun(tones, run, **SHORT))

    process = elsewhere(train)
    process.join()
    assert process.exitcode == (9 if number else 0)
    return counted.value


def goes_on_after_a_crash(tones: Path, run: Path, number: int, expected: dict) -> None:
    """Crash at the n-th operation, then resume, or start again where nothing was learned yet."""
    crashed(tones, run, number)
    if run.exists() and checkpoint.history(run):
        trainer = Trainer.resume(run)
    else:
        check_new(run, overwrite=(run / "metrics.jsonl").exists())
        trainer = begun(tones, run, **SHORT)
    assert same(finish(trainer), expected)
    names = "config.json metrics.jsonl ranking.json left-out.txt corpus.txt lock best.pt "
    names += "checkpoint.pt checkpoint-1.pt"
    assert {path.name for path in run.iterdir()} == {*names.split()}
    lines = logged(run)
    assert [line["update"] for line in lines if "losses" in line] == [1, 2, 3, 4]
    assert [line["update"] for line in lines if "dev" in line] == [2, 4]
    assert checkpoint.load(run).training["update"] == 4
    assert all(checkpoint.read(path) for path in (*checkpoint.history(run), run / "best.pt"))
    trainer.locked.close()


def test_a_training_goes_on_after_a_crash_at_any_operation_on_files(tones, tmp_path):
    torch.set_num_threads(1)
    expected = finish(begun(tones, tmp_path / "unbroken", **SHORT))
    operations = crashed(tones, tmp_path / "counted", number=0)
    assert operations > 40
    every = os.environ.get("EVERY_OPERATION")  # else a few, other ones in each part of the training
    numbers = range(1, operations + 1, 1 if every else operations // 6)
    for number in numbers:
        goes_on_after_a_crash(tones, tmp_path / f"{number}", number, expected)
