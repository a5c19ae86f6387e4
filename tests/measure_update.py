"""Time of one update of step 2 against one of the full size alone, beside the layer-rows that each computes.

    python tests/measure_update.py RUN [BATCH_SECONDS]

`RUN`: a run of any corpus; its ranking decides what is shared. No test: it prints, and asserts nothing.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from dynsize import checkpoint
from dynsize.config import LAYERS
from dynsize.training import Trainer

ROUNDS = 15


def main(run: Path, batch_seconds: str | None = None) -> None:
    loaded = checkpoint.load(run)
    config = replace(loaded.model.config, step1_share=0.0, updates=10 * ROUNDS)
    config = replace(config, batch_seconds=float(batch_seconds or config.batch_seconds))
    with tempfile.TemporaryDirectory() as folder:
        together = Trainer(config, Path(folder))
        together.model.ranking = loaded.model.ranking
        alone = Trainer(
            replace(config, sizes=config.sizes[-1:], stochastic_depth=0.0), Path(folder)
        )
        rows, times = {}, {together: [], alone: []}
        for batch, _ in zip(together.batches(), range(ROUNDS + 1), strict=False):
            for trainer, taken in times.items():
                count = rows[trainer] = [0]
                hooks = [
                    block[kind].register_forward_pre_hook(
                        lambda _, inputs, count=count: count.__setitem__(
                            0, count[0] + inputs[0].shape[0]
                        )
                    )
                    for block in trainer.model.encoder.blocks
                    for kind in LAYERS
                ]
                start = time.perf_counter()
                trainer.train_on([batch])
                taken.append(time.perf_counter() - start)
                for hook in hooks:
                    hook.remove()
    ratios = [a / b for a, b in zip(times[together][1:], times[alone][1:], strict=True)]
    print(
        f"sizes {config.sizes}, batches of {config.batch_seconds:g} s, medians of {ROUNDS} rounds in turn"
    )
    print(f"layer-rows {rows[together][0] / rows[alone][0]:.2f} times those of the full size alone")
    print(
        f"time       {statistics.median(ratios):.2f} times ({1000 * statistics.median(times[together][1:]):.0f} ms)"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
