"""What a training reads: its utterances, batch by batch, and which of them are left out."""

from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

from dynsize import files, processes
from dynsize.batching import Batch, Examples, labels_of, load
from dynsize.config import Config
from dynsize.conformer import FRONT_ENDS
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_corpus, summary
from dynsize.features import feature_frames
from dynsize.text import shown
from dynsize.tokenizer import Tokenizer, tokenizer_for

UNALIGNED = "more labels than CTC can align"


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
            if processes.is_first():
                clean_caches(config)
            self.corpus = read_corpus(config, config.train_splits, "--train-splits")
        unreadable = self.corpus.left_out.get(UNREADABLE, {})
        self.unlisted = len(unreadable)  # utterances whose audio could not be listed
        self.left_out = 0  # utterances that could not be read in this epoch, by all processes
        if told := self.too_many_left_out():
            told = f"{told}; the first: {next(iter(unreadable.values()))}"
            raise processes.in_first(ValueError(told))
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

    def load(self, plan: list[list[int]], pin: bool = False) -> Iterator[Batch]:
        """Read the utterances of a plan, batch by batch. `pin`: see `batching.load`."""
        return load(self.examples, plan, pin)

    def too_many_left_out(self) -> str:
        """Return a message where more utterances can't be read than may be, else ''.

        They are those that could not be listed, and those that could not be read in this epoch.
        """
        lost = self.unlisted + self.left_out
        utterances = self.unlisted + len(self.corpus.utterances)
        most = self.config.most_left_out
        if lost <= most * utterances:
            return ""
        what = f"{lost} of {utterances} training utterances could not be read"
        return f"{what}, more than --most-left-out {most:g}"

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


def clean_caches(config: Config) -> None:
    """Delete from the caches what interrupted processes left unfinished."""
    files.clean(files.user_cache())
    if config.cache_features:
        files.clean(Path(config.cache_features))


def fingerprint_of(corpus: Corpus) -> str:
    """Return hexadecimal digits that change with the ids and texts of the utterances."""
    digest = sha256()
    for utterance in corpus.utterances:
        line = f"{utterance.id}\t{utterance.text}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def keep_usable(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> None:
    """Leave out of a training corpus the utterances that can't be trained on.

    These are utterances outside of `min_seconds` and `max_seconds`, and those whose labels CTC
    can't align at the fastest speed: a label needs an encoder frame, and so does the blank between
    two equal ones. Sets what the corpus holds of the tokenizer. Raises ValueError for characters
    without a label, and where nothing is left.
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
        labels = labels_of(utterance, tokenizer)
        corpus.densest = max(corpus.densest, (len(labels) / seconds, utterance.id))
        if (spelled := tokenizer.decode(labels)) != utterance.text:
            example = corpus.respelled[1] or f"{shown(utterance.text)} as {shown(spelled)}"
            corpus.respelled = (corpus.respelled[0] + 1, example)
        repeats = sum(a == b for a, b in pairwise(labels))
        frames = fewest_encoder_frames(utterance, config)
        if frames >= max(1, len(labels) + repeats):
            good.append(utterance)
        else:
            what = f"{frames} encoder frames can't hold {len(labels)} labels and {repeats} repeats"
            corpus.leave_out(UNALIGNED, utterance.id, f"{utterance.path}: {what}")
    corpus.utterances = good
    if not good:
        first = next(what for names in corpus.left_out.values() for what in names.values())
        raise ValueError(f"{config.corpus}: no utterance is left to train on; the first: {first}")


def fewest_encoder_frames(utterance: Utterance, config: Config) -> int:
    """Return the number of encoder frames of an utterance at the fastest speed."""
    frames = feature_frames(round(utterance.samples / max(config.speeds)), config)
    return FRONT_ENDS[config.front_end].output_frames(frames)
