"""Several processes train as one: the same gradients, one run directory, and an end for all when one of them dies."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny

from dynsize import checkpoint, processes
from dynsize.config import Config
from dynsize.training import Trainer

HERE = Path(__file__).parent
CASES = {
    "step 1": (0, dict()),
    "step 1, soft": (0, dict(relaxation="soft")),
    "step 1, zeroing out": (9, dict(method="iterative-zero-out", zero_out_delta=2)),
    "step 2": (18, dict(sizes=(3, 5, 6, 8), stochastic_depth=0.0)),
    "step 2, stochastic depth": (18, dict(stochastic_depth=0.4)),
    "layerdrop": (5, dict(method="layerdrop", shared_head=True)),
    "activations computed again": (18, dict(checkpoint_activations=True)),
}


def configured(corpus: str, case: str, batches: int) -> Config:
    """`batches`: of an update, in all processes together."""
    changes = dict(corpus=corpus, updates=20, batch_seconds=2.0, clip=0.0, dropout=0.2, stochastic_depth=0.3)
    return tiny(**changes | CASES[case][1] | dict(accumulate=batches // processes.count()))


def gradients(corpus: str, case: str, batches: int, folder: Path) -> dict[str, torch.Tensor]:
    """Those of one update, in the middle of a training, as the optimizer gets them; zeros where it gets none."""
    trainer = Trainer(configured(corpus, case, batches), folder)
    trainer.state |= dict(update=CASES[case][0], batches=CASES[case][0])
    for parameter in trainer.model.parameters():  # so that no layer is nothing, as all are at the start
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    seen = {}

    def keep() -> None:
        for name, weight in trainer.model.named_parameters():
            seen[name] = torch.zeros(0) if weight.grad is None else weight.grad.clone()

    trainer.optimizer.step = keep
    trainer.train_on([next(batch) for batch in [trainer.batches()] for _ in range(trainer.config.accumulate)])
    return seen


def torchrun(count: int, *command: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        *map(str, command),
    ]


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
    assert together.keys() == alone.keys()
    assert {name for name in alone if len(alone[name]) == 0} == {n for n in together if len(together[n]) == 0}
    joined, expected = (torch.cat([grads[name].flatten().double() for name in alone]) for grads in (together, alone))
    assert expected.norm() > 0.1 and (joined - expected).norm() <= 1e-6 * expected.norm()


if __name__ == "__main__":
    processes.join()
    found = {f"{case} {n}": gradients(sys.argv[1], case, n, Path(sys.argv[2])) for case in CASES for n in (2, 4)}
    if not processes.rank():
        torch.save(found, Path(sys.argv[2]) / "gradients.pt")
