"""The training loop of both steps. What an update does follows from the settings and its number."""

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import torch
from torch import Tensor

from dynsize import cache, checkpoint, files, processes, run_directory, sandwich
from dynsize.algorithms import ALGORITHMS
from dynsize.baselines import every_other
from dynsize.batching import Batch, Examples, epoch_plan, keep_usable, load
from dynsize.config import Config
from dynsize.conformer import Gates
from dynsize.corpora import UNREADABLE, Corpus, Utterance, read_corpus
from dynsize.ctc import ctc_loss
from dynsize.distillation import distillation_loss, load_teacher
from dynsize.evaluation import corpus_root, device_of, errors_of, kept_names, transcribe
from dynsize.kernels import layer_gates
from dynsize.recogniser import facts_of
from dynsize.run_directory import check_new
from dynsize.schedule import learning_rate, step1_updates
from dynsize.summary import summary
from dynsize.supernet import Supernet, layer_name
from dynsize.tokenizer import tokenizer_for
from dynsize.wer import Errors, writes_blanks

__all__ = ["Trainer", "check_new"]
MOST_SKIPPED = 10  # updates in a row that are skipped before the training gives up
SECOND_SIGNAL = 1.0  # seconds after which a second signal ends the training at once
# What a resumed training may change without changing what is learned. `corpus`: the same corpus,
# elsewhere.
FREE = (
    *("device", "workers", "cache_features", "corpus", "corpus_kind", "most_left_out"),
    *("log_every", "validate_every", "save_every", "save_minutes", "keep"),
)
# What it may change too, though the result is then not that of an unbroken training.
WITH_A_NOTE = ("batch_seconds", "accumulate")


