#!/usr/bin/env python
"""Train a supernet, from which prune.py cuts subnets of several sizes.

Without flags: the preset demo, on speech that espeak-ng makes, in three to twenty minutes.
With --corpus: the preset small, for one to ten hours of speech, in one to three hours.
"""

import argparse
import io
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

from dynsize import config as configuration
from dynsize import processes
from dynsize.checkpoint import NAME
from dynsize.initial import beginning
from dynsize.processes import hardware, use_threads
from dynsize.run_directory import check_new, to_tensorboard
from dynsize.study import next_training, plan, results
from dynsize.subnet import layer_legend, parameters
from dynsize.terminal import Parser, Progress, reported, run_to_end
from dynsize.text import counted
from dynsize.training import Trainer

EXAMPLES = """\
  python train.py                                     the demo, in runs/demo
  python train.py --preset librispeech --help         another preset's settings
  python train.py --preset librispeech --corpus /data/LibriSpeech --run runs/mine
  python train.py --corpus mine                       an hour or more of speech: preset small
  python train.py --corpus kaldi --train-splits train --dev-splits dev --test-splits test
  python train.py --resume runs/mine --threads 4      go on after a stop
  python train.py --init-from runs/mine/size-16.pt --corpus other --run runs/fine-tuned
  python train.py --study 0 1 --preset digits --corpus DIGITS
  torchrun --nproc-per-node 4 -- train.py --preset tedlium2  a process for each of four GPUs"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line, in which only the settings that it names are attributes.

    The defaults shown are those of the method and the preset that it names, or else of the preset
    `small` where it names a corpus, of `demo` where it doesn't.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--corpus", nargs="?", default="spoken")
    first.add_argument("--method", nargs="?", default=configuration.Config.method)
    named = first.parse_known_args(arguments)[0]
    default = "demo" if named.corpus == "spoken" else "small"
    try:
        parser = flags_parser(configuration.preset(named.preset or default, method=named.method))
    except ValueError:  # which the parser says better
        parser = flags_parser(configuration.preset("demo"))
    parsed = parser.parse_args(arguments)
    study = parsed.study is not None
    other = {"--resume": parsed.resume, "--preset": parsed.preset, "--study": study}
    given = [flag for flag, value in other.items() if value]
    if parsed.init_from and given:
        parser.error(f"{given[0]} with --init-from: the settings are those of the checkpoint")
    alone = {"--preset": parsed.preset, "--run": parsed.run, "--study": study}
    alone["--overwrite"] = parsed.overwrite
    given = [flag for flag, value in alone.items() if value]
    if parsed.resume and given:
        parser.error(f"{given[0]} with --resume: a run goes on as it was configured")
    if study and parsed.overwrite:
        parser.error("--overwrite with --study: a study replaces nothing; name another --run")
    if parsed.study and hasattr(parsed, "seed"):
        parser.error("--seed with --study SEED: name the seeds once")
    for name in ("method", "size", "teacher", "layers_from") if study else ():
        if hasattr(parsed, name):
            parser.error(f"{configuration.flag_of(name)} with --study: a study chooses it")
    if parsed.tensorboard and not find_spec("tensorboard"):
        parser.error("--tensorboard needs tensorboard: pip install -e '.[tensorboard]'")
    parsed.preset = parsed.preset or default
    return parsed


def flags_parser(defaults: configuration.Config) -> Parser:
    """Return the parser of all flags, whose help shows these defaults."""
    preset = defaults.preset
    parser = Parser("train.py", __doc__, EXAMPLES)
    parser.add_argument(
        "--preset",
        choices=list(configuration.PRESETS),
        help="table of defaults (demo; small with --corpus); those below are of "
        f"{preset} with --method {defaults.method}",
    )
    parser.add_argument("--run", type=Path, help=f"directory for the results (runs/{preset})")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="rename a run that is there to RUN.old, RUN.old2, …",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with a run; other flags are allowed where they do not change what is learned",
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="begin a new training with the weights of a run, a checkpoint or a size-K.pt, whose "
        "settings it has except for those that flags change; features, network and layers stay. "
        "A supernet learns its scores on in another step 1, unless --step1-share is 0. "
        "The tokenizer stays too, unless --tokenizer, --units or --vocabulary is named: then the "
        "outputs begin anew, as with another --output",
    )
    parser.add_argument(
        "--study",
        type=int,
        nargs="*",
        metavar="SEED",
        help="with the first seed (--seed) train by each algorithm and LayerDrop, and each size "
        "alone (with the first layers, and with those that the paper's two algorithms kept) and "
        "distilled; with further seeds the same by the paper's two algorithms and "
        f"alone. Writes tables and pictures to runs/study-{preset}; the same command goes on after "
        "a stop",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the numbers of metrics.jsonl for TensorBoard too, in RUN/tensorboard",
    )
    add_settings(parser, defaults)
    return parser


def add_settings(parser: Parser, defaults: configuration.Config) -> None:
    """Add a flag for each setting of a configuration, in its sections."""
    types = typing.get_type_hints(configuration.Config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in configuration.fields():
        section = field.metadata["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        default = configuration.shown(getattr(defaults, field.name)) or "none"
        groups[section].add_argument(
            configuration.flag_of(field.name),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} ({default})".replace("%", "%%"),
            **flag_options(types[field.name], field.metadata["choices"]),
        )


def flag_options(kind: type, choices: tuple[str, ...]) -> dict:
    """Return what argparse needs to read a setting of this type."""
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction)
    options: dict = {}
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        options = dict(nargs="+")
    if choices:
        return options | dict(choices=choices)
    return options | dict(type=kind, metavar=kind.__name__.upper())


def changes(options: argparse.Namespace) -> dict[str, typing.Any]:
    """Return the settings that the command line names."""
    names = (field.name for field in configuration.fields())
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def start(options: argparse.Namespace) -> Trainer:
    """Return the trainer in its run directory, new or resumed.

    Raises ValueError for bad input; then nothing was changed.
    """
    if options.resume:
        return Trainer.resume(options.resume, changes(options))
    run = options.run or Path("runs") / options.preset
    with processes.first_alone():
        loaded = None
        if options.init_from:
            loaded = beginning(options.init_from, changes(options))
            config = loaded.model.config
            print(f"weights    of {loaded.path}")
        else:
            config = configuration.preset(options.preset, **changes(options))
        check_new(run, options.overwrite)
    return Trainer(config, run, loaded).begin()


def study(options: argparse.Namespace) -> None:
    """Run or continue all trainings of a study, then show its tables."""
    if processes.count() > 1:
        raise processes.in_first(ValueError("--study trains in one process"))
    config = configuration.preset(options.preset, **changes(options))
    folder = options.run or Path("runs") / f"study-{options.preset}"
    trainings = plan(config, options.study or [config.seed], folder)
    while trainer := next_training(trainings, folder):
        train(trainer, options.tensorboard)
        draw(trainer.run)
        del trainer  # before the next one reads its corpus
    print(results(config, trainings, folder))
    print(f"done: {folder / 'study.md'}, {folder / 'study.json'}")
    draw(folder)


def describe(trainer: Trainer) -> None:
    """Print what is about to be trained, on what."""
    config, model = trainer.config, trainer.model
    blocks = counted(config.blocks, "block")
    print("corpus     " + trainer.data.summary.replace("\n", "\n           "))
    print(
        f"network    {blocks}, {model.sizes[-1]} layers of width {config.width}, "
        f"{parameters(model):,} parameters, {trainer.data.tokenizer.labels} labels with the blank"
    )
    print(f"device     {hardware(config, trainer.device)}")
    sizes = f"sizes {configuration.shown(model.sizes)}, {counted(config.updates, 'update')}"
    print(f"training   {config.method}, {sizes}, in {trainer.run}")
    print(f"layers     {layer_legend(config)}", flush=True)


def train(trainer: Trainer, tensorboard: bool = False) -> None:
    """Train to the end, or to a signal, which saves and ends the program."""
    describe(trainer)
    if tensorboard and processes.is_first():
        trainer.listeners.append(to_tensorboard(trainer.run))
    progress = Progress(trainer.config, trainer.model, trainer.done)
    trainer.listeners.append(progress.log)
    run_to_end(trainer.updates(), progress, trainer.requests, trainer.run)


def draw(folder: Path) -> None:
    """Draw the pictures of a run or of a study, where matplotlib is installed."""
    if not processes.is_first() or not find_spec("matplotlib"):
        return
    from dynsize import plots  # needs matplotlib

    plots.draw(folder, folder / "plots")
    print(f"pictures: {folder / 'plots'}")


def main() -> None:
    with reported("train.py", "stopped while no update ran; there is nothing to save"):
        options = parse(sys.argv[1:])
        use_threads(options.threads)
        processes.join()
        if not processes.is_first():
            sys.stdout = io.StringIO()  # the first process speaks
        if options.study is not None:
            study(options)
            return
        trainer = start(options)
        train(trainer, options.tensorboard)
        does = "prune.py {} cuts its subnets"
        if len(trainer.model.sizes) == 1:
            does = "evaluate.py {} measures its word error rate"
        print(f"done: {trainer.run}/{NAME}; python {does.format(trainer.run)}")
        draw(trainer.run)


if __name__ == "__main__":
    main()
