"""What can happen to a run that takes days: it is killed, the disk is full, files are damaged, two start at once."""

import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dynsize import checkpoint, training
from dynsize.training import Trainer

fork = multiprocessing.get_context("fork")
KILLS = 10


def begun(tones: Path, run: Path, **changes) -> Trainer:
    return Trainer(tiny(**changes | dict(corpus=str(tones))), run).begin()


def finish(trainer: Trainer) -> dict[str, torch.Tensor]:
    for _ in trainer.updates():
        pass
    return dict(trainer.model.named_parameters())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def elsewhere(function: Callable, *arguments) -> fork.Process:
    """Starts a function in a process of its own, with one thread: the parent's other ones are not there."""

    def alone() -> None:
        torch.set_num_threads(1)
        function(*arguments)

    process = fork.Process(target=alone)
    process.start()
    return process


def saved(run: Path) -> int:
    """When the newest checkpoint was written, in ns; 0 between two renames."""
    try:
        return (run / checkpoint.NAME).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_killed_often_it_ends_in_the_same_weights(tones, tmp_path):
    torch.set_num_threads(1)
    often = dict(updates=80, save_every=1, validate_every=40, log_every=3)
    expected = finish(begun(tones, tmp_path / "unbroken", **often))
    trainer, run, draw, stops = (
        begun(tones, tmp_path / "run", **often),
        tmp_path / "run",
        random.Random(0),
        [],
    )
    trainer.save()
    trainer.locked.close()
    for _ in range(KILLS):
        process = elsewhere(lambda: finish(Trainer.resume(run)))
        before, deadline = saved(run), time.monotonic() + 60
        while saved(run) in (0, before) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # the kill comes anywhere in what follows
        process.kill()
        process.join()
        stops.append(checkpoint.load(run).training["update"])
    assert stops == sorted(stops) and len(set(stops)) > KILLS // 2 and stops[-1] < 80
    resumed = Trainer.resume(run)
    assert same(finish(resumed), expected)
    assert not list(run.glob("*.unfinished"))
    logged = [
        (tmp_path / name / "metrics.jsonl").read_text().count('"losses"')
        for name in ("unbroken", "run")
    ]
    assert (
        logged[0] - KILLS <= logged[1] <= logged[0]
    )  # a line's means need all updates since the last one


