"""The training loop of both steps, and below it what keeps a training safe.

What an update does follows from the settings and its number: steps.py says it.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import IO, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dynsize import checkpoint, files, processes, run_directory, steps
from dynsize.batching import Batch
from dynsize.config import Config, with_changes
from dynsize.initial import load_teacher, new_network, optimizer_for
from dynsize.schedule import ends_span, learning_rate
from dynsize.steps import Update
from dynsize.training_data import Dev, TrainingData, too_many

NOTHING_READ = "no utterance could be read"  # why an update is skipped
MOST_SKIPPED = 10  # updates in a row that are skipped before the training gives up


class Trainer:
    """A training in a run directory.

    `updates()` runs it; `save()` writes the checkpoint from which `resume` goes on. `data` is what
    it reads. With several processes each has a Trainer, with the same weights. The first process
    writes checkpoints and the log. Each process notes what it could not read, and what it had read
    for an update that is skipped.

    `loaded`: a checkpoint. With a training's state, the training goes on from there; without one,
    its network is the initial network.
    """

    def __init__(
        self, config: Config, run: Path, loaded: checkpoint.Checkpoint | None = None
    ) -> None:
        processes.use_gpu(config.device)
        self.config = config
        self.run = run
        self.device = processes.device_of(config)
        self.source = loaded.path if loaded else None
        self.data = TrainingData(config, loaded.tokenizer if loaded else None)
        self.dev = Dev(run, self.data)
        torch.manual_seed(config.seed)
        model = loaded.model if loaded else new_network(config, self.data.tokenizer.labels)
        self.model = model.to(self.device)
        self.teacher = None
        if config.teacher:
            teacher = load_teacher(config, self.data.tokenizer)
            self.teacher = teacher.to(self.device)
        self.optimizer = optimizer_for(self.model, config)
        # `batches`: how many were taken since the training began. `first`: how many batches the
        # epochs before this one have. `skipped`: updates in a row, the last ones.
        self.state = dict(update=0, batches=0, epoch=0, first=0, skipped=0)
        self.listeners: list[Callable[[dict], None]] = []  # each gets what `log` gets
        self.requests = processes.Requests()
        self.locked: IO[bytes] | None = None  # open as long as the directory is ours
        self.dev_errors: dict[int, float] = {}  # update → errors on dev, see `errors_on_dev`
        if loaded and loaded.training is not None:
            self.restore(loaded.path, loaded.training)
        done = torch.zeros(processes.count(), dtype=torch.int64)
        done[processes.number()] = self.done
        if len(set(processes.total(done).tolist())) > 1:
            raise processes.in_first(ValueError(f"{run}: processes read different checkpoints"))
        processes.start_alike(self.model)
        self.last_good = self.state.copy()  # after the last update that was not skipped
        self.saved, self.saved_at = self.done, time.monotonic()

    @property
    def done(self) -> int:
        """The number of updates that are done; the next update has this number, from 0."""
        return self.state["update"]

    def updates(self) -> Iterator[dict]:
        """Train to the end, or to the update after the one in which a stop is asked for.

        Yields what each update did, with the dev word error rates after a validation. A checkpoint
        comes before a validation, so that a kill in between loses nothing.
        """
        config, model, optimizer = self.config, self.model, self.optimizer
        self.prepare()
        loader = self.data.batches(self.state, pin=self.device.type == "cuda")
        logged: list[dict] = []
        stop = False
        try:
            while self.done < config.updates and not stop:
                start = time.perf_counter()
                batches, label_count, readers, record = self.read(loader)
                stop = record["stop"]
                update = steps.planned(model, self.done)
                rate = learning_rate(update.number, config)
                self.state["update"] += 1
                self.state["batches"] += len(batches) * processes.count()
                sizes = list(update.loss_weights)
                record |= dict(update=self.done, step=update.step, sizes=sizes, learning_rate=rate)

                # Forward and backward: one pass of each for all networks of the update.
                fault = NOTHING_READ
                if readers:
                    losses = self.add_gradients(update, batches, label_count, readers)
                    norm = clip_grad_norm_(model.parameters(), config.clip or math.inf)
                    # The CPU waits for the device here, and elsewhere only to log scores, to rank,
                    # and where torch computes the CTC loss on a GPU.
                    *losses, norm = torch.cat([losses, norm[None]]).tolist()
                    finite = math.isfinite(sum(losses) + norm)
                    fault = "" if finite else f"loss {sum(losses)}, gradient norm {norm}"

                # Step, or skip: weights and optimizer then stay as they are.
                if fault:
                    self.skip(batches, fault)
                else:
                    record["losses"] = dict(zip(sizes, losses, strict=True))
                    record["gradient_norm"] = norm
                    if update.step == 1 and self.due(config.log_every):
                        record |= steps.shown_scores(update, model)
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["factor"]
                    optimizer.step()
                    self.state["skipped"] = 0
                    self.last_good = self.state.copy()
                optimizer.zero_grad()
                if update.step == 1 and ends_span(update.number, config):
                    # The next update may depend on the ranking.
                    steps.rank_layers(model, update.number)

                # Log, save, validate.
                record["seconds"] = time.perf_counter() - start
                logged.append(record)
                if self.due(config.log_every):
                    self.log(run_directory.mean_of(logged))
                    logged = []
                late = time.monotonic() - self.saved_at > 60 * config.save_minutes
                due = self.due(config.save_every) or self.due(config.validate_every)
                if due or late or self.requests.save or stop:
                    self.save()
                if self.due(config.validate_every) and not stop:
                    record["dev"] = self.validate()
                yield record
        except ConnectionError as error:  # another process, or the reader of the output, is gone
            self.give_up(processes.in_first(error))

    def read(self, loader: Iterator[Batch]) -> tuple[list[Batch], float, float, dict]:
        """Read the batches of an update.

        Returns this process's batches; how many target labels all processes read, 1 where they read
        silence alone; how many processes read something; and what the log tells of it. Gives up
        where a process that reads audio died, or where too many utterances can't be read.
        """
        batches: list[Batch] = []
        failure = None
        start = time.perf_counter()
        try:
            batches = list(islice(loader, self.config.accumulate))
        except ChildProcessError as error:
            failure = error
        waiting = time.perf_counter() - start
        for batch in batches:
            self.data.note_unreadable(batch, self.run)
        utterances = [utterance for batch in batches for utterance in batch.utterances]
        here = [
            sum(utterance.samples for utterance in utterances) / self.config.sample_rate,
            sum(int(batch.label_lengths.sum()) for batch in batches),
            bool(utterances),
            self.data.left_out,
            self.requests.stop > 0,
            failure is not None,
        ]
        # Sums over the processes, made on the CPU: nothing waits for the device.
        sums = processes.total(torch.tensor(here, dtype=torch.float64))
        seconds, label_count, readers, left_out, stop, failed = sums.tolist()
        if failed:
            self.give_up(failure or SystemExit(processes.FAILED))
        if told := too_many(int(left_out), self.data.corpus, "training", self.config):
            error = ValueError(f"{told}; {self.run / run_directory.LEFT_OUT} names them")
            self.give_up(processes.in_first(error))
        record = dict(
            epoch=self.data.examples.epoch,
            audio_seconds=seconds,
            left_out=int(left_out),
            waiting=waiting,
            padding=fmean(batch.padding for batch in batches),
            stop=stop > 0,
        )
        return batches, max(1.0, label_count), readers, record

    def add_gradients(
        self, update: Update, batches: list[Batch], label_count: float, readers: float
    ) -> Tensor:
        """Compute the gradients of an update; return the loss of each network, (M,).

        Gradients and losses are summed over all batches of all processes. `label_count`: how many
        target labels these have. `readers`: how many processes have a batch; the others add
        nothing.
        """
        losses = torch.zeros(len(update.loss_weights), device=self.device)
        batches = [batch for batch in batches if batch.utterances]
        for batch in batches:
            loss, by_network = steps.losses_of(update, batch, label_count, self.model, self.teacher)
            if batch is batches[-1]:  # once in each process that has a batch: in all, once
                loss = loss + steps.extra_loss(update, self.model) / readers
            loss.backward()
            losses += by_network
        # Here gradients and losses become their sums over the processes, once for an update.
        processes.sum_gradients(self.model)
        return processes.total(losses)

    def due(self, every: int) -> bool:
        """Return whether something that is done every so often is due after this update."""
        return self.done % every == 0 or self.done == self.config.updates

    def validate(self) -> dict[int, dict]:
        """Decode dev with every size, and keep the network that has the fewest errors in best.pt.

        Returns what `Dev.results` tells of each size.
        """
        try:
            result = self.dev.results(self.model)
        except (ValueError, SystemExit) as error:  # too much can't be read, here or in the first
            self.give_up(error)
        errors = run_directory.errors_on_dev(result)
        if errors < min(self.dev_errors.values(), default=math.inf):
            self.write("best.pt")
        self.dev_errors[self.done] = errors
        self.log(dict(update=self.done, dev=result))
        return result

    def log(self, record: dict) -> None:
        """Add a line to metrics.jsonl and tell it the listeners, in the first process."""
        if processes.is_first():
            run_directory.log(self.run, record | dict(time=time.time()))
            for listener in self.listeners:
                listener(record)

    def save(self) -> None:
        """Write the checkpoint, keep the ones before it, and write `ranking.json`."""
        steps.rank_layers(self.model, self.done - 1)
        state = self.state | dict(optimizer=self.optimizer.state_dict())
        state["fingerprint"] = self.data.fingerprint
        state["batches_of_an_update"] = processes.count() * self.config.accumulate
        self.write(checkpoint.NAME, training=state, keep=self.config.keep)
        self.saved, self.saved_at = self.done, time.monotonic()
        self.requests.save = False
        if processes.is_first():
            run_directory.write_ranking(self.run, self.model)

    def write(self, name: str, **more: object) -> None:
        """Write the network to a file of the run directory, in the first process."""
        if processes.is_first():
            more["longest_seconds"] = self.data.longest_seconds
            checkpoint.save(self.run / name, self.model, self.data.tokenizer, **more)

    # ---------------------------------------------------------------------------------------------
    # What keeps it safe. The paper's method is all above.

    def begin(self) -> "Trainer":
        """Make the run directory, with a lock and its first files. Returns itself.

        A training that is there is renamed; the scripts ask `check_new` before. Raises ValueError
        where the directory is not a training's, or has what this training starts from.
        """
        with processes.first_alone():
            if processes.is_first():
                about = self.config, self.data.summary, self.data.corpus.left_out
                self.locked = run_directory.begin(self.run, self.config, self.source)
                run_directory.write_about(self.run, *about)
        return self

    @classmethod
    def resume(cls, run: Path, changes: dict[str, object] | None = None) -> "Trainer":
        """Return the training of a run directory as its last whole checkpoint left it.

        `changes`: settings with other values. Raises ValueError for those that change what is
        learned, and where no training can go on. The number of processes may be another one.
        """
        locked = None
        with processes.first_alone():
            if not checkpoint.history(run):
                raise ValueError(f"{run}: not a directory with the checkpoint of a training")
            if processes.is_first():
                locked = run_directory.lock(run)
            loaded = checkpoint.load(run)
            if loaded.training is None:
                raise ValueError(f"{loaded.path}: a checkpoint without the state of a training")
            config = with_changes(loaded.model.config, changes or {})
        loaded.model.config = config
        loaded.model.encoder.recompute = config.checkpoint_activations
        trainer = cls(config, run, loaded)
        trainer.locked = locked
        with processes.first_alone():
            if processes.is_first():
                files.clean(run)
                # What an interrupted training did after its checkpoint is done again.
                trainer.dev_errors = run_directory.forget_after(run, trainer.done)
                data = trainer.data
                run_directory.write_about(run, config, data.summary, data.corpus.left_out)
        return trainer

    def restore(self, path: Path, training: dict) -> None:
        """Take a checkpoint's state; warn where its training had other utterances or batches.

        Raises ValueError for a state that a training can't have.
        """
        try:
            self.state = {name: int(training[name]) for name in self.state}
            self.optimizer.load_state_dict(training["optimizer"])
            fingerprint, before = training["fingerprint"], int(training["batches_of_an_update"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{path}: no training can go on with its state"
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
        if processes.is_first() and fingerprint != self.data.fingerprint:
            utterances = len(self.data.corpus.utterances)
            what = f"{self.config.corpus}: the ids or texts of its {utterances} utterances"
            warnings.warn(f"{what} are not those with which this training began", stacklevel=2)
        now = processes.count() * self.config.accumulate
        if processes.is_first() and now != before:
            what = f"batches of an update, in all processes: {now}, and not {before} as before"
            warnings.warn(f"{what}: the result is not that of an unbroken training", stacklevel=2)

    def prepare(self) -> None:
        """Do what should fail now and not after a day, and the validation that a stop left undone.

        The largest batch is tried for its memory. Before the first update dev is decoded, since its
        audio may be unreadable.
        """
        processes.keep_freed_memory()
        validated = processes.total(torch.tensor(int(self.done in self.dev_errors)))
        if self.done > 0 and self.due(self.config.validate_every) and not validated:
            self.validate()
        if self.done < self.config.updates:
            self.rehearse()
        if self.done == 0:
            self.dev.errors(self.model)

    def rehearse(self) -> None:
        """Compute the gradients of the largest batch as in step 1 and as in step 2.

        Meanwhile tensors take the memory that the optimizer's state will take. Raises ValueError
        where the memory is too small.
        """
        batch = self.data.largest_batch()
        utterances, frames = batch.features.shape[:2]
        readers = processes.total(torch.tensor(int(utterances > 0)))
        if not readers:
            return
        moments = [] if self.optimizer.state else [*self.model.parameters()] * 2
        try:
            reserved = [torch.ones_like(weight) for weight in moments]
            for number in sorted({0, self.config.updates - 1}):
                update = steps.planned(self.model, number)
                self.add_gradients(update, [batch], label_count=1, readers=readers)
            del reserved
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            first_line = str(error).splitlines()[0]
            raise ValueError(
                f"the largest batch, {utterances} utterances of up to {frames} frames, does not "
                "fit into the memory: set --checkpoint-activations (the result is the same), or "
                f"lower --batch-seconds {self.config.batch_seconds:g} and raise --accumulate, also "
                f"with --resume. {first_line}"
            ) from error
        self.optimizer.zero_grad()

    # Where a corpus disappears, or audio is damaged:
    # 1. An utterance that can't be read is missing from its batch, named in left-out.txt, counted.
    # 2. An update is skipped where no process could read anything, or where a loss or the gradient
    #    is not finite. Batches that worker processes have read before still train.
    # 3. The training gives up after ten skipped updates in a row, or where more than the share
    #    `most_left_out` of an epoch or of dev can't be read.
    # 4. It goes back to the last update that was not skipped, saves, and exits with 2.
    # With --workers 0, features that are in memory are not read again: the loss is noticed late.

    def skip(self, batches: list[Batch], fault: str) -> None:
        """Log an update that changed nothing; end the training where too many were in a row."""
        ids = [utterance.id for batch in batches for utterance in batch.utterances]
        skipped = dict(update=self.done, skipped=fault, utterances=ids, time=time.time())
        run_directory.log(self.run, skipped)
        self.state["skipped"] += 1
        if self.state["skipped"] < MOST_SKIPPED:
            return
        remedy = "lower --peak-learning-rate in a new training"
        if fault == NOTHING_READ:
            remedy = f"is {self.config.corpus} still there?"
        error = ValueError(
            f"{MOST_SKIPPED} updates in a row were skipped, the last one update {self.done}: "
            f"{fault}; {self.run / run_directory.METRICS} tells more; {remedy}"
        )
        self.give_up(processes.in_first(error))

    def give_up(self, error: BaseException) -> NoReturn:
        """Save what was learned since the last checkpoint, and end the training with an error.

        Updates that were skipped last are forgotten, also where they were saved, so that a resumed
        training repeats them.
        """
        self.state = self.last_good | dict(skipped=0)
        if self.done != self.saved:
            self.save()
        raise error
