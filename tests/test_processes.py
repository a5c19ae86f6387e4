"""Several processes train as one: the same gradients, one run directory, one end for all."""

import atexit
import dataclasses
import os
import platform
import re
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import logged, network, one_update, tiny
from in_process import ROOT, TINY, done_well, wait_until

from dynsize import checkpoint, processes
from dynsize.training import Trainer

TRAIN = ROOT / "train.py"
TAKE_MEMORY = """
import resource, torch
from dynsize.processes import keep_freed_memory
keep_freed_memory()
for tensor in range(23):
    torch.ones(10**7)
    if tensor == 2:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""
SMALL = [*TINY, "--batch-seconds", "2"]
CASES = {
    "step 1": (0, dict()),
    "step 1, soft": (0, dict(relaxation="soft")),
    "step 1, zeroing out": (9, dict(method="iterative-zero-out", delta=2)),
    "step 1, orthogonal rows": (9, dict(method="ortho-softmax")),
    "step 2": (18, dict(sizes=(3, 5, 6, 8), stochastic_depth=0.0)),
    "step 2, stochastic depth": (18, dict(stochastic_depth=0.4)),
    "layerdrop": (5, dict(method="layerdrop", shared_output_layer=True)),
    "step 2, transducer": (18, dict(output="transducer")),
    "step 2, attention": (18, dict(output="attention")),
    "step 2, self-distillation": (18, dict(self_distillation=0.5)),
    "activations computed again": (18, dict(checkpoint_activations=True)),
    "step 1, one reads nothing": (9, dict(method="ortho-softmax")),
    "step 2, one reads nothing": (18, dict(sizes=(3, 5, 6, 8))),
}
TWICE = [case for case in CASES if case in ("step 1", "step 2") or "nothing" in case]
BATCHES = [*((case, 2) for case in CASES), *((case, 4) for case in TWICE)]


def gradients(corpus: str, case: str, batches: int, folder: Path) -> dict[str, torch.Tensor]:
    """Return the gradients that the optimizer gets in one update, empty where it gets none.

    Beside them, as `losses`, those of the log.
    """
    update, settings = CASES[case]
    settings = dict(updates=20, batch_seconds=2.0, clip=0.0, dropout=0.2) | settings
    settings |= dict(corpus=corpus, accumulate=batches // processes.count())
    trainer = randomised(settings, folder)
    trainer.state |= dict(update=update, batches=update)
    seen = {}

    def keep() -> None:
        for name, weight in trainer.model.named_parameters():
            seen[name] = torch.zeros(0) if weight.grad is None else weight.grad.clone()

    trainer.optimizer.step = keep
    taken = list(islice(trainer.data.batches(trainer.state, pin=False), trainer.config.accumulate))
    for place, batch in enumerate(taken):
        number = processes.number() + place * processes.count()
        if "reads nothing" in case and number % 2:
            no_labels = batch.label_lengths[:0]
            taken[place] = dataclasses.replace(batch, utterances=[], label_lengths=no_labels)
    record = one_update(trainer, taken)
    return seen | dict(losses=torch.tensor(list(record["losses"].values())))


def randomised(settings: dict, folder: Path) -> Trainer:
    """Return a training with random weights; a new layer is the identity."""
    trainer = Trainer(tiny(**settings), folder)
    for weight in trainer.model.parameters():
        generator = torch.Generator().manual_seed(weight.numel())
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return trainer


def dev_results(corpus: str, folder: Path) -> dict[int, dict]:
    """Return what the log tells of dev."""
    trainer = randomised(dict(corpus=corpus), folder)
    return trainer.dev.results(trainer.model)


def torchrun(count: int, *command: object) -> list[str]:
    start = f"-m torch.distributed.run --standalone --nproc-per-node={count} --"
    return [sys.executable, *start.split(), *map(str, command)]


@pytest.fixture(scope="module")
def of_two(tones, tmp_path_factory) -> dict[str, dict]:
    """Of two processes: case and number of batches → gradients of one update."""
    folder = tmp_path_factory.mktemp("two")
    subprocess.run(torchrun(2, __file__, tones, folder), check=True, timeout=300)
    threads = (folder / "threads").read_text()
    return torch.load(folder / "gradients.pt", weights_only=True) | dict(threads=threads)


def note_threads(file: Path) -> None:
    """Write the names of the threads of this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names.append((task / "comm").read_text().strip())
    file.write_text(" ".join(names))


@pytest.mark.parametrize("case, batches", BATCHES)
def test_two_processes_have_the_gradients_of_one(tones, of_two, tmp_path, case, batches):
    together = of_two[f"{case} {batches}"]
    alone = gradients(str(tones), case, batches, tmp_path)
    torch.testing.assert_close(together.pop("losses"), alone.pop("losses"), rtol=1e-6, atol=0)
    shapes = [[(name, len(grad)) for name, grad in of.items()] for of in (together, alone)]
    assert shapes[0] == shapes[1]
    joined = torch.cat([together[name].flatten().double() for name in alone])
    expected = torch.cat([grad.flatten().double() for grad in alone.values()])
    assert expected.norm() > 0.1 and (joined - expected).norm() <= 1e-6 * expected.norm()


