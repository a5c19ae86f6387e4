#!/usr/bin/env python
"""Trains a supernet. Without arguments: the preset demo, on speech that espeak-ng makes, in ten minutes on a CPU."""

import argparse
import io
import signal
import sys
import typing
from pathlib import Path

from tqdm import tqdm

from dynsize import config as configuration
from dynsize import processes
from dynsize.checkpoint import NAME
from dynsize.corpora import summary
from dynsize.study import next_training, results
from dynsize.training import Trainer, check_new


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. The defaults shown are those of the preset that it names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo", choices=configuration.PRESETS)
    name = first.parse_known_args(arguments)[0].preset
    preset = configuration.preset(name)
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        epilog=f"Defaults are those of the preset {name}; --preset P --help shows another's.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110),
    )
    parser.add_argument(
        "--preset", default="demo", choices=configuration.PRESETS, help="table of defaults (demo)"
    )
    parser.add_argument("--run", type=Path, help=f"directory for the results (runs/{name})")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run directory if it is there"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with a training; no other flag is allowed"
    )
    both = f"train by both algorithms and each size alone, for one table in runs/study-{name}; repeated it goes on"
    parser.add_argument("--study", action="store_true", help=both)
    types, groups = typing.get_type_hints(configuration.Config), {}
    for field in configuration.fields():
        section = field.metadata["section"]
        group = groups[section] = groups.get(section) or parser.add_argument_group(section)
        options = flag_options(types[field.name])
        default = configuration.shown(getattr(preset, field.name))
        help_text = f"{field.metadata['help']} ({default})".replace("%", "%%")
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=help_text,
            **options,
        )
    parsed = parser.parse_args(arguments)
    if parsed.resume and len(arguments) > 2:
        parser.error("--resume goes on as the run was configured: it stands alone")
    if parsed.study and parsed.overwrite:
        parser.error(
            "--study goes on where it was stopped and replaces nothing; --run names another folder"
        )
    return parsed


def flag_options(kind: type) -> dict:
    """What argparse needs to know to read a value of a configuration field's type."""
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if typing.get_origin(kind) is tuple:
        return dict(
            type=typing.get_args(kind)[0],
            nargs="+",
            metavar=typing.get_args(kind)[0].__name__.upper(),
        )
    return dict(type=kind, metavar=kind.__name__.upper())


def configured(options: argparse.Namespace) -> configuration.Config:
    """The preset with what the command line changes of it."""
    changes = {
        f.name: getattr(options, f.name) for f in configuration.fields() if hasattr(options, f.name)
    }
    changes = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return configuration.preset(options.preset, **changes)


def start(options: argparse.Namespace) -> Trainer:
    """The trainer in its run directory, new or resumed. Raises ValueError for bad input; then nothing was changed."""
    if options.resume:
        return Trainer.resume(options.resume)
    config, run = configured(options), options.run or Path("runs") / options.preset
    check_new(run, options.overwrite)
    return Trainer(config, run).begin()


def study(options: argparse.Namespace) -> None:
    """Runs or continues all trainings of a study, then shows its table."""
    config, folder = configured(options), options.run or Path("runs") / f"study-{options.preset}"
    while trainer := next_training(config, folder):
        train(trainer)
        del trainer  # before the next one reads its corpus
    print(results(config, folder))
    print(f"done: {folder / 'study.md'}, {folder / 'study.json'}")


def describe(trainer: Trainer) -> None:
    """Prints what is about to be trained, on what."""
    config = trainer.config
    print("corpus     " + summary(trainer.corpus, config).replace("\n", "\n           "))
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    print(
        f"network    {config.blocks} blocks, {config.layers} layers of width {config.width}, {weights:,} parameters"
    )
    print(f"labels     {trainer.tokenizer.labels} with the blank")
    sizes = f"sizes {configuration.shown(config.sizes)}, {config.updates} updates"
    print(f"training   {config.method}, {sizes} → {trainer.run}")


def train(trainer: Trainer) -> None:
    """Trains, with a progress bar, to the end or a signal, which saves and ends the program; SIGUSR1 only saves."""
    describe(trainer)
    config, silent = trainer.config, processes.rank() > 0
    signal.signal(signal.SIGUSR1, lambda *_: setattr(trainer, "save_soon", True))
    for end in (signal.SIGINT, signal.SIGTERM):  # a second one ends at once
        signal.signal(
            end, lambda n, _: setattr(trainer, "stop_soon", n) or signal.signal(n, signal.SIG_DFL)
        )
    with tqdm(
        total=config.updates,
        initial=trainer.update,
        unit="update",
        dynamic_ncols=True,
        disable=silent,
    ) as bar:
        for record in trainer.updates():
            loss = " ".join(f"{loss:.2f}" for loss in record.get("losses", {}).values())
            speed = record["audio_seconds"] / record["seconds"]
            bar.set_description_str(
                f"step {record['step']}, sizes {' '.join(map(str, record['sizes']))}", refresh=False
            )
            bar.set_postfix_str(
                f"loss {loss}, lr {record['learning_rate']:.1e}, {speed:.0f} audio s/s",
                refresh=False,
            )
            bar.update(record["update"] - bar.n)
            for size, result in record.get("dev", {}).items():
                kept = "all" if size == config.layers else " ".join(result["layers"])
                bar.write(
                    f"update {record['update']:>6}  size {size:>3}  dev WER {100 * result['wer']:6.2f}%  keeps {kept}"
                )
            if record["stop"]:
                bar.close()
                print(
                    f"stopped and saved at update {trainer.update}; python train.py --resume {trainer.run} goes on"
                )
                sys.exit(128 + (trainer.stop_soon or signal.SIGTERM))


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        processes.join()
        if processes.rank():
            sys.stdout = io.StringIO()  # one of them speaks
        if options.study and processes.count() > 1:
            raise ValueError("--study trains in one process, without torchrun")
        if options.study:
            study(options)
        else:
            trainer = start(options)
            train(trainer)
            print(f"done: {trainer.run / NAME}; python prune.py {trainer.run} cuts its subnets")
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
