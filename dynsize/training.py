"""The training loop of both steps: everything that an update does is a function of the configuration and its number."""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from dynsize import checkpoint, processes, sandwich
from dynsize.algorithms import ALGORITHMS
from dynsize.baselines import every_other
from dynsize.batching import Batch, Examples, epoch_plan, keep_usable, load
from dynsize.config import Config
from dynsize.conformer import Gates
from dynsize.corpora import UNREADABLE, Corpus, read_corpus
from dynsize.ctc import ctc_loss
from dynsize.evaluation import (
    corpus_root,
    device_of,
    errors_of,
    kept_names,
    transcribe,
)
from dynsize.kernels import layer_gates
from dynsize.schedule import learning_rate, step1_updates
from dynsize.summary import summary
from dynsize.supernet import Supernet, layer_name
from dynsize.tokenizer import tokenizer_for
from dynsize.wer import Errors

LOCK = "lock"  # in a run directory, held by the training in it
MOST_SKIPPED = (
    10  # updates in a row with a loss or gradient that is not finite, before the training gives up
)


class Trainer:
    """A training in a run directory. `updates()` runs it; `save()` writes the checkpoint that `resume` goes on from.

    `loaded`: a checkpoint to go on from; one without a training's state gives the network to begin with. `corpus` tells
    what is trained on, which training utterances are not, and why. Of several processes each has a Trainer; they have
    the same weights, and the first one writes.
    """

    save_soon = False  # set from outside: save behind the next update
    stop_soon = (
        0  # not 0, set from outside: save there, and end; all processes do so where one has it set
    )

    def __init__(
        self, config: Config, run: Path, loaded: checkpoint.Checkpoint | None = None
    ) -> None:
        self.config, self.run, self.device = config, run, device_of(config)
        with processes.first_alone():
            self.corpus = read_corpus(
                corpus_root(config), config.train_splits, config, "--train-splits"
            )
        texts = (utterance.text for utterance in self.corpus.utterances)
        self.tokenizer = loaded.tokenizer if loaded else tokenizer_for(texts, config)
        keep_usable(self.corpus, self.tokenizer, config)
        dev = read_corpus(corpus_root(config), config.dev_splits, config, "--dev-splits")
        for why, names in dev.left_out.items():
            self.corpus.left_out[f"{why} (dev)"] = names
        self.examples = Examples(
            self.corpus.utterances, self.tokenizer, config, keep=config.workers == 0
        )
        own_dev = dev.utterances[processes.rank() :: processes.count()]
        self.dev = Examples(own_dev, self.tokenizer, config, keep=config.workers == 0)
        torch.manual_seed(config.seed)
        self.model = (loaded.model if loaded else new_network(config, self.tokenizer.labels)).to(
            self.device
        )
        self.network = processes.wrapped(self.model)
        self.optimizer = optimizer_for(self.model, config)
        self.state = dict(
            update=0, batches=0, skipped=0, best=math.inf, epoch=0, first=0
        )  # batches: taken from the plans of all epochs; first: the number of the epoch's first one
        if loaded and loaded.training:
            self.state = {name: loaded.training[name] for name in self.state}
            self.optimizer.load_state_dict(loaded.training["optimizer"])

    @property
    def update(self) -> int:
        """How many updates are done."""
        return self.state["update"]

    def summary(self) -> str:
        """Return what the corpus holds, and what is odd in it, its dev and its test splits."""
        others: dict[str, Corpus | str] = {}
        flags = {"--dev-splits": self.config.dev_splits, "--test-splits": self.config.test_splits}
        for flag, splits in flags.items():
            for split in splits:
                try:
                    root = corpus_root(self.config)
                    others[split] = read_corpus(root, [split], self.config, flag)
                except ValueError as error:
                    others[split] = str(error)
        return summary(self.corpus, self.config, others)

    @classmethod
    def resume(cls, run: Path) -> "Trainer":
        """The training of a run directory, where its last whole checkpoint left it; with any number of processes."""
        loaded = checkpoint.load(run)
        if loaded.training is None:
            raise ValueError(f"{loaded.path}: a network alone, with which no training can go on")
        trainer = cls(loaded.model.config, run, loaded)
        trainer.lock()
        trainer.forget_later_lines()
        return trainer

    def begin(self) -> "Trainer":
        """Makes the run directory; one that is there is replaced, so that `check_new` comes first. Returns itself."""
        if processes.rank() == 0:
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock()
            for path in self.run.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            (self.run / "config.json").write_text(
                json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
            )
            (self.run / "corpus.txt").write_text(self.summary() + "\n")
            (self.run / "left-out.txt").touch()
            self.note_left_out(self.corpus.left_out)
        return self

    def lock(self) -> None:
        """Keeps other trainings out of the run directory while this process lives. ValueError where one is in it."""
        if processes.rank():
            return
        self.locked = open(self.run / LOCK, "w")  # noqa: SIM115 (closed, it would be free)
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{self.run}: another training is at work in it") from error

    def forget_later_lines(self) -> None:
        """Takes from metrics.jsonl what came after the checkpoint, and a line that was not written to its end."""
        metrics = self.run / "metrics.jsonl"
        if processes.rank() or not metrics.exists():
            return
        end = 0
        for line in metrics.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["update"] > self.update:
                break
            end += len(line)
        os.truncate(metrics, end)

    def updates(self) -> Iterator[dict]:
        """Trains to the end; yields what each update did, with the dev word error rates after a validation."""
        config, logged, saved = self.config, [], time.monotonic()
        self.rehearse()
        batches = self.batches()
        while self.update < config.updates:
            start = time.perf_counter()
            drawn = list(islice(batches, config.accumulate))
            waiting, padding = (
                time.perf_counter() - start,
                sum(batch.padding for batch in drawn) / len(drawn),
            )
            record = self.train_on(drawn) | dict(waiting=waiting, padding=padding)
            record["seconds"] = time.perf_counter() - start
            logged.append(record)
            if self.due(config.log_every):
                self.log(mean_of(logged))
                logged = []
            if self.due(config.validate_every):
                record["dev"] = self.validate()
            late = time.monotonic() - saved > 60 * config.save_minutes
            if self.due(config.save_every) or late or self.save_soon or record["stop"]:
                self.save()
                self.save_soon, saved = False, time.monotonic()
            yield record

    def due(self, every: int) -> bool:
        return self.update % every == 0 or self.update == self.config.updates

    def batches(self) -> Iterator[Batch]:
        """This process's batches from now on, epoch after epoch: of as many as there are processes that follow each
        other in the plan, one."""
        number = self.state["batches"] + processes.rank()  # of the next batch, in all epochs
        while True:
            self.examples.epoch = self.state["epoch"]
            plan = epoch_plan(self.examples.frames(), self.config, self.state["epoch"])
            own = plan[number - self.state["first"] :: processes.count()]
            yield from load(self.examples, own)
            number += len(own) * processes.count()
            self.state["first"] += len(plan)
            self.state["epoch"] += 1

    def rehearse(self) -> None:
        """Runs the batch with the most padded frames forward and backward, as in both steps, so that memory fails now
        and not after a day. Raises ValueError where it does."""
        self.examples.epoch = 0
        frames = self.examples.frames()
        worst = max(
            epoch_plan(frames, self.config, 0),
            key=lambda batch: len(batch) * max(frames[i] for i in batch),
        )
        (batch,) = load(self.examples, [worst])
        try:
            for update in {0, self.config.updates - 1}:
                self.add_gradients(batch, update, labels=1, sync=True)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise ValueError(
                f"the largest batch, {len(worst)} utterances of up to {max(frames[i] for i in worst)} frames, does not "
                f"fit into the memory: lower --batch-seconds {self.config.batch_seconds:g} (and raise --accumulate), "
                f"or set --checkpoint-activations. {str(error).partition(chr(10))[0]}"
            ) from error
        self.optimizer.zero_grad()

    def train_on(self, batches: list[Batch]) -> dict:
        """One update, or none where a loss or the gradient is not finite. Returns what to report of it."""
        config, update, step1 = self.config, self.update, self.update < step1_updates(self.config)
        for batch in batches:
            self.note_left_out({UNREADABLE: batch.corrupt})
        rate = learning_rate(update, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        labels = sum(batch.label_lengths.sum() for batch in batches).to(self.device)
        labels = processes.total(labels).clamp(min=1)
        losses = sum(
            self.add_gradients(batch, update, labels, sync=batch is batches[-1])
            for batch in batches
        )
        seconds = sum(u.samples for batch in batches for u in batch.utterances) / config.sample_rate
        everywhere = torch.cat([losses, losses.new_tensor([seconds, self.stop_soon])])
        *losses, seconds, stop = processes.total(everywhere).tolist()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip or math.inf
        ).item()
        self.state["update"] += 1
        self.state["batches"] += len(batches) * processes.count()
        record = dict(
            update=self.update, step=1 if step1 else 2, sizes=list(self.loss_weights(update))
        )
        record |= dict(learning_rate=rate, audio_seconds=seconds, stop=stop > 0)
        if math.isfinite(sum(losses)) and math.isfinite(norm):
            self.state["skipped"] = 0
            self.optimizer.step()
            record |= dict(
                losses=dict(zip(record["sizes"], losses, strict=True)), gradient_norm=norm
            )
        else:
            self.skip(batches, sum(losses), norm)
        self.optimizer.zero_grad()
        last = update + 1 == step1_updates(config)
        if step1 and (last or ALGORITHMS[config.method].needs_ranking(update, config)):
            self.rank_layers()
        return record

    def rank_layers(self) -> None:
        """Set the model's ranking from its scores, where the last update was one of step 1.

        Note: this waits for the device.
        """
        last, model = self.update - 1, self.model
        if 0 <= last < step1_updates(self.config):
            algorithm = ALGORITHMS[self.config.method]
            model.ranking = algorithm.rank(model.scores, model.ranking, last, self.config)

    def add_gradients(self, batch: Batch, update: int, labels: Tensor | int, sync: bool) -> Tensor:
        """Adds the gradient of a batch's losses, in nats for each of the `labels` that the update has in all processes.
        `sync`: the update's last batch, with which the gradients of all processes become one. Returns the losses, (M,).
        """
        config, model, step1 = self.config, self.model, update < step1_updates(self.config)
        features, lengths, targets, target_lengths, seeds = batch.to(self.device)
        weights, gates = self.loss_weights(update), self.gates(update, seeds)
        m, idle = len(weights), model.idle(list(weights), step1)
        with nullcontext() if sync or self.network is model else self.network.no_sync():
            drop = seeds if len(seeds) else None  # a batch of which nothing could be read has none
            log_probs, lengths = self.network(features, lengths, list(weights), gates, drop)
            stacked = (lengths.repeat(m), targets.repeat(m, 1), target_lengths.repeat(m))
            losses = (
                ctc_loss(log_probs.flatten(0, 1), *stacked).unflatten(0, (m, len(seeds))).sum(1)
                / labels
            )
            loss = processes.count() * (losses * losses.new_tensor(list(weights.values()))).sum()
            if step1 and sync:
                loss = loss + ALGORITHMS[config.method].extra_loss(
                    model.scores, model.ranking, update, config
                )
            (
                loss + 0 * sum(weight.sum() for weight in idle)
            ).backward()  # other processes wait for every gradient
        for weight in idle:
            weight.grad = None  # a zero would move the optimizer's state
        return losses.detach()

    def loss_weights(self, update: int) -> dict[int, float]:
        """The networks that an update trains, largest first: size → weight of its loss."""
        config = self.config
        if update < step1_updates(config):
            size = ALGORITHMS[config.method].size_at(update, config)
            return {config.layers: 1.0, size: config.subnet_loss}
        if config.method == "layerdrop":
            return {config.layers: 1.0}
        return sandwich.loss_weights(update, self.model.sizes, config)

    def gates(self, update: int, seeds: Tensor) -> list[Gates]:
        """The gates of these networks, for utterances with these seeds."""
        config, model = self.config, self.model
        if update < step1_updates(config):
            layer_weights = ALGORITHMS[config.method].layer_weights(
                model.scores, model.ranking, update, config
            )
            return [[True] * config.layers, layer_weights]
        if config.method == "layerdrop":
            return [list(layer_gates(seeds, config.layers, config.layer_drop))]
        return sandwich.gates(
            [model.mask(size) for size in self.loss_weights(update)], seeds, config
        )

    def skip(self, batches: list[Batch], loss: float, norm: float) -> None:
        """Logs an update that is left out; raises FloatingPointError where too many were in a row."""
        ids = [utterance.id for batch in batches for utterance in batch.utterances]
        self.log(
            dict(update=self.update, skipped=f"loss {loss}, gradient norm {norm}", utterances=ids)
        )
        self.state["skipped"] += 1
        if self.state["skipped"] >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{MOST_SKIPPED} updates in a row had a loss or gradient that is not finite, the last one update "
                f"{self.update} with {' '.join(ids)}; {self.run / 'metrics.jsonl'} names the others' utterances. Try a "
                "lower peak learning rate"
            )

    def validate(self) -> dict[int, dict]:
        """Decodes the dev splits with every size at once, each process its share; keeps the network that has the fewest
        errors in best.pt. Returns size → word error rate, counts, layers kept."""
        self.rank_layers()
        sizes = list(reversed(self.model.sizes))
        texts, unreadable = transcribe(self.model, self.dev, sizes, "validating")
        self.note_left_out({f"{UNREADABLE} (dev)": unreadable})
        own = [sum(errors_of(self.dev.utterances, texts[size]), Errors()) for size in sizes]
        counts = processes.total(
            torch.tensor([(e.total, e.words) for e in own], device=self.device)
        ).tolist()
        result = {
            size: dict(
                wer=errors / max(1, words),
                errors=errors,
                words=words,
                layers=kept_names(self.model, size),
            )
            for size, (errors, words) in zip(sizes, counts, strict=True)
        }
        self.log(dict(update=self.update, dev=result))
        if (errors := sum(errors for errors, _ in counts)) < self.state["best"]:
            self.state["best"] = errors
            self.write("best.pt", self.model)
        return result

    def save(self) -> None:
        """Writes the checkpoint and, for people, the ranking of the layers; at the end also average.pt."""
        self.rank_layers()
        state = self.state | dict(optimizer=self.optimizer.state_dict())
        self.write(checkpoint.NAME, self.model, training=state, keep=self.config.keep)
        if processes.rank():
            return
        ranked = [
            dict(layer=layer_name(layer), score=score)
            for layer, score in zip(self.model.ranking, self.model.ranked_scores(), strict=True)
        ]
        (self.run / "ranking.json").write_text(json.dumps(ranked, indent=2) + "\n")
        if self.update == self.config.updates:
            last = checkpoint.whole(self.run)
            same_masks = [
                c.model for c in last if c.training["update"] > step1_updates(self.config)
            ]
            self.write("average.pt", averaged(same_masks or [self.model]))

    def write(self, name: str, model: Supernet, **more) -> None:
        if not processes.rank():
            checkpoint.save(self.run / name, model, self.tokenizer, **more)

    def log(self, record: dict) -> None:
        """Adds a line to metrics.jsonl: the first process what all did, each one what it left out."""
        if not processes.rank() or "skipped" in record:
            with open(self.run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def note_left_out(self, left_out: dict[str, dict[str, str]]) -> None:
        """Adds to left-out.txt the utterances that are not in it; why → id → what exactly."""
        if any(left_out.values()):
            with open(self.run / "left-out.txt", "a+", errors="surrogateescape") as file:
                file.seek(0)
                known = {line.partition("\t")[0] for line in file}
                rows = (
                    (why, name, what)
                    for why, names in left_out.items()
                    for name, what in names.items()
                )
                file.writelines(
                    f"{name}\t{why}: {what}\n" for why, name, what in rows if name not in known
                )


def averaged(models: list[Supernet]) -> Supernet:
    """The first one, with the mean of all their weights."""
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, weight in models[0].named_parameters():
            weight.copy_(torch.stack([state[name] for state in states]).mean(0))
    return models[0]


def check_new(run: Path, overwrite: bool) -> None:
    """Raises ValueError where a new run must not have this directory."""
    if run.exists() and not overwrite:
        raise ValueError(
            f"{run}: exists already; --resume {run} goes on with it, --overwrite replaces it"
        )
    if run.exists() and not (run / "config.json").is_file():
        raise ValueError(
            f"{run}: not a run directory (no config.json in it); --overwrite does not replace it"
        )


def new_network(config: Config, labels: int) -> Supernet:
    """The network that a training starts with. Raises ValueError where `layers_from` has another number of layers."""
    ranking = None
    if config.layers_from:
        ranking = checkpoint.load(Path(config.layers_from)).model.ranking
        if len(ranking) != config.layers:
            raise ValueError(
                f"{config.layers_from}: has {len(ranking)} layers, this network has {config.layers}"
            )
    if config.method == "layerdrop":
        ranking = every_other(config.layers, config.sizes)
    return Supernet(
        config, labels, ranking, config.size if 0 < config.size < config.layers else None
    )


def optimizer_for(model: Supernet, config: Config) -> torch.optim.Optimizer:
    """Return AdamW, in which the layer scores have another learning rate and no weight decay."""
    weights = [weight for name, weight in model.named_parameters() if name != "scores"]
    groups = [dict(params=weights, factor=1.0)]
    if model.scores is not None:
        groups.append(dict(params=[model.scores], factor=config.score_rate, weight_decay=0.0))
    betas, decay = (0.9, config.beta2), config.weight_decay
    return torch.optim.AdamW(
        groups, lr=0.0, betas=betas, eps=config.epsilon, weight_decay=decay, fused=True
    )


def mean_of(records: list[dict]) -> dict:
    """One line of metrics.jsonl from the records of an interval: the last one's, with sums and means of what varies."""
    losses = {size: [] for record in records for size in record.get("losses", {})}
    for record in records:
        for size, loss in record.get("losses", {}).items():
            losses[size].append(loss)
    sums = {
        name: sum(record[name] for record in records)
        for name in ("seconds", "audio_seconds", "waiting")
    }
    means = dict(losses={size: fmean(values) for size, values in losses.items()})
    means |= dict(audio_seconds_per_second=sums["audio_seconds"] / sums["seconds"])
    return records[-1] | sums | means | dict(padding=fmean(record["padding"] for record in records))