class Trainer:
    """A training in a run directory.

    `updates()` runs it; `save()` writes the checkpoint from which `resume` goes on. `corpus` tells
    what is trained on, and which training utterances are left out and why. With several processes
    each has a Trainer. They have the same weights, and the first process writes.

    `loaded`: a checkpoint to go on from; one without a training's state gives the initial network.
    """

    save_soon = False  # set from outside: save after the next update
    stop_soon = 0  # set from outside, to a signal's number: save after the next update and end
    board: Callable[[dict], None] | None = None  # set from outside: gets each line that is logged

    def __init__(
        self, config: Config, run: Path, loaded: checkpoint.Checkpoint | None = None
    ) -> None:
        processes.use_gpu(config.device)
        self.config = config
        self.run = run
        self.device = device_of(config)
        self.found = run_directory.stamp(run)
        self.starts_from = [loaded.path] if loaded else []
        self.left_out = 0  # utterances that could not be read in this epoch, by all processes
        self.read_corpora(loaded)
        torch.manual_seed(config.seed)
        model = loaded.model if loaded else new_network(config, self.tokenizer.labels)
        self.model = model.to(self.device)
        self.teacher: Supernet | None = None
        if config.teacher:
            teacher = load_teacher(config, self.tokenizer)
            self.teacher = teacher.model.to(self.device)
            self.starts_from.append(teacher.path)
        self.network = processes.wrapped(self.model)
        self.optimizer = optimizer_for(self.model, config)
        # `batches`: taken from the plans of all epochs. `first`: the number of the epoch's first
        # batch. `skipped`: updates in a row, the last ones.
        self.state = dict(update=0, batches=0, epoch=0, first=0, skipped=0)
        self.best = math.inf  # fewest errors on dev up to now
        self.validated = 0  # the last update after which dev was decoded
        self.failure: Exception | None = None  # why this process can't go on
        if loaded and loaded.training:
            self.state = {name: loaded.training[name] for name in self.state}
            self.optimizer.load_state_dict(loaded.training["optimizer"])
            self.tell_other_corpus(loaded.training["fingerprint"])
            self.tell_other_batches(loaded.training["batches_of_an_update"])
        self.learned = self.state.copy()  # as it was after the last update that was not skipped
        self.saved = self.update

    def read_corpora(self, loaded: checkpoint.Checkpoint | None) -> None:
        """List the training and dev utterances, and train the tokenizer where none is loaded.

        Raises ValueError where no training utterance is left, and where more than the share
        `most_left_out` can't be read.
        """
        config = self.config
        with processes.first_alone():
            if processes.is_first():
                clean_caches(config)
            root = corpus_root(config)
            self.corpus = read_corpus(root, config.train_splits, config, "--train-splits")
        unreadable = self.corpus.left_out.get(UNREADABLE, {})
        self.unlisted = len(unreadable)  # utterances whose audio could not be listed
        if self.too_many_left_out():
            told = f"{self.too_many_left_out()}; the first: {next(iter(unreadable.values()))}"
            raise processes.in_first(ValueError(told))
        texts = (utterance.text for utterance in self.corpus.utterances)
        self.tokenizer = loaded.tokenizer if loaded else tokenizer_for(texts, config)
        keep_usable(self.corpus, self.tokenizer, config)
        longest = max(utterance.samples for utterance in self.corpus.utterances)
        self.longest_seconds = longest / config.sample_rate
        self.fingerprint = fingerprint_of(self.corpus)
        self.examples = self.examples_of(self.corpus.utterances)
        dev = read_corpus(root, config.dev_splits, config, "--dev-splits")
        for why, names in dev.left_out.items():
            self.corpus.left_out[f"{why} (dev)"] = names
        self.blanks = writes_blanks(utterance.text for utterance in dev.utterances)
        self.dev_utterances = len(dev.utterances) + len(dev.left_out.get(UNREADABLE, ()))
        self.dev = self.examples_of(dev.utterances[processes.number() :: processes.count()])

    def examples_of(self, utterances: list[Utterance]) -> Examples:
        """Return the utterances as the loader reads them; without workers they stay in memory."""
        in_memory = self.config.workers == 0
        return Examples(utterances, self.tokenizer, self.config, keep=in_memory)

    @property
    def update(self) -> int:
        """The number of updates that are done."""
        return self.state["update"]

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

    # Beginning, stopping and resuming.

    @classmethod
    def resume(cls, run: Path, changes: dict[str, object] | None = None) -> "Trainer":
        """Return the training of a run directory as its last whole checkpoint left it.

        `changes`: settings with other values. Raises ValueError for those that change what is
        learned, and where no training can go on. The number of processes may be another one.
        """
        found = run_directory.stamp(run)
        with processes.first_alone():
            loaded = checkpoint.load(run)
            if loaded.training is None:
                raise ValueError(f"{loaded.path}: a network alone, with which no training goes on")
            if not run.is_dir():
                raise ValueError(f"{run}: a file; --resume names the directory of a training")
            config = changed(loaded.model.config, changes or {})
        loaded.model.config = config
        trainer = cls(config, run, loaded)
        with processes.first_alone():
            if processes.is_first():
                trainer.take_over(found)
        trainer.validated = int(processes.total(torch.tensor(trainer.validated)))
        return trainer

    def take_over(self, found: list[int]) -> None:
        """Lock the run directory, and forget what an interrupted training did after its checkpoint.

        Raises ValueError where the directory changed since its stamp was `found`.
        """
        self.locked = run_directory.lock(self.run)
        run_directory.check_unchanged(self.run, found)
        run_directory.clean(self.run)
        for record in run_directory.forget_after(self.run, self.update):
            if "dev" in record:
                self.note_validation(record["update"], record["dev"])
        run_directory.write_config(self.run, self.config)

    def begin(self) -> "Trainer":
        """Make the run directory, or replace the training in it; `check_new` asks before.

        Raises ValueError where the directory is not one of ours, has what this training starts
        from, or was changed by another process since this training was created. Returns itself.
        """
        with processes.first_alone():
            if processes.is_first():
                self.make_directory()
        return self

    def make_directory(self) -> None:
        """Make the run directory, locked and with its first files."""
        check_new(self.run, overwrite=True)
        self.run.mkdir(parents=True, exist_ok=True)
        self.locked = run_directory.lock(self.run)
        run_directory.check_unchanged(self.run, self.found)
        if self.config.layers_from:
            self.starts_from.append(checkpoint.load(Path(self.config.layers_from)).path)
        for source in self.starts_from:
            if source.parent.resolve() == self.run.resolve():
                raise ValueError(f"{self.run}: has {source.name}, from which this training starts")
        run_directory.begin(self.run, self.config, self.summary)
        run_directory.note_left_out(self.run, self.corpus.left_out)

    def stop(self, number: int, frame: object = None) -> None:
        """Save after the present update and end: a handler of signals.

        Schedulers may send a signal twice within a second, which counts once. A later one ends the
        process without saving.
        """
        now = time.monotonic()
        if self.stop_soon and now - self.stopped_at > SECOND_SIGNAL:
            raise SystemExit(128 + number)
        if not self.stop_soon:
            self.stop_soon, self.stopped_at = number, now

    @property
    def batches_of_an_update(self) -> int:
        """The number of batches whose gradients make one update, in all processes."""
        return processes.count() * self.config.accumulate

    def tell_other_batches(self, number: int) -> None:
        """Warn where an update had another number of batches in the training that goes on."""
        if number != self.batches_of_an_update and processes.is_first():
            warnings.warn(
                f"batches of an update, in all processes: {self.batches_of_an_update}, and not "
                f"{number} as before: the result is not that of an unbroken training",
                stacklevel=2,
            )

    def tell_other_corpus(self, fingerprint: str) -> None:
        """Warn where the training utterances are not those of the checkpoint."""
        if fingerprint != self.fingerprint and processes.is_first():
            warnings.warn(
                f"{self.config.corpus}: the ids or texts of its {len(self.corpus.utterances)} "
                "utterances are not those with which this training began",
                stacklevel=2,
            )

    # The loop.

    def updates(self) -> Iterator[dict]:
        """Train to the end, or to the update after which a stop is asked for.

        Yields what each update did, with the dev word error rates after a validation. A checkpoint
        comes before a validation, so that a kill in between loses nothing.
        """
        config = self.config
        logged: list[dict] = []
        saved = time.monotonic()
        if self.validation_is_pending():
            self.validate()
        if self.update < config.updates:
            self.rehearse()
        if self.update == 0:
            self.dev_errors()
        batches = self.batches()
        stop = False
        while self.update < config.updates and not stop:
            record = self.timed_update(batches)
            stop = record["stop"]
            logged.append(record)
            if self.due(config.log_every):
                self.log(mean_of(logged))
                logged = []
            late = time.monotonic() - saved > 60 * config.save_minutes
            due = self.due(config.save_every) or self.due(config.validate_every)
            if due or late or self.save_soon or stop:
                self.save()
                self.save_soon = False
                saved = time.monotonic()
            if self.due(config.validate_every) and not stop:
                record["dev"] = self.validate()
            yield record
        if self.failure:
            self.give_up(self.failure)

    def due(self, every: int) -> bool:
        """Return whether something that is done every so often is due after this update."""
        return self.update % every == 0 or self.update == self.config.updates

    def validation_is_pending(self) -> bool:
        """Return whether the training ended between a checkpoint and its validation."""
        due = self.update > 0 and self.due(self.config.validate_every)
        return due and self.validated < self.update

    def batches(self) -> Iterator[Batch]:
        """Yield this process's batches from now on, epoch after epoch.

        With N processes, process i takes batches i, i + N, i + 2N, … of all epochs' plans.
        """
        number = self.state["batches"] + processes.number()  # of the next batch, in all epochs
        while True:
            epoch = self.state["epoch"]
            frames = self.frames_in(epoch)
            plan = epoch_plan(frames, self.config, epoch)
            place = max(0, number - self.state["first"])
            mine = plan[place :: processes.count()]
            if mine:
                yield from self.load(mine)
            number += len(mine) * processes.count()
            self.state["first"] += len(plan)
            self.state["epoch"] += 1

    def load(self, plan: list[list[int]]) -> Iterator[Batch]:
        """Read the training utterances of a plan, batch by batch."""
        return load(self.examples, plan, pin=self.device.type == "cuda")

    def frames_in(self, epoch: int) -> list[int]:
        """Begin an epoch; return the feature frames of each utterance in it."""
        self.examples.epoch = epoch
        self.left_out = 0
        return self.examples.frames()

    def rehearse(self) -> None:
        """Compute the gradients of the largest batch as in step 1 and as in step 2.

        Meanwhile tensors take the memory that the optimizer's state will take, so too little memory
        shows now and not after a day. Raises ValueError where it does.
        """
        config = self.config
        frames = self.frames_in(0)
        plan = epoch_plan(frames, config, 0)

        def longest(batch: list[int]) -> int:
            return max(frames[i] for i in batch)

        worst = max(plan, key=lambda batch: len(batch) * longest(batch))
        (batch,) = self.load([worst])
        try:
            reserved = self.optimizer_memory()
            for update in sorted({0, config.updates - 1}):
                self.add_gradients(batch, update, labels=1, sync=True)
            del reserved
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            first_line = str(error).splitlines()[0]
            raise ValueError(
                f"the largest batch, {len(worst)} utterances of up to {longest(worst)} frames, "
                f"does not fit into the memory: lower --batch-seconds {config.batch_seconds:g} "
                f"(and raise --accumulate), or set --checkpoint-activations. {first_line}"
            ) from error
        self.optimizer.zero_grad()

    def optimizer_memory(self) -> list[Tensor]:
        """Return tensors of the size of the optimizer's state, where it has none yet."""
        if self.optimizer.state:
            return []
        moments = [torch.ones_like(weight) for weight in self.model.parameters()]
        squares = [torch.ones_like(weight) for weight in self.model.parameters()]
        return moments + squares

    # One update.

    def timed_update(self, batches: Iterator[Batch]) -> dict:
        """Read and train one update. Returns what to report of it, with its times."""
        start = time.perf_counter()
        drawn = self.read(batches)
        waiting = time.perf_counter() - start
        record = self.train_on(drawn)
        record["waiting"] = waiting
        record["padding"] = fmean(batch.padding for batch in drawn)
        record["seconds"] = time.perf_counter() - start
        return record

    def read(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return this process's batches of one update; none where a worker process died."""
        try:
            return list(islice(batches, self.config.accumulate))
        except ChildProcessError as error:
            self.failure = error
            return []

    def train_on(self, batches: list[Batch]) -> dict:
        """Train one update, and return what to report of it.

        The weights stay as they are where nothing could be read, or where a loss or the gradient
        is not finite; too many such updates in a row end the training.
        """
        read = self.read_by_all(batches)
        if read["failed"]:
            self.give_up(self.failure or SystemExit(processes.FAILED))
        for batch in batches:
            self.note_left_out({UNREADABLE: batch.corrupt})
        self.count_left_out(read["left_out"])
        update = self.update
        step1 = update < step1_updates(self.config)
        record = dict(
            update=update + 1,
            step=1 if step1 else 2,
            sizes=list(self.loss_weights(update)),
            epoch=self.examples.epoch,
            learning_rate=learning_rate(update, self.config),
            audio_seconds=read["seconds"],
            left_out=self.left_out,
            stop=read["stop"] > 0,
        )
        fault = "no utterance could be read"
        if read["utterances"]:
            fault = self.step(batches, read["labels"], record)
        self.state["update"] += 1
        self.state["batches"] += len(batches) * processes.count()
        if fault:
            self.skip(batches, fault)
        else:
            self.state["skipped"] = 0
            self.learned = self.state.copy()
        self.optimizer.zero_grad()
        if step1 and self.ranking_is_needed(update):
            self.rank_layers()
        return record

    def ranking_is_needed(self, update: int) -> bool:
        """Return whether what comes after an update of step 1 depends on the ranking."""
        if update + 1 == step1_updates(self.config):
            return True
        algorithm = ALGORITHMS[self.config.method]
        return algorithm.needs_ranking(update, self.config)

    def read_by_all(self, batches: list[Batch]) -> dict[str, int | float]:
        """Return what all processes have read for an update. It is counted on the CPU."""
        utterances = [utterance for batch in batches for utterance in batch.utterances]
        samples = sum(utterance.samples for utterance in utterances)
        counts = dict(
            utterances=len(utterances),
            seconds=samples / self.config.sample_rate,
            labels=sum(int(batch.label_lengths.sum()) for batch in batches),
            left_out=sum(len(batch.corrupt) for batch in batches),
            stop=self.stop_soon > 0,
            failed=self.failure is not None,
        )
        here = torch.tensor(list(counts.values()), dtype=torch.float64)
        total = processes.total(here)
        return dict(zip(counts, total.tolist(), strict=True))

    def step(self, batches: list[Batch], labels: float, record: dict) -> str:
        """Take one optimizer step, unless a loss or the gradient is not finite.

        Adds to `record` what it did. Returns why no step was taken, or nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = record["learning_rate"] * group["factor"]
        losses = self.add_all_gradients(batches, max(1, labels))
        stop = losses.new_full((1,), float(self.stop_soon > 0))
        total = processes.total(torch.cat([losses, stop]))
        losses, stop = total.split([len(losses), 1])
        most = self.config.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        scores = [self.model.scores] if self.scores_are_logged() else []
        losses, (norm,), (stop,), *scores = wait_for(losses, norm, stop, *scores)
        record["stop"] |= stop > 0
        for values in scores:
            record |= self.shown_scores(values)
        if not math.isfinite(sum(losses) + norm):
            return f"loss {sum(losses)}, gradient norm {norm}"
        record["losses"] = dict(zip(record["sizes"], losses, strict=True))
        record["gradient_norm"] = norm
        self.optimizer.step()
        return ""

    def add_all_gradients(self, batches: list[Batch], labels: float) -> Tensor:
        """Add the gradients of an update's batches; return the sums of their losses, (M,)."""
        read = [batch for batch in batches if batch.utterances]
        if not read:
            read = [silence(self.config)]
        return sum(
            self.add_gradients(batch, self.update, labels, sync=batch is read[-1]) for batch in read
        )

    def scores_are_logged(self) -> bool:
        """Return whether the update that runs is one of step 1 of which a line is logged."""
        number = self.update + 1
        last = number == self.config.updates
        step1 = self.update < step1_updates(self.config)
        return step1 and (last or number % self.config.log_every == 0)

    def shown_scores(self, values: list[float]) -> dict:
        """Return the layers' scores and their ranking before this update, for metrics.jsonl.

        Where the scores are a matrix, the layer weights of the subnet are shown instead.
        """
        algorithm = ALGORITHMS[self.config.method]
        scores = torch.tensor(values).view_as(self.model.scores)
        ranking = self.model.ranking
        shown = scores
        if scores.dim() > 1:
            shown = algorithm.layer_weights(scores, ranking, self.update, self.config)
        rounded = [round(float(score), 5) for score in shown]
        ranked = algorithm.rank(scores, ranking, self.update, self.config)
        return dict(scores=rounded, ranking=ranked)

    def add_gradients(self, batch: Batch, update: int, labels: float, sync: bool) -> Tensor:
        """Add the gradient of a batch's losses, in nats per label; return the losses, (M,).

        `labels`: how many the whole update has, in all processes. `sync`: whether this is the
        update's last batch, after which the gradients are averaged over the processes.
        """
        step1 = update < step1_updates(self.config)
        features, frames, targets, target_lengths, seeds = batch.to(self.device)
        weights = self.loss_weights(update)  # size → weight
        sizes = list(weights)
        networks = len(sizes)  # M
        gates = self.gates(update, seeds)
        idle = self.model.idle(sizes, step1)
        with self.synchronised(sync):
            log_probs, lengths = self.network(features, frames, sizes, gates, seeds)
            losses = ctc_loss(
                log_probs.flatten(0, 1),  # (M·B, T', V)
                lengths.repeat(networks),
                targets.repeat(networks, 1),
                target_lengths.repeat(networks),
            )
            losses = losses.unflatten(0, (networks, len(seeds)))  # (M, B)
            losses = losses.sum(1) / labels  # (M,)
            if not batch.utterances:
                losses = 0 * losses
            pairs = zip(weights.values(), losses, strict=True)
            weighted = sum(weight * loss for weight, loss in pairs)
            total = processes.count() * weighted
            if self.teacher is not None and batch.utterances:
                divergence = distillation_loss(self.teacher, features, frames, log_probs[0])
                total = total + processes.count() * divergence / labels
            if step1 and sync:
                total = total + self.extra_loss(update)
            # Other processes wait for the gradient of every weight.
            nothing = 0 * sum(weight.sum() for weight in idle)
            (total + nothing).backward()
        for weight in idle:
            weight.grad = None  # a zero would move the optimizer's state
        return losses.detach()

    def synchronised(self, sync: bool) -> AbstractContextManager:
        """Return a context in which, with `sync`, the gradients of all processes become one."""
        if sync or self.network is self.model:
            return nullcontext()
        return self.network.no_sync()

    def extra_loss(self, update: int) -> Tensor:
        """Return the algorithm's extra loss in an update of step 1."""
        algorithm = ALGORITHMS[self.config.method]
        model = self.model
        return algorithm.extra_loss(model.scores, model.ranking, update, self.config)

    def loss_weights(self, update: int) -> dict[int, float]:
        """Return the networks that an update trains, largest first: size → weight of its loss."""
        config = self.config
        if update < step1_updates(config):
            size = ALGORITHMS[config.method].size_at(update, config)
            return {config.layers: 1.0, size: config.subnet_loss}
        if config.method == "layerdrop":
            return {config.layers: 1.0}
        return sandwich.loss_weights(update, self.model.sizes, config)

    def gates(self, update: int, seeds: Tensor) -> list[Gates]:
        """Return the gates of the networks of `loss_weights`, for utterances with these seeds."""
        config = self.config
        model = self.model
        if update < step1_updates(config):
            algorithm = ALGORITHMS[config.method]
            supernet = [True] * config.layers
            subnet = algorithm.layer_weights(model.scores, model.ranking, update, config)
            return [supernet, subnet]
        if config.method == "layerdrop":
            return [list(layer_gates(seeds, config.layers, config.layer_drop))]
        masks = [model.mask(size) for size in self.loss_weights(update)]
        return sandwich.gates(masks, seeds, config)

    def rank_layers(self) -> None:
        """Rank the layers by their scores, where the last update was one of step 1.

        Note: this waits for the device.
        """
        last = self.update - 1
        model = self.model
        if 0 <= last < step1_updates(self.config):
            algorithm = ALGORITHMS[self.config.method]
            model.ranking = algorithm.rank(model.scores, model.ranking, last, self.config)

    # What goes wrong.

    def skip(self, batches: list[Batch], fault: str) -> None:
        """Log an update that changed nothing; end the training where too many were in a row."""
        ids = [utterance.id for batch in batches for utterance in batch.utterances]
        skipped = dict(update=self.update, skipped=fault, utterances=ids, time=time.time())
        run_directory.log(self.run, skipped)
        self.state["skipped"] += 1
        if self.state["skipped"] < MOST_SKIPPED:
            return
        what = f"{MOST_SKIPPED} updates in a row were skipped, the last one update {self.update}"
        where = f"{self.run / run_directory.METRICS} tells more"
        if ids:
            advice = "try a lower peak learning rate"
            error = FloatingPointError(f"{what}: {fault}; {where}, and {advice}")
        else:
            error = ValueError(f"{what}: {fault}; is {self.config.corpus} still there? {where}")
        self.give_up(processes.in_first(error))

    def count_left_out(self, number: float) -> None:
        """Count utterances that could not be read; too many end the training at the next update."""
        self.left_out += int(number)
        if processes.is_first() and (told := self.too_many_left_out()):
            self.failure = ValueError(f"{told}; {self.run / run_directory.LEFT_OUT} names them")

    def too_many_left_out(self) -> str:
        """Return a message where more training utterances can't be read than may be, else ''.

        They are those that could not be listed, and those that could not be read in this epoch.
        """
        lost = self.unlisted + self.left_out
        utterances = self.unlisted + len(self.corpus.utterances)
        most = self.config.most_left_out
        if lost <= most * utterances:
            return ""
        what = f"{lost} of {utterances} training utterances could not be read"
        return f"{what}, more than --most-left-out {most:g}"

    def give_up(self, error: BaseException) -> NoReturn:
        """Save what was learned since the last checkpoint, and end the training with an error.

        Updates that were skipped last are forgotten, so that a resumed training repeats them.
        """
        self.state = self.learned | dict(skipped=0)
        if self.update > self.saved:
            self.save()
        raise error

    # Dev.

    def validate(self) -> dict[int, dict]:
        """Decode dev with every size, and keep the network that has the fewest errors in best.pt.

        Returns size → the error rate `wer`, counts, layers kept; `measure` says whether the errors
        are of words or of characters.
        """
        self.rank_layers()
        result = {}
        for size, errors in self.dev_errors().items():
            result[size] = dict(
                wer=errors.rate,
                measure="wer" if self.blanks else "cer",
                errors=errors.total,
                words=errors.words,
                layers=kept_names(self.model, size),
            )
        if self.note_validation(self.update, result):
            self.write("best.pt")
        self.log(dict(update=self.update, dev=result))
        return result

    def note_validation(self, update: int, result: dict[int, dict]) -> bool:
        """Note that dev was decoded after an update; return whether it has the fewest errors."""
        errors = sum(of_size["errors"] for of_size in result.values())
        is_best = errors < self.best
        self.best = min(errors, self.best)
        self.validated = update
        return is_best

    def dev_errors(self) -> dict[int, Errors]:
        """Decode dev, each process its share; return size → errors of all, largest first.

        They are in words, or in characters where the language writes no blanks.
        Utterances that can't be read are named in left-out.txt and not counted. Raises ValueError
        where they are more than the share `most_left_out`.
        """
        sizes = list(reversed(self.model.sizes))
        network = checkpoint.Checkpoint(
            self.run, self.model, self.tokenizer, None, self.longest_seconds
        )
        facts = facts_of(network)
        texts, unreadable = transcribe(self.model, self.dev, sizes, "validating", facts)
        self.note_left_out({f"{UNREADABLE} (dev)": unreadable})
        self.check_dev(unreadable)
        totals = {}
        for size in sizes:
            errors = sum(errors_of(self.dev.utterances, texts[size], self.blanks), Errors())
            counts = torch.tensor(dataclasses.astuple(errors))
            counts = processes.total(counts)
            totals[size] = Errors(*counts.tolist())
        return totals

    def check_dev(self, unreadable: dict[str, str]) -> None:
        """Raise ValueError where too many dev utterances can't be read, by all processes."""
        unlisted = self.corpus.left_out.get(f"{UNREADABLE} (dev)", {})
        now = processes.total(torch.tensor(len(unreadable)))
        lost = len(unlisted) + int(now)
        if lost > self.config.most_left_out * self.dev_utterances:
            reasons = [*unlisted.values(), *unreadable.values(), ""]
            first = reasons[0]
            what = f"{lost} of {self.dev_utterances} dev utterances can't be read"
            raise processes.in_first(ValueError(f"{what}, more than --most-left-out: {first}"))

    # What is written.

    def save(self) -> None:
        """Write the checkpoint, keep the ones before it, and write the ranking for people.

        Raises FloatingPointError where a weight is not finite.
        """
        self.rank_layers()
        state = self.state | dict(optimizer=self.optimizer.state_dict())
        state["fingerprint"] = self.fingerprint
        state["batches_of_an_update"] = self.batches_of_an_update
        self.write(checkpoint.NAME, training=state, keep=self.config.keep)
        self.saved = self.update
        if not processes.is_first():
            return
        pairs = zip(self.model.ranking, self.model.ranked_scores(), strict=True)
        ranked = [dict(layer=layer_name(layer), score=score) for layer, score in pairs]
        text = json.dumps(ranked, indent=2) + "\n"
        files.write(self.run / "ranking.json", text.encode())

    def write(self, name: str, **more: object) -> None:
        """Write the network to a file of the run directory, in the first process."""
        if processes.is_first():
            more["longest_seconds"] = self.longest_seconds
            checkpoint.save(self.run / name, self.model, self.tokenizer, **more)

    def log(self, record: dict) -> None:
        """Add a line to metrics.jsonl, in the first process."""
        if processes.is_first():
            run_directory.log(self.run, record | dict(time=time.time()))
            if self.board:
                self.board(record)

    def note_left_out(self, left_out: dict[str, dict[str, str]]) -> None:
        """Add to left-out.txt the utterances that are not in it; why → id → what exactly."""
        run_directory.note_left_out(self.run, left_out)


def wait_for(*values: Tensor) -> list[list[float]]:
    """Return the numbers in some tensors: in an update, the one wait for the device."""
    flat = torch.cat([value.detach().flatten().float() for value in values])
    numbers = iter(flat.tolist())
    return [list(islice(numbers, value.numel())) for value in values]


def silence(config: Config) -> Batch:
    """Return a batch for a process that could read nothing, while others wait for its gradients.

    It has no utterances and one row of silence, whose loss counts as 0.
    """
    features = torch.zeros(1, 8, config.mel_bins)
    lengths = torch.tensor([8])
    labels = torch.zeros(1, 1, dtype=torch.long)
    zero = torch.zeros(1, dtype=torch.long)
    return Batch([], features, lengths, labels, zero, zero, corrupt={})


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


def clean_caches(config: Config) -> None:
    """Delete from the caches what interrupted processes left unfinished."""
    cache.clean(cache.user_cache())
    if config.cache_features:
        cache.clean(Path(config.cache_features))


def fingerprint_of(corpus: Corpus) -> str:
    """Return a number, in hexadecimal digits, that tells the ids and texts of utterances."""
    digest = sha256()
    for utterance in corpus.utterances:
        line = f"{utterance.id}\t{utterance.text}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def new_network(config: Config, labels: int) -> Supernet:
    """Return the initial network of a training.

    Raises ValueError where `layers_from` has another number of layers, and for a network that does
    not fit into the memory.
    """
    ranking = None
    if config.layers_from:
        ranking = checkpoint.load(Path(config.layers_from)).model.ranking
        if len(ranking) != config.layers:
            raise ValueError(
                f"{config.layers_from}: has {len(ranking)} layers, this network has {config.layers}"
            )
    if config.method == "layerdrop":
        ranking = every_other(config.layers, config.sizes)
    size = config.size if 0 < config.size < config.layers else None
    with torch.device("meta"):  # weights without memory
        check_memory(Supernet(config, labels, ranking, size))
    return Supernet(config, labels, ranking, size)


def check_memory(model: Supernet) -> None:
    """Raise ValueError where a network can't be trained in this machine's memory.

    A float32 weight takes 16 bytes: itself, its gradient and AdamW's two moments.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 16 * weights > memory:
        raise ValueError(
            f"a network of {weights:,} weights takes {16e-9 * weights:.0f} GB in training, "
            f"more than the {1e-9 * memory:.0f} GB of this machine: lower --blocks or --width"
        )


def optimizer_for(model: Supernet, config: Config) -> torch.optim.Optimizer:
    """Return AdamW, in which the layer scores have another learning rate and no weight decay."""
    weights = [weight for name, weight in model.named_parameters() if name != "scores"]
    groups = [dict(params=weights, factor=1.0)]
    if model.scores is not None:
        groups.append(dict(params=[model.scores], factor=config.score_rate, weight_decay=0.0))
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(0.9, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def mean_of(records: list[dict]) -> dict:
    """Return one line of metrics.jsonl: the last record, with sums and means of all of them."""
    losses: dict[int, list[float]] = {}
    for record in records:
        for size, loss in record.get("losses", {}).items():
            losses.setdefault(size, []).append(loss)
    line = dict(records[-1])
    line["losses"] = {size: fmean(values) for size, values in losses.items()}
    for name in ("seconds", "audio_seconds", "waiting"):
        line[name] = sum(record[name] for record in records)
    line["audio_seconds_per_second"] = line["audio_seconds"] / line["seconds"]
    line["padding"] = fmean(record["padding"] for record in records)
    return line
