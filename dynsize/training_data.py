"""What a training reads: its utterances, batch by batch, and which of them are left out."""

from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from dynsize import cache, processes
from dynsize.batching import Batch, Examples, keep_usable, load
from dynsize.config import Config
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_corpus
from dynsize.evaluation import corpus_root
from dynsize.summary import summary
from dynsize.tokenizer import Tokenizer, tokenizer_for


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
            root = corpus_root(config)
            self.corpus = read_corpus(root, config.train_splits, config, "--train-splits")
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
                    root = corpus_root(self.config)
                    others[split] = read_corpus(root, [split], self.config, flag)
                except (ValueError, OSError) as error:
                    others[split] = str(error)
        return summary(self.corpus, self.config, others)


def clean_caches(config: Config) -> None:
    """Delete from the caches what interrupted processes left unfinished."""
    cache.clean(cache.user_cache())
    if config.cache_features:
        cache.clean(Path(config.cache_features))


def fingerprint_of(corpus: Corpus) -> str:
    """Return hexadecimal digits that change with the ids and texts of the utterances."""
    digest = sha256()
    for utterance in corpus.utterances:
        line = f"{utterance.id}\t{utterance.text}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
