"""What a training reads: its utterances and dev's, and which of them are left out."""

from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch

from dynsize import files, processes, run_directory
from dynsize.batching import Batch, Examples, epoch_plan, read_batches, text_labels
from dynsize.config import Config
from dynsize.conformer import FRONT_ENDS
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_corpus, summary
from dynsize.evaluation import transcribe
from dynsize.features import feature_frames
from dynsize.networks import Facts, window_seconds
from dynsize.report import errors_of
from dynsize.subnet import kept_names
from dynsize.supernet import OUTPUTS, Supernet
from dynsize.tokenizer import Tokenizer, tokenizer_for
from dynsize.wer import Errors, measure_of

MOST_TRIED = 10  # batches of which one is tried for its memory
UNALIGNED = "too few frames for its labels"


class TrainingData:
    """The training utterances with their tokenizer.

    `corpus` tells what is trained on, and which utterances are left out and why.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None) -> None:
        """List the training utterances, and train the tokenizer where none is given.

        Raises ValueError where no utterance is left, and where more than the share `most_left_out`
        can't be read.
        """
        self.config = config
        with processes.first_alone():
            if processes.is_first():  # an earlier process may have left unfinished files
                for cache in filter(None, (files.user_cache(), config.cache_features)):
                    files.clean(Path(cache))
            self.corpus = read_corpus(config, config.train_splits, "--train-splits")
        self.left_out = 0  # utterances that this process could not read in this epoch
        if told := too_many(0, self.corpus, "training", config):
            first = unlisted(self.corpus)[0]
            raise processes.in_first(ValueError(f"{told}; the first: {first}"))
        if tokenizer is None:
            texts = (utterance.text for utterance in self.corpus.utterances)
            tokenizer = tokenizer_for(texts, config)
        self.tokenizer = tokenizer
        keep_usable(self.corpus, self.tokenizer, config)
        longest = max(utterance.samples for utterance in self.corpus.utterances)
        self.longest_seconds = longest / config.sample_rate
        self.fingerprint = fingerprint_of(self.corpus)
        self.examples = self.examples_of(self.corpus.utterances)

    def examples_of(self, utterances: list[Utterance]) -> Examples:
        """Return the utterances as the loader reads them; without workers they stay in memory."""
        in_memory = self.config.workers == 0
        return Examples(utterances, self.tokenizer, self.config, keep=in_memory)

    def begin_epoch(self, epoch: int) -> list[int]:
        """Begin an epoch; return the feature frames of each utterance in it."""
        self.examples.epoch = epoch
        self.left_out = 0
        return self.examples.frames()

    def batches(self, state: dict[str, int], pin: bool) -> Iterator[Batch]:
        """Yield this process's batches from a training's `state` on, epoch after epoch.

        With N processes, process i takes batches i, i + N, i + 2N, … of all epochs' plans. Those
        of the updates before `mask_from` have no masks. `pin`: see `read_batches`.
        """
        config = self.config
        first_masked = round(config.mask_from * config.updates)  # an update
        unmasked = max(0, first_masked - state["update"]) * config.accumulate  # batches from now on
        number = state["batches"] + processes.number()  # of the next batch, in all epochs
        while True:
            frames = self.begin_epoch(state["epoch"])
            plan = epoch_plan(frames, config, state["epoch"])
            before = state["first"]  # batches of the earlier epochs
            mine = plan[max(0, number - before) :: processes.count()]
            for masks, part in ((False, mine[:unmasked]), (True, mine[unmasked:])):
                self.examples.masks = masks
                if part:
                    yield from read_batches(self.examples, part, pin)
            unmasked = max(0, unmasked - len(mine))
            number += len(mine) * processes.count()
            state["first"] += len(plan)
            state["epoch"] += 1

    def largest_batch(self) -> Batch:
        """Return the largest batch of the first epoch of which an utterance can be read.

        It has none where of the ten largest none can be read.
        """
        frames = self.begin_epoch(0)
        plan = epoch_plan(frames, self.config, 0)
        plan.sort(key=lambda batch: -len(batch) * max(frames[i] for i in batch))
        for batch in read_batches(self.examples, plan[:MOST_TRIED]):
            if batch.utterances:
                return batch
        return batch

    def note_unreadable(self, batch: Batch, run: Path) -> None:
        """Name and count the utterances of a batch that could not be read."""
        run_directory.note_left_out(run, {UNREADABLE: batch.unreadable})
        self.left_out += len(batch.unreadable)

    @cached_property
    def summary(self) -> str:
        """What the corpus holds, and what is odd in it, its dev and its test splits.

        It is empty in all processes but the first.
        """
        if not processes.is_first():
            return ""
        others: dict[str, Corpus | str] = {}
        flags = {"--dev-splits": self.config.dev_splits, "--test-splits": self.config.test_splits}
        for flag, splits in flags.items():
            for split in splits:
                try:
                    others[split] = read_corpus(self.config, [split], flag)
                except (ValueError, OSError) as error:
                    others[split] = str(error)
        return summary(self.corpus, self.config, others)


class Dev:
    """The dev utterances of a training, of which each process decodes its share.

    Those that can't be read are named in the run directory's left-out.txt and not counted. What
    the dev splits leave out is added to what `data` leaves out.
    """

    def __init__(self, run: Path, data: TrainingData) -> None:
        self.run = run
        self.data = data
        self.config = config = data.config
        self.corpus = read_corpus(config, config.dev_splits, "--dev-splits")
        for why, names in self.corpus.left_out.items():
            data.corpus.left_out[f"{why} (dev)"] = names
        utterances = self.corpus.utterances
        self.measure = measure_of(utterance.text for utterance in utterances)
        share = utterances[processes.number() :: processes.count()]
        self.examples = data.examples_of(share)

    def results(self, model: Supernet) -> dict[int, dict]:
        """Decode dev with every size, and return what metrics.jsonl tells of each, largest first.

        `measure` is wer or cer: whether the errors are of words or of characters. The error rate
        stands under this name.
        """
        results = {}
        for size, errors in self.errors(model).items():
            results[size] = {self.measure: errors.rate} | dict(
                measure=self.measure,
                errors=errors.total,
                words=errors.words,
                silent=errors.deletions == errors.words,  # all labels are blanks
                layers=kept_names(model, size),
            )
        return results

    def errors(self, model: Supernet) -> dict[int, Errors]:
        """Decode dev, each process its share; return size → errors of all, largest first.

        They are in words, or in characters where the language has no spaces. Raises ValueError
        where more than the share `most_left_out` of the utterances can't be read.
        """
        sizes = list(reversed(model.sizes))
        longest = window_seconds(self.data.longest_seconds)
        facts = Facts(model.config, self.data.tokenizer, tuple(model.sizes), longest)
        texts, unreadable = transcribe(model, self.examples, sizes, "validating", facts)
        run_directory.note_left_out(self.run, {f"{UNREADABLE} (dev)": unreadable})
        left_out = int(processes.total(torch.tensor(len(unreadable))))
        if told := too_many(left_out, self.corpus, "dev", self.config):
            reasons = [*unlisted(self.corpus), *unreadable.values(), "in another process"]
            raise processes.in_first(ValueError(f"{told}; the first: {reasons[0]}"))
        totals = {}
        for size in sizes:
            of_each = errors_of(self.examples.utterances, texts[size], self.measure)
            counts = processes.total(torch.tensor(sum(of_each, Errors())))
            totals[size] = Errors(*counts.tolist())
        return totals


def too_many(left_out: int, corpus: Corpus, kind: str, config: Config) -> str:
    """Return a message where more than the share `most_left_out` can't be read, else ''.

    `left_out`: how many of the utterances of a corpus could not be read. Those whose audio could
    not even be listed count, too.
    """
    lost = left_out + len(unlisted(corpus))
    utterances = len(corpus.utterances) + len(unlisted(corpus))
    if lost <= config.most_left_out * utterances:
        return ""
    what = f"{lost} of {utterances} {kind} utterances can't be read"
    return f"{what}, more than --most-left-out {config.most_left_out:g}"


def unlisted(corpus: Corpus) -> list[str]:
    """Return why the audio of some utterances could not be listed."""
    return list(corpus.left_out.get(UNREADABLE, {}).values())


def fingerprint_of(corpus: Corpus) -> str:
    """Return hexadecimal digits that change with the ids and texts of the utterances."""
    digest = sha256()
    for utterance in corpus.utterances:
        line = f"{utterance.id}\t{utterance.text}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def keep_usable(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> None:
    """Leave out of a training corpus the utterances that can't be trained on.

    These are utterances outside of `min_seconds` and `max_seconds`, and those whose labels
    need more encoder frames, see `least_frames` of the output, than there are at the fastest speed.
    Sets what the corpus holds of the tokenizer. Raises ValueError for characters without a label,
    and where nothing is left.
    """
    good: list[Utterance] = []
    for utterance in corpus.utterances:
        seconds = utterance.samples / config.sample_rate
        what = f"{utterance.path}: {seconds:.2f} s"
        if seconds < config.min_seconds:
            corpus.leave_out(f"shorter than {config.min_seconds:g} s", utterance.id, what)
            continue
        if seconds > config.max_seconds > 0:
            corpus.leave_out(f"longer than {config.max_seconds:g} s", utterance.id, what)
            continue
        labels = text_labels(utterance, tokenizer)
        if (spelled := tokenizer.decode(labels)) != utterance.text:
            corpus.respelled[utterance.text] = spelled
        least = max(1, OUTPUTS[config.output].least_frames(labels))
        samples = round(utterance.samples / max(config.speeds))
        frames = FRONT_ENDS[config.front_end].output_frames(feature_frames(samples, config))
        if frames >= least:
            good.append(utterance)
        else:
            what = f"{len(labels)} labels need {least} encoder frames, and it has {frames}"
            corpus.leave_out(UNALIGNED, utterance.id, f"{utterance.path}: {what}")
    corpus.utterances = good
    if not good:
        told = f"no utterance is left to train on; the first: {corpus.first_left_out()}"
        raise ValueError(f"{config.corpus}: {told}")
