"""What may change from a training to its continuation."""

import dataclasses
import warnings

from dynsize import processes
from dynsize.config import Config
from dynsize.training_data import TrainingData

# What a resumed training may change without changing what is learned. `corpus`, `teacher`: the
# same ones, elsewhere.
FREE = (
    *("device", "workers", "cache_features", "corpus", "corpus_kind", "most_left_out"),
    "teacher",
    *("log_every", "validate_every", "save_every", "save_minutes", "keep"),
)
# What it may change too, though the result is then not that of an unbroken training.
WITH_A_NOTE = ("batch_seconds", "accumulate")


def changed(config: Config, changes: dict[str, object]) -> Config:
    """Return the settings of a training that is resumed with changes.

    Warns of those with which the result is not that of an unbroken training, and raises
    ValueError for those that change what is learned.
    """
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in WITH_A_NOTE:
            warnings.warn(f"{flag}: the result is not that of an unbroken training", stacklevel=3)
        elif name not in FREE:
            raise ValueError(f"{flag} with --resume: it would change what is learned")
    return dataclasses.replace(config, **changes)


def tell_other_batches(before: int, now: int) -> None:
    """Warn where an update had another number of batches, in all processes, in the checkpoint."""
    if now != before and processes.is_first():
        warnings.warn(
            f"batches of an update, in all processes: {now}, and not {before} as before: the "
            "result is not that of an unbroken training",
            stacklevel=2,
        )


def tell_other_corpus(before: str, data: TrainingData) -> None:
    """Warn where the training utterances are not those whose fingerprint the checkpoint has."""
    if data.fingerprint != before and processes.is_first():
        warnings.warn(
            f"{data.config.corpus}: the ids or texts of its {len(data.corpus.utterances)} "
            "utterances are not those with which this training began",
            stacklevel=2,
        )
