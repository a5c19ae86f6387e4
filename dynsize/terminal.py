"""What the commands share: the parser of their flags, what may be shown, and how they end."""

import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from dynsize import __version__, processes
from dynsize.config import Config
from dynsize.subnet import layer_map
from dynsize.supernet import Supernet
from dynsize.text import printable

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left"
WIDEST = 80  # columns of the progress bar
LM_BEAM = 16  # prefixes, where a language model is given
LONGEST = 1000  # characters of an error message
SECOND_SIGNAL = 1.0  # seconds after which a second signal ends a training at once
SHORTAGE = re.compile("memory|start new thread", re.IGNORECASE)  # in a RuntimeError


class Parser(argparse.ArgumentParser):
    """A parser with `--threads` and `--version`, whose errors are one line.

    Only whole flags are accepted, and the width of the help follows the terminal's.
    """

    def __init__(self, prog: str, description: str, examples: str, files: str = "") -> None:
        """`files`: the arguments that are no flags, as the line of usage shows them."""
        command = f"python {prog}" if prog.endswith(".py") else prog
        super().__init__(
            prog=prog,
            usage=f"{command} {files}[--flag VALUE ...]",
            description=f"{description.rstrip()}\nDefaults are in parentheses.",
            epilog=f"examples:\n{examples}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-3 for a flag
        add, version = self.add_argument, f"dynsize {__version__}"
        add("--version", action="version", version=version, help="show the version and exit")
        threads = "threads on the CPU; 0: torch's choice (0)"
        add("--threads", type=int, default=0, metavar="N", help=threads)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {one_line(message)}; {self.prog} --help lists the flags\n")


def add_decoding_flags(parser: Parser) -> None:
    """Add the flags of the beam search and of its language model."""
    add = parser.add_argument
    add("--beam", type=int, help=f"prefixes that beam search keeps (1; with --lm {LM_BEAM})")
    add("--lm", type=Path, metavar="FILE", help="language model of words: an n-gram ARPA file")
    add("--lm-weight", type=float, metavar="X", help="of the language model (0.5)")
    add("--word-bonus", type=float, metavar="X", help="added to a text's score for each word (0)")


def check_decoding(parser: Parser, options: argparse.Namespace) -> None:
    """End the process where the flags of the beam search can't be."""
    if options.beam is not None and options.beam < 1:
        parser.error(f"--beam {options.beam}: must be 1 or more")
    if not options.lm and (options.lm_weight is not None or options.word_bonus is not None):
        parser.error("--lm-weight and --word-bonus are a language model's: --lm names it")


def beam_of(options: argparse.Namespace) -> int:
    """Return how many prefixes the beam search keeps; 1 means greedy decoding."""
    return options.beam or (LM_BEAM if options.lm else 1)


def lm_settings(options: argparse.Namespace) -> dict[str, float]:
    """Return the settings of the language model that the command line names."""
    given = dict(weight=options.lm_weight, bonus=options.word_bonus)
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def reported(prog: str, interrupted: str) -> Iterator[None]:
    """End the process with one line, not a traceback, for what a user can mend.

    The exit code is 2, after Ctrl-C 130 with the line `interrupted`. Warnings show no line of the
    source. Characters that the terminal's encoding lacks are shown as escapes.
    """
    warnings.formatwarning = lambda message, *_: f"{prog}: warning: {one_line(str(message))}\n"
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: closed by the shell)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        stop(130, f"{prog}: {interrupted}")
    except BrokenPipeError:  # the reader of the output is gone, as after `| head`
        sys.exit(2)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        stop(2, f"{prog}: {file}{error.strerror or error}")
    except ValueError as error:
        stop(2, f"{prog}: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not SHORTAGE.search(str(error)):
            raise  # a defect, whose traceback is of use
        stop(2, f"{prog}: out of memory: {str(error).partition(chr(10))[0]}")
    finally:
        forget_unwritable_output()


def stop(code: int, message: str) -> NoReturn:
    """End the process with an exit code, after one line."""
    with suppress(OSError):  # the stream is full
        print(one_line(message), file=sys.stderr)
    sys.exit(code)


def forget_unwritable_output() -> None:
    """End the process with 2 where its output or its errors can't be written.

    Python's exit would write what is left of them once more, and show a traceback.
    """
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            lost = True
    if lost:
        sys.exit(2)


def one_line(message: str) -> str:
    """Return a message as one line that is safe to show, cut where it is too long."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"


class Progress:
    """What is shown of a training: a bar on a terminal, elsewhere the lines of its log."""

    def __init__(self, config: Config, model: Supernet, done: int) -> None:
        """`done`: the number of updates that were done before the program started."""
        self.config = config
        self.model = model
        self.first = done
        self.began = time.monotonic()
        self.bar = tqdm(
            total=config.updates,
            initial=done,
            ncols=min(WIDEST, shutil.get_terminal_size().columns),
            bar_format=BAR,
            disable=not processes.is_first() or not sys.stderr.isatty(),
        )

    def show(self, record: dict) -> None:
        """Show an update, of which this is the record, on the bar."""
        self.bar.set_description_str(losses_line(record), refresh=False)
        self.bar.update(record["update"] - self.bar.n)

    def log(self, record: dict) -> None:
        """Print a validation; print the losses of an interval only where there is no bar."""
        update = record["update"]
        if "dev" in record:
            self.bar.write(dev_lines(record, self.model))
        elif self.bar.disable:
            seconds_of_one = (time.monotonic() - self.began) / (update - self.first)
            left = tqdm.format_interval(seconds_of_one * (self.config.updates - update))
            parts = [losses_line(record), f"lr {record['learning_rate']:.1e}"]
            parts.append(f"{record['audio_seconds_per_second']:.0f} audio s/s, {left} left")
            print(f"update {update}/{self.config.updates}  {', '.join(parts)}")
        sys.stdout.flush()


def losses_line(record: dict) -> str:
    """Return the losses of the networks that an update trained, and what the update left out."""
    by_size = sorted(record.get("losses", {}).items(), reverse=True)
    shown = [f"{size}: {loss:.2f}" for size, loss in by_size]
    lost = f", {record['left_out']} left out" if record.get("left_out") else ""
    return f"loss {' '.join(shown) or 'skipped'}, step {record['step']}{lost}"


def dev_lines(record: dict, model: Supernet) -> str:
    """Return the lines of a validation: sizes with their layers, advice where none says a word."""
    results = record["dev"]
    unit = "word" if all(r["measure"] == "wer" for r in results.values()) else "character"
    lines = [f"update {record['update']}, {unit} error rate on dev:"]
    for size, result in results.items():
        kept = layer_map(model, size)
        lines.append(f"  size {size:>3} {100 * result[result['measure']]:6.2f}%  {kept}")
    if all(result["silent"] for result in results.values()):
        lines.append(
            "  No size says a word yet: silence is learned first. If this lasts for 2,000 updates, "
            "train anew with --units characters, a lower --peak-learning-rate or --subnet-loss."
        )
    return "\n".join(lines)


def run_to_end(
    updates: Iterator[dict], progress: Progress, requests: processes.Requests, run: Path
) -> None:
    """Train to the end, or to a signal, which saves and ends the process.

    The exit code is then 128 + the signal's number. `updates`: of the trainer, whose directory is
    `run`.
    """
    with signals(requests), progress.bar:
        for record in updates:
            progress.show(record)
            if record["stop"]:
                print(f"stopped and saved at update {record['update']}; ", end="")
                print(f"python train.py --resume {run} goes on", flush=True)
                sys.exit(128 + (requests.stop or signal.SIGTERM))  # 0: another process got it


@contextmanager
def signals(requests: processes.Requests) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP stop a training, and SIGUSR1 save it, by these requests.

    The update that runs is finished, and one more is trained: processes tell each other of a stop
    when they read an update, so all of them end after the same one. A validation that runs is
    finished first. The script then exits with 128 + the signal's number. SIGUSR1 is for the first
    process, which saves.

    A second signal within a second is ignored, as schedulers may send two. A later one ends the
    process without saving. Worker processes ignore signals and are killed at the end. SIGHUP stays
    ignored where nohup started the program.
    """
    first = math.inf  # when the first signal came

    def on_save(number: int, frame: object) -> None:
        requests.save = True

    def on_stop(number: int, frame: object) -> None:
        nonlocal first
        if number == signal.SIGHUP:
            forget_closed_terminal()
        if not requests.stop:
            requests.stop = number
            first = time.monotonic()
        elif time.monotonic() - first > SECOND_SIGNAL:
            raise SystemExit(128 + number)

    handlers = {signal.SIGUSR1: on_save, signal.SIGINT: on_stop, signal.SIGTERM: on_stop}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = on_stop
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forget_closed_terminal() -> None:
    """Send the output and the errors nowhere, each where its terminal was closed."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
