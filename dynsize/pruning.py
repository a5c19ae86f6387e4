"""What prune.py does: the choice of sizes, the files of subnets, and learning to prune a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dynsize import checkpoint
from dynsize.algorithms import shuffled
from dynsize.config import Config, with_method
from dynsize.run_directory import check_new
from dynsize.subnet import cut, largest_within, widened
from dynsize.supernet import Supernet
from dynsize.training import Trainer

RANKINGS = ("learned", "first", "random")


def learner(
    loaded: checkpoint.Checkpoint,
    method: str,
    sizes: Sequence[int],
    updates: int | None,
    folder: Path,
    overwrite: bool,
) -> Trainer:
    """Return a training that learns which layers of a full-size model to keep, in a new run.

    Without `sizes`: a third and two thirds of the layers. `updates`: of both steps; None: a third
    of the model's. Raises ValueError for values that can't be, and where the new run would replace
    the model.
    """
    if updates is None:
        updates = max(1, loaded.model.config.updates // 3)
    if updates < 0:
        raise ValueError(f"--updates {updates}: must be 0 or more")
    model_file = loaded.path.resolve()
    if folder.resolve() in [model_file, *model_file.parents]:
        raise ValueError(f"--output {folder}: has the model {loaded.path}; choose another folder")
    config = learner_settings(loaded.model.config, method, sizes, max(1, updates))
    model = widened(loaded.model, config)
    initial = dataclasses.replace(loaded, model=model, training=None)
    check_new(folder, overwrite)
    trainer = Trainer(config, folder, initial).begin()
    if updates == 0:
        trainer.save()
    return trainer


def learner_settings(old: Config, method: str, sizes: Sequence[int], updates: int) -> Config:
    """Return the settings with which a model's layers are learned; `old`: those of the model."""
    smaller = sizes or (old.layers // 3, 2 * old.layers // 3)
    all_sizes = {*smaller, old.layers}
    return with_method(
        old,
        method,
        size=0,
        sizes=tuple(sorted(all_sizes)),
        layers_from="",
        teacher="",
        updates=updates,
        log_every=min(old.log_every, updates),
        validate_every=min(old.validate_every, updates),
        save_every=min(old.save_every, updates),
    )


def rank(model: Supernet, ranking: str, seed: int) -> None:
    """Give a supernet another ranking than the one it learned: the first layers, or random ones."""
    layers = model.config.layers
    if ranking == "first":
        model.ranking = list(range(layers))
    if ranking == "random":
        model.ranking = shuffled(layers, seed)


def named(file: Path, ranking: str) -> Path:
    """Return the path of a file for a ranking: `size-7.pt` for the learned one, else another name.

    Example: `size-7-random.pt` for the random one.
    """
    return file if ranking == "learned" else file.with_stem(f"{file.stem}-{ranking}")


def sizes_to_cut(
    model: Supernet, sizes: Sequence[int], budgets: dict[str, float], seconds: float
) -> list[int]:
    """Return the sizes that were asked for, largest first, with the largest within all budgets.

    Without sizes and budgets: all that were trained, but for the full one. `budgets`: as in
    `subnet.largest_within`, whose milliseconds are those for `seconds` of audio.
    """
    asked = set(sizes)
    within = [largest_within(model, name, limit, seconds) for name, limit in budgets.items()]
    if within:
        asked.add(min(within))
    if not asked:
        asked.update(model.sizes[:-1])
    return sorted(asked, reverse=True)


def nearest_trained(model: Supernet, size: int) -> list[int]:
    """Return the two trained sizes next to one that was never trained; nothing for one that was."""
    if size in model.sizes or model.size is not None:
        return []
    by_distance = sorted(model.sizes, key=lambda trained: abs(trained - size))
    return sorted(by_distance[:2])


def write_subnets(
    supernet: checkpoint.Checkpoint, files: dict[int, Path], overwrite: bool
) -> list[checkpoint.Checkpoint]:
    """Write the subnet of each size to its file, and return what is read back.

    Raises ValueError, and then has written nothing, for a size that the supernet can't have, for
    files that exist unless they may be replaced, and for the supernet's file.
    """
    subnets = {size: cut(supernet.model, size) for size in files}
    for file in files.values():
        if file.resolve() == supernet.path.resolve():
            raise ValueError(f"{file}: is the supernet itself; --output names another folder")
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: exists already; --overwrite replaces it")
    for size, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        longest = supernet.longest_seconds
        checkpoint.save(file, subnets[size], supernet.tokenizer, longest_seconds=longest)
    return [checkpoint.load(file) for file in files.values()]
