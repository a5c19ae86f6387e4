"""The dev utterances, which every size decodes during a training."""

import dataclasses
from pathlib import Path

import torch

from dynsize import processes, run_directory
from dynsize.checkpoint import Checkpoint
from dynsize.config import Config
from dynsize.corpora import UNREADABLE, read_corpus
from dynsize.evaluation import transcribe
from dynsize.networks import facts_of
from dynsize.report import errors_of
from dynsize.subnet import kept_names
from dynsize.supernet import Supernet
from dynsize.training_data import TrainingData
from dynsize.wer import Errors, writes_blanks

UNREADABLE_DEV = f"{UNREADABLE} (dev)"


class Dev:
    """The dev utterances of a training, of which each process decodes its share.

    `left_out`: those that could not be listed: why → id → what exactly. Those that can't be read
    are named in the run directory's left-out.txt and not counted.
    """

    def __init__(self, config: Config, run: Path, data: TrainingData) -> None:
        self.config = config
        self.run = run
        self.data = data
        corpus = read_corpus(config, config.dev_splits, "--dev-splits")
        self.left_out = {f"{why} (dev)": names for why, names in corpus.left_out.items()}
        self.unlisted = self.left_out.get(UNREADABLE_DEV, {})
        self.listed = len(corpus.utterances)
        self.blanks = writes_blanks(utterance.text for utterance in corpus.utterances)
        share = corpus.utterances[processes.number() :: processes.count()]
        self.examples = data.examples_of(share)

    def results(self, model: Supernet) -> dict[int, dict]:
        """Decode dev with every size, and return what metrics.jsonl tells of each, largest first.

        `measure` says whether the error rate `wer` and the errors are of words or of characters.
        """
        results = {}
        for size, errors in self.errors(model).items():
            results[size] = dict(
                wer=errors.rate,
                measure="wer" if self.blanks else "cer",
                errors=errors.total,
                words=errors.words,
                layers=kept_names(model, size),
            )
        return results

    def errors(self, model: Supernet) -> dict[int, Errors]:
        """Decode dev, each process its share; return size → errors of all, largest first.

        They are in words, or in characters where the language writes no blanks. Raises ValueError
        where more than the share `most_left_out` of the utterances can't be read.
        """
        sizes = list(reversed(model.sizes))
        longest = self.data.longest_seconds
        facts = facts_of(Checkpoint(self.run, model, self.data.tokenizer, None, longest))
        texts, unreadable = transcribe(model, self.examples, sizes, "validating", facts)
        run_directory.note_left_out(self.run, {UNREADABLE_DEV: unreadable})
        self.check_enough(unreadable)
        totals = {}
        for size in sizes:
            errors = sum(errors_of(self.examples.utterances, texts[size], self.blanks), Errors())
            counts = torch.tensor(dataclasses.astuple(errors))
            counts = processes.total(counts)
            totals[size] = Errors(*counts.tolist())
        return totals

    def check_enough(self, unreadable: dict[str, str]) -> None:
        """Raise ValueError where too many utterances can't be read, by all processes."""
        now = processes.total(torch.tensor(len(unreadable)))
        lost = len(self.unlisted) + int(now)
        utterances = len(self.unlisted) + self.listed
        if lost > self.config.most_left_out * utterances:
            reasons = [*self.unlisted.values(), *unreadable.values(), ""]
            what = f"{lost} of {utterances} dev utterances can't be read"
            raise processes.in_first(ValueError(f"{what}, more than --most-left-out: {reasons[0]}"))
