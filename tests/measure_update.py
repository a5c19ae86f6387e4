"""Print the time of an update of step 2 over that of the full size alone, and their layer-rows.

    python tests/measure_update.py RUN [BATCH_SECONDS]

`RUN`: a run of any corpus; its ranking decides what the sizes share. No test: it asserts nothing.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from dynsize import checkpoint
from dynsize.batching import Batch
from dynsize.config import LAYERS
from dynsize.steps import planned
from dynsize.training import Trainer

ROUNDS = 15


def measured(trainer: Trainer, batch: Batch) -> tuple[float, int]:
    """Return the seconds of one update, and the layer-rows that its forward pass computes."""
    rows = []
    hooks = [
        block[kind].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        for block in trainer.model.encoder.blocks
        for kind in LAYERS
    ]
    start = time.perf_counter()
    trainer.add_gradients(planned(trainer.model, trainer.done), [batch], labels=1, readers=1)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return seconds, sum(rows)


def main(run: Path, batch_seconds: str | None = None) -> None:
    loaded = checkpoint.load(run)
    config = replace(loaded.model.config, step1_share=0.0, updates=10 * ROUNDS)
    config = replace(config, batch_seconds=float(batch_seconds or config.batch_seconds))
    with tempfile.TemporaryDirectory() as folder:
        together = Trainer(config, Path(folder))
        together.model.ranking = loaded.model.ranking
        full = replace(config, sizes=config.sizes[-1:], stochastic_depth=0.0)
        alone = Trainer(full, Path(folder))
        rounds = []
        for batch in islice(together.batches(), ROUNDS + 1):
            rounds.append((*measured(together, batch), *measured(alone, batch)))
    times = [of_all / of_full for of_all, _, of_full, _ in rounds[1:]]
    _, rows, _, rows_of_full = rounds[-1]
    milliseconds = 1000 * statistics.median(seconds for seconds, *_ in rounds[1:])
    print(f"sizes {config.sizes}, batches of {config.batch_seconds:g} s, {ROUNDS} rounds in turn")
    print(f"layer-rows {rows / rows_of_full:.2f} times those of the full size alone")
    print(f"time       {statistics.median(times):.2f} times (median; {milliseconds:.0f} ms)")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
