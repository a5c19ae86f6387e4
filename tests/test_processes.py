"""Several processes train as one: the same gradients, one run directory, one end for all."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import network, one_update, tiny
from in_process import ROOT, TINY

from dynsize import checkpoint, processes
from dynsize.config import Config
from dynsize.training import Trainer

TRAIN = ROOT / "train.py"
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


def configured(corpus: str, case: str, batches: int) -> Config:
    """`batches`: of an update, in all processes together."""
    changes = dict(
        corpus=corpus, updates=20, batch_seconds=2.0, clip=0.0, dropout=0.2, stochastic_depth=0.3
    )
    return tiny(**changes | CASES[case][1] | dict(accumulate=batches // processes.count()))


def gradients(corpus: str, case: str, batches: int, folder: Path) -> dict[str, torch.Tensor]:
    """Return the gradients that the optimizer gets in one update; empty where it gets none."""
    trainer = Trainer(configured(corpus, case, batches), folder)
    trainer.state |= dict(update=CASES[case][0], batches=CASES[case][0])
    for weight in trainer.model.parameters():  # a new layer is the identity
        generator = torch.Generator().manual_seed(weight.numel())
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
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
    one_update(trainer, taken)
    return seen


def torchrun(count: int, *command: object) -> list[str]:
    start = f"-m torch.distributed.run --standalone --nproc-per-node={count} --"
    return [sys.executable, *start.split(), *map(str, command)]


@pytest.fixture(scope="module")
def of_two(tones, tmp_path_factory) -> dict[str, dict]:
    """Of two processes: case and number of batches → gradients of one update."""
    folder = tmp_path_factory.mktemp("two")
    subprocess.run(torchrun(2, __file__, tones, folder), check=True, timeout=300)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("batches", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(tones, of_two, tmp_path, case, batches):
    together = of_two[f"{case} {batches}"]
    alone = gradients(str(tones), case, batches, tmp_path)
    assert {name: len(grad) for name, grad in together.items()} == {
        name: len(grad) for name, grad in alone.items()
    }
    joined = torch.cat([together[name].flatten().double() for name in alone])
    expected = torch.cat([grad.flatten().double() for grad in alone.values()])
    assert expected.norm() > 0.1 and (joined - expected).norm() <= 1e-6 * expected.norm()


def test_all_processes_start_with_the_weights_and_the_ranking_of_the_first(of_two):
    assert of_two["alike"]["processes"] == 2


def trained(cwd: Path, *command: object, processes: int) -> subprocess.Popen:
    """`train.py`, or another script, in this number of processes."""
    started = torchrun(processes, *command)
    if processes == 1:
        started = [sys.executable, *map(str, command)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(started, cwd=cwd, text=True, **pipes)


def wait_for_metrics(training: subprocess.Popen, run: Path) -> None:
    """Wait until a training has logged an update, or has ended."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and training.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_save_and_end_where_torchrun_is_killed(tones, tmp_path):
    often = "--run run --updates 9999 --validate-every 9999 --save-every 9999 --log-every 1".split()
    training = trained(tmp_path, TRAIN, "--corpus", tones, *SMALL, *often, processes=2)
    wait_for_metrics(training, tmp_path / "run")
    training.kill()
    out, err = training.communicate(timeout=120)  # until the last process closes its output
    assert f"saved at update {checkpoint.load(tmp_path / 'run').training['update']};" in out, err


def test_two_processes_train_one_run_and_another_number_resumes_it(tones, tmp_path):
    often = "--run run --updates 1000 --validate-every 500 --save-every 1000 --log-every 1".split()
    training = trained(tmp_path, TRAIN, "--corpus", tones, *SMALL, *often, processes=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_metrics(training, metrics.parent)
    os.kill(training.pid, signal.SIGTERM)
    out, err = training.communicate(timeout=120)
    assert training.returncode and "stopped and saved at update" in out, err
    assert out.count("network") == 1 and "strides" not in err and "Warning" not in err, err
    stopped = checkpoint.load(tmp_path / "run")
    done = stopped.training["update"]
    assert 1 <= done < 1000 and stopped.training["batches"] == 2 * done
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, done + 1))
    shorter = dataclasses.replace(stopped.model.config, updates=done + 3, step1_share=0.0)
    stopped.model.config = shorter
    checkpoint.save(stopped.path, stopped.model, stopped.tokenizer, stopped.training)
    out, err = trained(tmp_path, TRAIN, "--resume", "run", processes=1).communicate(timeout=120)
    assert "batches of an update, in all processes: 1, and not 2 as before" in err
    ended = checkpoint.load(tmp_path / "run").training
    assert (ended["update"], ended["batches"]) == (done + 3, 2 * done + 3), err
    assert "done: run" in out


def test_dev_errors_of_two_processes_are_those_of_one(tones, tmp_path):
    results = {}
    for count in (1, 2):
        often = f"--updates 2 --validate-every 1 --accumulate {2 // count}".split()
        flags = ["--corpus", tones, *SMALL, *often]
        training = trained(tmp_path, TRAIN, "--run", f"run{count}", *flags, processes=count)
        out, err = training.communicate(timeout=120)
        assert training.returncode == 0, err
        lines = (tmp_path / f"run{count}" / "metrics.jsonl").read_text().splitlines()
        results[count] = [line["dev"] for line in map(json.loads, lines) if "dev" in line]
        assert out.count("error rate on dev") == 2  # one process prints, though two decode
    assert results[1] == results[2] and results[1][0]["8"]["words"] > 0


@pytest.mark.parametrize("flags", ["--corpus nowhere", "--kernel 8"])
def test_under_torchrun_our_line_comes_first_and_no_traceback_is_ours(tmp_path, flags):
    training = trained(tmp_path, TRAIN, *flags.split(), processes=2)
    _, err = training.communicate(timeout=120)
    ours = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(ours) == 1 and err.startswith(ours[0]) and 'train.py", line' not in err, err
    codes = re.findall(r"exitcode +: (-?\d+)", err)
    assert set(codes) <= {"2", "-15"} and "2" in codes  # torchrun may end the second one first


if __name__ == "__main__":
    processes.join()
    found = {
        f"{case} {n}": gradients(sys.argv[1], case, n, Path(sys.argv[2]))
        for case in CASES
        for n in (2, 4)
    }
    model, first = network(seed=processes.number()), network(seed=0)
    processes.start_alike(model)
    pairs = zip(model.parameters(), first.parameters(), strict=True)
    alike = model.ranking == first.ranking and all(torch.equal(*pair) for pair in pairs)
    found["alike"] = dict(processes=processes.total(torch.tensor(float(alike))))
    if processes.is_first():
        torch.save(found, Path(sys.argv[2]) / "gradients.pt")
