"""The training loop of both steps: everything that an update does is a function of the configuration and its number."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dynsize import checkpoint, iterative_zero_out, sandwich, simple_top_k
from dynsize.baselines import every_other, layer_drop
from dynsize.batching import Batch, Examples, epoch_plan, load, usable
from dynsize.config import Config
from dynsize.conformer import Gates
from dynsize.corpora import UNREADABLE, read_corpus, summary
from dynsize.evaluation import corpus_root, device_of, errors_of, kept_names, read_for_scoring, transcribe
from dynsize.features import spec_augment
from dynsize.schedule import learning_rate, size_at, step1_updates
from dynsize.supernet import Supernet, layer_name
from dynsize.tokenizer import train_tokenizer
from dynsize.wer import Errors
from kernels import ctc_loss

ALGORITHMS = {"simple-top-k": simple_top_k, "iterative-zero-out": iterative_zero_out}  # those that learn in step 1
MOST_SKIPPED = 10  # updates in a row with a loss or gradient that is not finite, before the training gives up


class Trainer:
    """A training in a run directory. `updates()` runs it; `save()` writes the checkpoint that `resume` goes on from.

    `loaded`: a checkpoint to go on from; one without a training's state gives the network to begin with. `corpus` tells
    what is trained on, which training utterances are not, and why.
    """

    def __init__(self, config: Config, run: Path, loaded: checkpoint.Checkpoint | None = None) -> None:
        self.config, self.run, self.device = config, run, device_of(config)
        self.corpus = read_corpus(corpus_root(config), config.train_splits, config)
        texts = (utterance.text for utterance in self.corpus.utterances)
        self.tokenizer = loaded.tokenizer if loaded else train_tokenizer(texts, config.vocabulary)
        self.corpus.utterances, impossible = usable(self.corpus.utterances, self.tokenizer, config)
        if not self.corpus.utterances:
            raise ValueError(
                f"{config.corpus}: no utterance is left to train on; the first: {next(iter(impossible.values()))}"
            )
        self.corpus.left_out["more labels than CTC can align"] = impossible
        dev = read_for_scoring(config, config.dev_splits, self.tokenizer).utterances
        self.examples = Examples(self.corpus.utterances, self.tokenizer, config, keep=config.workers == 0)
        self.dev = Examples(dev, self.tokenizer, config, keep=config.workers == 0)
        torch.manual_seed(config.seed)
        self.model = (loaded.model if loaded else new_network(config, self.tokenizer.labels)).to(self.device)
        self.optimizer = optimizer_for(self.model, config)
        self.update, self.skipped = 0, 0
        if loaded and loaded.training:
            self.update, self.skipped = loaded.training["update"], loaded.training["skipped"]
            self.optimizer.load_state_dict(loaded.training["optimizer"])

    @classmethod
    def resume(cls, run: Path) -> "Trainer":
        """The training of a run directory, where its last checkpoint left it."""
        loaded = checkpoint.load(run / checkpoint.NAME)
        if loaded.training is None:
            raise ValueError(f"{loaded.path}: a cut subnet, which can't go on training")
        trainer = cls(loaded.model.config, run, loaded)
        metrics = run / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        metrics.write_text("".join(line for line in lines if json.loads(line)["update"] <= trainer.update))
        return trainer

    def begin(self) -> None:
        """Makes the run directory; one that is there is replaced, so that `check_new` comes first."""
        if self.run.exists():
            shutil.rmtree(self.run)
        self.run.mkdir(parents=True)
        (self.run / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        (self.run / "corpus.txt").write_text(summary(self.corpus, self.config) + "\n")
        self.write_left_out()

    def updates(self) -> Iterator[dict]:
        """Trains to the end; yields what each update did, with the dev word error rates after a validation."""
        config, total, logged = self.config, self.config.updates, []
        start = time.perf_counter()
        for batch in self.batches():
            waiting = time.perf_counter() - start
            record = self.train_on(batch) | dict(waiting=waiting, padding=batch.padding)
            record["seconds"] = time.perf_counter() - start
            logged.append(record)
            if self.update % config.log_every == 0 or self.update == total:
                self.log(mean_of(logged))
                logged = []
            if self.update % config.validate_every == 0 or self.update == total:
                record["dev"] = self.validate()
            if self.update % config.save_every == 0 or self.update == total:
                self.save()
            yield record
            start = time.perf_counter()

    def batches(self) -> Iterator[Batch]:
        """The batches from the next update on, epoch after epoch."""
        first, epoch = 0, 0  # the epoch's first update
        while self.update < self.config.updates:
            self.examples.epoch = epoch
            plan = epoch_plan(self.examples.frames(), self.config, epoch)
            yield from load(self.examples, plan[max(0, self.update - first) :][: self.config.updates - self.update])
            first, epoch = first + len(plan), epoch + 1

    def train_on(self, batch: Batch) -> dict:
        """One update, or none where the loss or the gradient is not finite. Returns what to report of it."""
        config, update = self.config, self.update
        self.note_left_out(batch.corrupt)
        torch.manual_seed((config.seed << 32) + update)  # all that is drawn is a function of the seed and the update
        rate = learning_rate(update, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        step1 = update < step1_updates(config)
        weights, gates = self.networks_of(update, len(batch.utterances))
        record = dict(update=update + 1, step=1 if step1 else 2, sizes=list(weights), learning_rate=rate)
        record["audio_seconds"] = sum(u.samples for u in batch.utterances) / config.sample_rate
        self.update += 1
        if not batch.utterances:
            return record
        self.model.train()
        self.optimizer.zero_grad()
        losses = self.losses(batch, list(weights), gates)  # (M,)
        loss = (losses * losses.new_tensor(list(weights.values()))).sum()
        if step1:
            loss = loss + ALGORITHMS[config.method].extra_loss(self.model.scores, self.model.ranking, update, config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            self.skipped = 0
            self.optimizer.step()
            record |= dict(losses=dict(zip(weights, losses.tolist(), strict=True)), gradient_norm=norm.item())
        else:
            self.skip(batch, loss.item(), norm.item())
        if step1:
            self.model.ranking = ALGORITHMS[config.method].rank(self.model.scores, self.model.ranking, update, config)
        return record

    def networks_of(self, update: int, utterances: int) -> tuple[dict[int, float], list[Gates]]:
        """What an update trains: size → loss weight, largest first, and the gates of each."""
        config, model = self.config, self.model
        if update < step1_updates(config):
            layer_weights = ALGORITHMS[config.method].layer_weights(model.scores, model.ranking, update, config)
            weights = {config.layers: 1.0, size_at(update, config): config.subnet_loss}
            return weights, [[True] * config.layers, layer_weights]
        if config.method == "layerdrop":
            return {config.layers: 1.0}, [layer_drop(utterances, config, self.device)]
        weights = sandwich.loss_weights(update, model.sizes, config)
        masks = [model.mask(size) for size in weights]
        return weights, sandwich.gates(masks, utterances, config, self.device)

    def losses(self, batch: Batch, sizes: list[int], gates: list[Gates]) -> Tensor:
        """The CTC loss of each network, in nats for each label of the batch: (M,)."""
        features, lengths, labels, label_lengths = batch.to(self.device)
        features = spec_augment(features, lengths, self.config)
        log_probs, lengths = self.model(features, lengths, sizes, gates)
        m = len(sizes)
        stacked = (lengths.repeat(m), labels.repeat(m, 1), label_lengths.repeat(m))
        loss = ctc_loss(log_probs.flatten(0, 1), *stacked).unflatten(0, (m, -1))
        return loss.sum(1) / label_lengths.sum().clamp(min=1)

    def skip(self, batch: Batch, loss: float, norm: float) -> None:
        """Logs an update that is left out; raises FloatingPointError where too many were in a row."""
        ids = [utterance.id for utterance in batch.utterances]
        self.log(dict(update=self.update, skipped=f"loss {loss}, gradient norm {norm}", utterances=ids))
        self.skipped += 1
        if self.skipped >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{self.skipped} updates in a row had a loss or gradient that is not finite, the last one update "
                f"{self.update}; {self.run / 'metrics.jsonl'} names their utterances. Try a lower peak learning rate"
            )

    def validate(self) -> dict[int, dict]:
        """Decodes the dev splits with every size at once. Returns size → word error rate, counts, layers kept."""
        sizes = list(reversed(self.model.sizes))
        texts = transcribe(self.model, self.dev, sizes, "validating")
        result = {}
        for size in sizes:
            errors = sum(errors_of(self.dev.utterances, texts[size]), Errors())
            result[size] = dict(wer=errors.rate, errors=errors.total, words=errors.words)
            result[size]["layers"] = kept_names(self.model, size)
        self.log(dict(update=self.update, dev=result))
        return result

    def save(self) -> None:
        """Writes the checkpoint and, for people, the ranking of the layers."""
        training = dict(update=self.update, skipped=self.skipped, optimizer=self.optimizer.state_dict())
        checkpoint.save(self.run / checkpoint.NAME, self.model, self.tokenizer, training=training)
        scores = [None] * self.config.layers if self.model.scores is None else self.model.scores.tolist()
        ranked = [dict(layer=layer_name(layer), score=scores[layer]) for layer in self.model.ranking]
        (self.run / "ranking.json").write_text(json.dumps(ranked, indent=2) + "\n")

    def log(self, record: dict) -> None:
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def note_left_out(self, corrupt: dict[str, str]) -> None:
        """Adds audio that turned out to be unreadable to the report."""
        known = self.corpus.left_out.setdefault(UNREADABLE, {})
        if corrupt.keys() - known.keys():
            known |= corrupt
            self.write_left_out()

    def write_left_out(self) -> None:
        lines = [
            f"{name}\t{why}: {what}\n" for why, names in self.corpus.left_out.items() for name, what in names.items()
        ]
        (self.run / "left-out.txt").write_text("".join(lines))


def check_new(run: Path, overwrite: bool) -> None:
    """Raises ValueError where a new run must not have this directory."""
    if run.exists() and not overwrite:
        raise ValueError(f"{run}: exists already; --resume {run} goes on with it, --overwrite replaces it")
    if run.exists() and not (run / "config.json").is_file():
        raise ValueError(f"{run}: not a run directory (no config.json in it); --overwrite does not replace it")


def new_network(config: Config, labels: int) -> Supernet:
    """The network that a training starts with. Raises ValueError where `layers_from` has another number of layers."""
    ranking = None
    if config.layers_from:
        ranking = checkpoint.load(Path(config.layers_from)).model.ranking
        if len(ranking) != config.layers:
            raise ValueError(f"{config.layers_from}: has {len(ranking)} layers, this network has {config.layers}")
    if config.method == "layerdrop":
        ranking = every_other(config.layers, config.sizes)
    return Supernet(config, labels, ranking, config.size if 0 < config.size < config.layers else None)


def optimizer_for(model: Supernet, config: Config) -> torch.optim.Optimizer:
    """AdamW; the layer scores have a learning rate of their own and no weight decay."""
    rate = config.zero_out_rate if config.method == "iterative-zero-out" else config.score_rate
    weights = [weight for name, weight in model.named_parameters() if name != "scores"]
    groups = [dict(params=weights, factor=1.0)]
    if model.scores is not None:
        groups.append(dict(params=[model.scores], factor=rate, weight_decay=0.0))
    betas, decay = (0.9, config.beta2), config.weight_decay
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.epsilon, weight_decay=decay, fused=True)


def mean_of(records: list[dict]) -> dict:
    """One line of metrics.jsonl from the records of an interval: the last one's, with means of what varies."""
    last = records[-1]
    losses: dict[int, list[float]] = {}
    for record in records:
        for size, loss in record.get("losses", {}).items():
            losses.setdefault(size, []).append(loss)
    seconds, audio, waiting = (
        sum(record[name] for record in records) for name in ("seconds", "audio_seconds", "waiting")
    )
    return last | dict(
        losses={size: sum(values) / len(values) for size, values in losses.items()},
        seconds=seconds,
        audio_seconds=audio,
        audio_seconds_per_second=audio / seconds,
        waiting=waiting,
        padding=sum(record["padding"] for record in records) / len(records),
    )