def test_a_line_of_metrics_that_was_not_finished_is_taken_out(tones, tmp_path):
    trainer, metrics = begun(tones, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    list(itertools.islice(trainer.updates(), 7))
    trainer.locked.close()
    whole = metrics.read_text()
    metrics.write_text(whole + whole[: len(whole) // 3].rstrip("\n"))
    finish(Trainer.resume(tmp_path / "run"))
    assert metrics.read_text().startswith(whole)
    assert [json.loads(line)["update"] for line in metrics.read_text().splitlines()] == [
        4,
        6,
        8,
        12,
        12,
    ]


@contextmanager
def room(size: int):
    """Inside, no file can grow beyond `size` bytes: what a process sees of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_older_checkpoint(tones, tmp_path):
    expected = finish(begun(tones, tmp_path / "unbroken", save_every=3))
    trainer, run = begun(tones, tmp_path / "run", save_every=3), tmp_path / "run"
    updates = trainer.updates()
    for _ in range(4):
        next(updates)
    whole = (run / checkpoint.NAME).read_bytes()
    with room(len(whole) // 2), pytest.raises(OSError, match=r"untouched.*checkpoint\.pt"):
        list(updates)
    assert (run / checkpoint.NAME).read_bytes() == whole and not list(run.glob("*.unfinished"))
    resumed = Trainer.resume(run)
    assert resumed.update == 3 and same(finish(resumed), expected)


def test_the_checkpoint_before_a_damaged_one_is_used(tones, tmp_path):
    run = tmp_path / "run"
    expected = finish(begun(tones, run, save_every=4, keep=2))
    assert [path.name for path in checkpoint.history(run)] == ["checkpoint.pt", "checkpoint-1.pt"]
    newest, whole = run / checkpoint.NAME, (run / checkpoint.NAME).read_bytes()
    newest.unlink()  # killed between two renames
    assert checkpoint.load(run).path == run / "checkpoint-1.pt"
    newest.write_bytes(whole)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint\.pt: damaged.*one before"):
        resumed = Trainer.resume(run)
    assert resumed.update == 8 and same(finish(resumed), expected)
    for path in checkpoint.history(run):
        path.write_bytes(b"noise")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="none that is whole"),
    ):
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


def damage(data: bytes, kind: str, draw: random.Random) -> bytes:
    """Another file than `data`."""
    a, b, c = sorted(draw.sample(range(len(data)), 3))
    if kind == "bits":
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 50])):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    return {
        "cut": data[:a], "from the middle": data[a:], "a hole": data[:a] + data[b:],
        "zeros": data[:a] + bytes(b - a) + data[b:], "swapped": data[:a] + data[b:c] + data[a:b] + data[c:],
        "twice": data + data, "longer": data + data[a:b], "empty": b"", "noise": draw.randbytes(a),
        "pickle": pickle.dumps(Payload()), "pickle, cut": data[:a] + pickle.dumps(Payload()),
    }[kind]  # fmt: skip


KINDS = (
    "bits",
    "bits",
    "bits",
    "bits",
    "cut",
    "from the middle",
    "a hole",
    "zeros",
    "swapped",
    "twice",
    "longer",
    "empty",
)


@settings(max_examples=500)
@given(st.sampled_from((*KINDS, "noise", "pickle", "pickle, cut")), st.integers(0, 2**32))
def test_a_damaged_checkpoint_is_an_error(written, tmp_path_factory, kind, seed):
    data = written.read_bytes()
    changed = damage(data, kind, random.Random(seed))
    file = tmp_path_factory.mktemp("damaged") / "checkpoint.pt"
    file.write_bytes(changed)
    if changed != data:
        with pytest.raises(ValueError, match=r"checkpoint\.pt: (damaged|not a checkpoint)"):
            checkpoint.load(file)
    assert not Path("executed").exists()
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    "field", ["format", "config", "weights", "ranking", "tokenizer", "pickle", None]
)
def test_a_checkpoint_with_other_content_is_an_error(written, tmp_path, monkeypatch, field):
    """Its checksum is right, and what it holds is not."""
    monkeypatch.chdir(tmp_path)
    content = torch.load(written, weights_only=True)
    save = torch.save
    wrong = dict(
        format="other", config=content["config"] | dict(width=18), weights=content["config"],
        tokenizer=torch.zeros(9, dtype=torch.uint8), pickle=Payload(),
    )  # fmt: skip
    wrong["ranking"] = content["weights"] | dict(_extra_state=[0, 0, 1])
    key = "weights" if field == "ranking" else field
    changed = content | {key: wrong[field]} if field else [content]
    monkeypatch.setattr(torch, "save", lambda _, file: save(changed, file))
    model = checkpoint.load(written)
    checkpoint.save(tmp_path / "other.pt", model.model, model.tokenizer)
    with pytest.raises(ValueError, match=r"other\.pt: not a checkpoint"):
        checkpoint.load(tmp_path / "other.pt")
    assert not (tmp_path / "executed").exists()


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
    assert Trainer.resume(run).update == 1


def test_a_run_goes_on_where_it_was_moved_and_when_the_clock_jumps(tones, tmp_path, monkeypatch):
    expected = finish(begun(tones, tmp_path / "unbroken"))
    jumps = itertools.cycle([0.0, 4e9, 1.0, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    trainer = begun(tones, tmp_path / "run", save_every=5)
    for record in trainer.updates():
        if record["update"] == 7:
            break
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / checkpoint.NAME, (4e9, 4e9))
    resumed = Trainer.resume(tmp_path / "elsewhere")
    assert (
        resumed.update == 6 and same(finish(resumed), expected) and not (tmp_path / "run").exists()
    )


def test_a_checkpoint_every_so_many_minutes_and_when_asked(tones, tmp_path, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], perf_counter=time.perf_counter, time=time.time
    )
    monkeypatch.setattr(training, "time", clock)
    trainer, run = (
        begun(tones, tmp_path / "run", save_every=100, save_minutes=5.0),
        tmp_path / "run",
    )
    updates, at = trainer.updates(), []
    for minutes in (0, 4, 6, 7, 11.5, 12, 13):
        now[0] = 60.0 * minutes
        trainer.save_soon = minutes == 13
        next(updates)
        at.append(
            checkpoint.load(run).training["update"] if (run / checkpoint.NAME).exists() else 0
        )
    assert at == [0, 0, 3, 3, 5, 6, 7]  # one comes before the validation after update 6


def test_the_best_network_is_kept(tones, tmp_path):
    run, weights, totals = tmp_path / "run", {}, {}
    often = dict(save_every=3, validate_every=2, peak_learning_rate=1e-2)
    trainer = begun(tones, run, updates=20, step1_share=0.5, **often)
    for record in trainer.updates():
        weights[record["update"]] = {n: w.clone() for n, w in trainer.model.named_parameters()}
        if "dev" in record:
            totals[record["update"]] = sum(result["errors"] for result in record["dev"].values())
    assert len(set(totals.values())) > 1
    best = min(totals, key=totals.get)
    loaded = checkpoint.load(run / "best.pt")
    assert same(dict(loaded.model.named_parameters()), weights[best])
    assert loaded.longest_seconds == trainer.longest_seconds == pytest.approx(0.8)
    with pytest.raises(ValueError, match="no training can go on"):
        Trainer.resume(run / "best.pt")


def test_too_little_memory_is_an_error_before_the_first_update(tones, tmp_path, monkeypatch):
    trainer, seen = begun(tones, tmp_path / "run", batch_seconds=3.0), []
    frames, run = trainer.examples.frames(), trainer.add_gradients

    def full(batch, *arguments, **named):
        seen.append(batch.lengths.max().item() * len(batch.lengths))
        if len(seen) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return run(batch, *arguments, **named)

    monkeypatch.setattr(trainer, "add_gradients", full)
    with pytest.raises(
        ValueError,
        match=r"largest batch.*--batch-seconds 3 .*--accumulate.*--checkpoint-activations",
    ):
        next(trainer.updates())
    plans = [training.epoch_plan(frames, trainer.config, epoch) for epoch in range(3)]
    most = [max(len(batch) * max(frames[i] for i in batch) for batch in plan) for plan in plans]
    assert seen == [most[0]] * 2 and max(most) <= 1.2 * most[0]
    assert all(weight.grad is None for weight in begun(tones, tmp_path / "b").model.parameters())


def test_activations_computed_again_give_the_same_weights(tones, tmp_path):
    weights = [
        finish(begun(tones, tmp_path / str(on), checkpoint_activations=on, dropout=0.2))
        for on in (False, True)
    ]
    assert same(*weights)


def test_accumulated_batches_make_one_update(tones, tmp_path):
    trainer = begun(tones, tmp_path / "run", accumulate=3, batch_seconds=2.0, updates=4)
    records = list(trainer.updates())
    assert trainer.state["batches"] == 12 and all(
        math.isfinite(sum(r["losses"].values())) for r in records
    )
    assert sum(record["audio_seconds"] for record in records) > 3 * 4 * 0.8
