"""The training loop of both steps. What an update does follows from the settings and its number."""

import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import torch
from torch import Tensor

from dynsize import checkpoint, files, processes, resuming, run_directory, steps
from dynsize.batching import Batch, epoch_plan
from dynsize.config import Config
from dynsize.corpora import UNREADABLE
from dynsize.dev import Dev
from dynsize.distillation import load_teacher
from dynsize.initial import new_network, optimizer_for
from dynsize.losses import Losses
from dynsize.metrics import mean_of
from dynsize.processes import device_of
from dynsize.rehearsal import rehearse
from dynsize.schedule import in_step1, learning_rate
from dynsize.supernet import Supernet, layer_name
from dynsize.training_data import TrainingData

MOST_SKIPPED = 10  # updates in a row that are skipped before the training gives up
SECOND_SIGNAL = 1.0  # seconds after which a second signal ends the training at once


class Trainer:
    """A training in a run directory.

    `updates()` runs it; `save()` writes the checkpoint from which `resume` goes on. `data` is what
    it reads. With several processes each has a Trainer. They have the same weights, and the first
    process writes.

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
        self.starts_from = [loaded.path] if loaded else []
        self.data = TrainingData(config, loaded.tokenizer if loaded else None)
        self.dev = Dev(config, run, self.data)
        self.data.corpus.left_out |= self.dev.left_out
        torch.manual_seed(config.seed)
        model = loaded.model if loaded else new_network(config, self.data.tokenizer.labels)
        self.model = model.to(self.device)
        self.losses = Losses(self.model, self.teacher_network())
        self.optimizer = optimizer_for(self.model, config)
        # `batches`: how many were taken since the training began. `first`: how many batches the
        # epochs before this one have. `skipped`: updates in a row, the last ones.
        self.state = dict(update=0, batches=0, epoch=0, first=0, skipped=0)
        self.best = math.inf  # fewest errors on dev up to now
        self.validated = 0  # the last update after which dev was decoded
        self.failure: Exception | None = None  # why this process can't go on
        if loaded and loaded.training:
            self.restore(loaded.training)
        self.last_good = self.state.copy()  # after the last update that was not skipped
        self.saved = self.done

    def restore(self, training: dict) -> None:
        """Take a checkpoint's state; warn where its training had other utterances or batches."""
        self.state = {name: training[name] for name in self.state}
        self.optimizer.load_state_dict(training["optimizer"])
        resuming.tell_other_corpus(training["fingerprint"], self.data)
        before = training["batches_of_an_update"]
        resuming.tell_other_batches(before, self.batches_of_an_update)

    def teacher_network(self) -> Supernet | None:
        """Return the network that teaches this one, None where there is none."""
        if not self.config.teacher:
            return None
        loaded = load_teacher(self.config, self.data.tokenizer)
        self.starts_from.append(loaded.path)
        return loaded.model.to(self.device)

    @property
    def done(self) -> int:
        """The number of updates that are done; the next update has this number, from 0."""
        return self.state["update"]

    @property
    def batches_of_an_update(self) -> int:
        """The number of batches whose gradients make one update, in all processes."""
        return processes.count() * self.config.accumulate

    # Beginning, stopping and resuming.

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
                raise ValueError(f"{loaded.path}: a network alone, with which no training goes on")
            config = resuming.changed(loaded.model.config, changes or {})
        loaded.model.config = config
        trainer = cls(config, run, loaded)
        trainer.locked = locked
        with processes.first_alone():
            if processes.is_first():
                trainer.take_over()
        trainer.validated = int(processes.total(torch.tensor(trainer.validated)))
        return trainer

    def take_over(self) -> None:
        """Forget what an interrupted training did after its checkpoint."""
        files.clean(self.run)
        for record in run_directory.forget_after(self.run, self.done):
            if "dev" in record:
                self.note_validation(record["update"], record["dev"])
        run_directory.write_config(self.run, self.config)

    def begin(self) -> "Trainer":
        """Make the run directory; a training that is in it gets another name.

        Raises ValueError where the directory is not one of ours, where another training is at work
        in it, and where it has what this training starts from. Returns itself.
        """
        with processes.first_alone():
            if processes.is_first():
                self.make_directory()
        return self

    def make_directory(self) -> None:
        """Make the run directory, locked and with its first files."""
        if self.config.layers_from:
            self.starts_from.append(checkpoint.load(Path(self.config.layers_from)).path)
        for source in self.starts_from:
            if source.parent.resolve() == self.run.resolve():
                raise ValueError(f"{self.run}: has {source.name}, from which this training starts")
        self.locked = run_directory.begin(self.run, self.config, self.data.summary)
        run_directory.note_left_out(self.run, self.data.corpus.left_out)

    def stop(self, number: int, frame: object = None) -> None:
        """Save and end as soon as the update that runs is done: a handler of signals.

        train.py then exits with 128 + the signal's number. A signal that comes after an update's
        gradients lets one more update train. Worker processes of the loader ignore signals and are
        killed at the end. A validation goes on to its end, as its checkpoint is written already,
        and no further update is trained; the last validation ends the training as without a signal.
        Where dev is decoded before the first update of this process, that update is trained.
        Schedulers may send a signal twice within a second, which counts once. A later one ends the
        process without saving.
        """
        now = time.monotonic()
        if self.stop_soon and now - self.stopped_at > SECOND_SIGNAL:
            raise SystemExit(128 + number)
        if not self.stop_soon:
            self.stop_soon = number
            self.stopped_at = now

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
        if self.done < config.updates:
            rehearse(self.data, self.losses, self.optimizer)
        if self.done == 0:
            self.dev.errors(self.model)
        batches = self.batches()
        stop = False
        while self.done < config.updates and not stop:
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
                stop = record["stop"] = self.done < config.updates and self.stop_is_asked_for()
            yield record
        if self.failure:
            self.give_up(self.failure)

    def stop_is_asked_for(self) -> bool:
        """Return whether any process got a signal to stop."""
        return bool(processes.total(torch.tensor(int(self.stop_soon > 0))))

    def due(self, every: int) -> bool:
        """Return whether something that is done every so often is due after this update."""
        return self.done % every == 0 or self.done == self.config.updates

    def validation_is_pending(self) -> bool:
        """Return whether the training ended between a checkpoint and its validation."""
        due = self.done > 0 and self.due(self.config.validate_every)
        return due and self.validated < self.done

    def batches(self) -> Iterator[Batch]:
        """Yield this process's batches from now on, epoch after epoch.

        With N processes, process i takes batches i, i + N, i + 2N, … of all epochs' plans.
        """
        number = self.state["batches"] + processes.number()  # of the next batch, in all epochs
        while True:
            epoch = self.state["epoch"]
            frames = self.data.begin_epoch(epoch)
            plan = epoch_plan(frames, self.config, epoch)
            place = max(0, number - self.state["first"])
            mine = plan[place :: processes.count()]
            if mine:
                yield from self.data.load(mine, pin=self.device.type == "cuda")
            number += len(mine) * processes.count()
            self.state["first"] += len(plan)
            self.state["epoch"] += 1

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
            run_directory.note_left_out(self.run, {UNREADABLE: batch.corrupt})
        self.count_left_out(read["left_out"])
        update = self.done
        record = dict(
            update=update + 1,
            step=1 if in_step1(update, self.config) else 2,
            sizes=list(steps.loss_weights(self.model, update)),
            epoch=self.data.examples.epoch,
            learning_rate=learning_rate(update, self.config),
            audio_seconds=read["seconds"],
            left_out=self.data.left_out,
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
            self.last_good = self.state.copy()
        self.optimizer.zero_grad()
        steps.rank_at_span_end(self.model, update)
        return record

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
        losses = self.losses.add_all_gradients(batches, self.done, max(1, labels))
        stop = losses.new_full((1,), float(self.stop_soon > 0))
        total = processes.total(torch.cat([losses, stop]))
        losses, stop = total.split([len(losses), 1])
        most = self.config.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        scores = [self.model.scores] if self.scores_are_due() else []
        losses, (norm,), (stop,), *scores = wait_for(losses, norm, stop, *scores)
        record["stop"] |= stop > 0
        for values in scores:
            record |= steps.shown_scores(self.model, self.done, values)
        if not math.isfinite(sum(losses) + norm):
            return f"loss {sum(losses)}, gradient norm {norm}"
        record["losses"] = dict(zip(record["sizes"], losses, strict=True))
        record["gradient_norm"] = norm
        self.optimizer.step()
        return ""

    def scores_are_due(self) -> bool:
        """Return whether the update that runs is one of step 1 of which a line is logged."""
        number = self.done + 1
        due = number % self.config.log_every == 0 or number == self.config.updates
        return due and in_step1(self.done, self.config)

    # What goes wrong.
    #
    # Where a corpus disappears, or audio is damaged:
    # 1. An utterance that can't be read is missing from its batch, named in left-out.txt, counted.
    # 2. An update of which nothing could be read is skipped, as one whose losses or gradient are
    #    not finite. Batches that worker processes have read before still train.
    # 3. The training gives up after ten skipped updates in a row, where more than the share
    #    `most_left_out` could not be read in an epoch, or where as much of dev can't be read,
    #    whichever comes first.
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
        what = f"{MOST_SKIPPED} updates in a row were skipped, the last one update {self.done}"
        where = f"{self.run / run_directory.METRICS} tells more"
        if ids:
            advice = "try a lower peak learning rate"
            error = FloatingPointError(f"{what}: {fault}; {where}, and {advice}")
        else:
            error = ValueError(f"{what}: {fault}; is {self.config.corpus} still there? {where}")
        self.give_up(processes.in_first(error))

    def count_left_out(self, number: float) -> None:
        """Count utterances that could not be read.

        Where they are too many, the first process sets `failure`, and the next update gives up.
        """
        self.data.left_out += int(number)
        told = self.data.too_many_left_out()
        if told and processes.is_first():
            self.failure = ValueError(f"{told}; {self.run / run_directory.LEFT_OUT} names them")

    def give_up(self, error: BaseException) -> NoReturn:
        """Save what was learned since the last checkpoint, and end the training with an error.

        Updates that were skipped last are forgotten, also where they were saved, so that a resumed
        training repeats them.
        """
        self.state = self.last_good | dict(skipped=0)
        if self.done != self.saved:
            self.save()
        raise error

    # Dev.

    def validate(self) -> dict[int, dict]:
        """Decode dev with every size, and keep the network that has the fewest errors in best.pt.

        Returns what `Dev.results` tells of each size.
        """
        steps.rank_layers(self.model, self.done - 1)
        try:
            result = self.dev.results(self.model)
        except (ValueError, SystemExit) as error:  # too much can't be read, here or in the first
            self.give_up(error)
        if self.note_validation(self.done, result):
            self.write("best.pt")
        self.log(dict(update=self.done, dev=result))
        return result

    def note_validation(self, update: int, result: dict[int, dict]) -> bool:
        """Note that dev was decoded after an update; return whether it has the fewest errors."""
        errors = sum(of_size["errors"] for of_size in result.values())
        is_best = errors < self.best
        self.best = min(errors, self.best)
        self.validated = update
        return is_best

    # What is written.

    def save(self) -> None:
        """Write the checkpoint, keep the ones before it, and write the ranking for people.

        Raises FloatingPointError where a weight is not finite.
        """
        steps.rank_layers(self.model, self.done - 1)
        state = self.state | dict(optimizer=self.optimizer.state_dict())
        state["fingerprint"] = self.data.fingerprint
        state["batches_of_an_update"] = self.batches_of_an_update
        self.write(checkpoint.NAME, training=state, keep=self.config.keep)
        self.saved = self.done
        if not processes.is_first():
            return
        pairs = zip(self.model.ranking, self.model.ranked_scores(), strict=True)
        ranked = [dict(layer=layer_name(layer), score=score) for layer, score in pairs]
        text = json.dumps(ranked, indent=2) + "\n"
        files.write(self.run / "ranking.json", text.encode())

    def write(self, name: str, **more: object) -> None:
        """Write the network to a file of the run directory, in the first process."""
        if processes.is_first():
            more["longest_seconds"] = self.data.longest_seconds
            checkpoint.save(self.run / name, self.model, self.data.tokenizer, **more)

    def log(self, record: dict) -> None:
        """Add a line to metrics.jsonl, in the first process."""
        if processes.is_first():
            run_directory.log(self.run, record | dict(time=time.time()))
            if self.board:
                self.board(record)


def wait_for(*values: Tensor) -> list[list[float]]:
    """Return the numbers in some tensors: the one wait for the device, beside ranking."""
    flat = torch.cat([value.detach().flatten().float() for value in values])
    numbers = iter(flat.tolist())
    return [list(islice(numbers, value.numel())) for value in values]