def test_all_processes_start_with_the_weights_and_the_ranking_of_the_first(of_two):
    assert of_two["alike"]["processes"] == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is glibc's")
def test_the_memory_of_a_freed_tensor_is_used_again():
    faults = subprocess.check_output([sys.executable, "-c", TAKE_MEMORY], cwd=ROOT)
    # Of 20 tensors of 9,766 pages; a few may lie where none was before.
    assert int(faults) < 20 * 9_766 / 2


def test_no_thread_of_gloo_is_left_when_a_process_ends(of_two):
    assert "python" in of_two["threads"] and "gloo" not in of_two["threads"]


def trained(cwd: Path, *flags: object) -> subprocess.Popen:
    """`train.py` in two processes."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(torchrun(2, TRAIN, *flags), cwd=cwd, text=True, **pipes)


@pytest.mark.parametrize("which", ["torchrun", "the second"])
def test_processes_save_and_end_where_one_is_killed(tones, tmp_path, which):
    often = "--run run --updates 9999 --validate-every 9999 --save-every 9999 --log-every 1".split()
    training = trained(tmp_path, "--corpus", tones, *SMALL, *often)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() or training.poll() is not None)
    children = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
    os.kill(training.pid if which == "torchrun" else max(map(int, children)), signal.SIGKILL)
    out, err = training.communicate(timeout=120)  # until the last process closes its output
    done = checkpoint.load(tmp_path / "run").training["update"]
    said = f"saved at update {done};" if which == "torchrun" else "train.py: another process ended"
    assert (out + err).count(said) == 1 and 'train.py", line' not in err, err
    assert done == logged(tmp_path / "run")[-1]["update"]


def test_two_processes_train_one_run_and_another_number_resumes_it(tones, tmp_path):
    often = "--run run --updates 1000 --validate-every 500 --save-every 1000 --log-every 1".split()
    training = trained(tmp_path, "--corpus", tones, *SMALL, *often)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() or training.poll() is not None)
    os.kill(training.pid, signal.SIGTERM)
    out, err = training.communicate(timeout=120)
    assert training.returncode and "stopped and saved at update" in out, err
    assert out.count("network") == 1 and "strides" not in err and "Warning" not in err, err
    stopped = checkpoint.load(tmp_path / "run")
    done = stopped.training["update"]
    assert 1 <= done < 1000 and stopped.training["batches"] == 2 * done
    assert [line["update"] for line in logged(tmp_path / "run")] == list(range(1, done + 1))
    shorter = dataclasses.replace(stopped.model.config, updates=done + 3, step1_share=0.0)
    stopped.model.config = shorter
    checkpoint.save(stopped.path, stopped.model, stopped.tokenizer, stopped.training)
    with pytest.warns(UserWarning, match="in all processes: 1, and not 2 as before"):
        assert "done: run" in done_well("train.py", "--resume", "run", cwd=tmp_path).stdout
    ended = checkpoint.load(tmp_path / "run").training
    assert (ended["update"], ended["batches"]) == (done + 3, 2 * done + 3)


def test_dev_errors_of_two_processes_are_those_of_one(tones, of_two, tmp_path):
    alone = dev_results(str(tones), tmp_path)
    assert of_two["dev"] == alone and alone[8]["errors"] > 0


@pytest.mark.parametrize("flags", ["--corpus nowhere", "--kernel 8"])
def test_under_torchrun_our_line_comes_first_and_no_traceback_is_ours(tmp_path, flags):
    training = trained(tmp_path, *flags.split())
    _, err = training.communicate(timeout=120)
    ours = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(ours) == 1 and err.startswith(ours[0]) and 'train.py", line' not in err, err
    codes = re.findall(r"exitcode +: (-?\d+)", err)
    assert set(codes) <= {"2", "-15"} and "2" in codes  # torchrun may end the second one first


if __name__ == "__main__":
    atexit.register(note_threads, Path(sys.argv[2]) / "threads")  # runs after the group is left
    processes.join()
    corpus, folder = sys.argv[1], Path(sys.argv[2])
    found = {f"{case} {n}": gradients(corpus, case, n, folder) for case, n in BATCHES}
    found["dev"] = dev_results(corpus, folder)
    model, first = network(seed=processes.number()), network(seed=0)
    processes.start_alike(model)
    pairs = zip(model.parameters(), first.parameters(), strict=True)
    alike = model.ranking == first.ranking and all(torch.equal(*pair) for pair in pairs)
    found["alike"] = dict(processes=processes.total(torch.tensor(float(alike))))
    if processes.is_first():
        torch.save(found, folder / "gradients.pt")
