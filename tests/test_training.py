"""The loop: it learns, resumes exactly, survives bad losses and audio, and has a teacher."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import begun, finish, logged, one_update, random_supernet, same, tiny, write_tones
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dynsize import checkpoint, ctc
from dynsize.batching import read_batches
from dynsize.config import LAYERS, with_method
from dynsize.corpora import UNREADABLE
from dynsize.initial import beginning, load_teacher
from dynsize.iterative_zero_out import rank
from dynsize.steps import distillation_loss
from dynsize.terminal import dev_lines
from dynsize.training import Trainer


@pytest.fixture
def root(tmp_path) -> Path:
    """A corpus of tones to be damaged."""
    return write_tones(tmp_path / "corpus")


def damage_dev(root: Path) -> None:
    """Damage two dev utterances: one is found when listing, one when decoding."""
    folder = root / "dev-clean" / "1" / "7"
    (folder / "1-7-0002.flac").write_bytes(b"")
    file = folder / "1-7-0003.flac"
    file.write_bytes(file.read_bytes()[:-2000])


@pytest.fixture(scope="module")
def teacher(tones, tmp_path_factory) -> Path:
    """Return the run of a supernet of 8 layers."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    finish(begun(tones, run, updates=4))
    return run


METHODS = {
    "straight-through": dict(),
    "soft": dict(relaxation="soft"),
    "iterative-zero-out": dict(method="iterative-zero-out", delta=2, score_rate=500.0),
    "ortho-softmax": dict(method="ortho-softmax", score_rate=500.0),
    "layerdrop": dict(method="layerdrop", shared_output_layer=True),
    "none": dict(method="none", sizes=(8,), size=5),
    "self-distillation": dict(self_distillation=0.5),
    "transducer": dict(output="transducer"),
    "attention, Transformer": dict(output="attention", block=("mhsa", "ff"), sizes=(2, 3, 4)),
}


@pytest.mark.parametrize("method", [*METHODS.values(), "taught"], ids=[*METHODS, "taught"])
def test_resumed_training_ends_in_the_same_weights(tones, teacher, tmp_path, method):
    if method == "taught":
        method = dict(method="none", sizes=(8,), size=3, teacher=str(teacher))
    unbroken, stops = begun(tones, tmp_path / "unbroken", **method, dropout=0.2), (3, 7, 10)
    for record in unbroken.updates():
        if record["update"] in stops:  # in step 1, with step 2 just begun, later in it
            unbroken.save()
        if (stop := record["update"] - 1) in stops:  # what follows is done, logged, and lost
            shutil.copytree(unbroken.run, tmp_path / f"{stop}")
    expected = dict(unbroken.model.named_parameters())
    for stop in stops:
        torch.manual_seed(99)
        less_memory = stop == 7
        run = tmp_path / f"{stop}"
        resumed = Trainer.resume(run, dict(checkpoint_activations=less_memory))
        assert resumed.done == stop and resumed.model.encoder.recompute == less_memory
        assert same(finish(resumed), expected), stop
        assert resumed.model.ranking == unbroken.model.ranking
        updates = [[line["update"] for line in logged(of)] for of in (run, unbroken.run)]
        assert updates[0] == updates[1]
    other = begun(tones, tmp_path / "other", **method, dropout=0.2, seed=1)
    assert not same(finish(other), expected)


@pytest.mark.parametrize("workers, stops", [(0, (2, 5, 6)), (2, (5,))])  # starting workers is slow
def test_masks_begin_at_their_update(tones, tmp_path, workers, stops):
    changes = dict(workers=workers, accumulate=2, dropout=0.2)
    plain = begun(tones, tmp_path / "plain", frequency_masks=0, time_mask_every=0, **changes)
    masked = begun(tones, tmp_path / "masked", mask_from=0.4, **changes)  # of 12 updates: 4.8
    losses = []
    for record in masked.updates():
        losses.append(record["losses"])
        if record["update"] in stops:
            masked.save()
            shutil.copytree(masked.run, tmp_path / f"{record['update']}")
    pairs = zip(losses, plain.updates(), strict=True)
    are_same = [of_masked == record["losses"] for of_masked, record in pairs]
    assert are_same == [True] * 5 + [False] * 7
    for stop in stops:
        resumed = [record["losses"] for record in Trainer.resume(tmp_path / f"{stop}").updates()]
        assert resumed == losses[stop:], stop


def test_iterative_zero_out_trains_with_the_layers_that_are_left(tones, tmp_path):
    changes = dict(method="iterative-zero-out", delta=2, score_rate=300.0, step1_share=0.6)
    run = begun(tones, tmp_path / "run", updates=20, validate_every=20, save_every=20, **changes)
    start, survivors, computed = run.model.scores.detach().clone(), [], []
    for record in run.updates():
        if record["step"] == 1:
            survivors.append(set(run.model.ranking[: record["sizes"][1]]))
            computed.append(record["sizes"])
    assert computed == [[8, k] for k in (6, 4, 3) for _ in range(4)]
    assert survivors[11] <= survivors[7] <= survivors[3]  # at the ends of the iterations
    assert set(run.model.ranking[:3]) == survivors[11] and not torch.equal(run.model.scores, start)
    assert set(range(8)) - survivors[3] == set(run.model.ranking[6:])


def test_the_sparsity_loss_alone_lowers_the_weights_of_the_survivors(tones, tmp_path):
    changes = dict(method="iterative-zero-out", score_rate=300.0, subnet_loss=0.0, updates=9)
    run = begun(tones, tmp_path / "run", **changes)
    next(run.updates())
    assert (run.model.scores < run.config.initial_score).all()


@pytest.mark.parametrize("layers_from", [False, True])
def test_one_size_is_trained_alone(tones, tmp_path, layers_from):
    supernet = begun(tones, tmp_path / "supernet", updates=1)
    supernet.model.ranking = [6, 2, 0, 1, 3, 4, 5, 7]
    supernet.save()
    source = str(tmp_path / "supernet") if layers_from else ""
    alone = dict(method="none", size=3, layers_from=source)
    run = begun(tones, tmp_path / "run", **alone, sizes=(8,), updates=3)
    records = list(run.updates())
    assert [record["sizes"] for record in records] == [[3]] * 3 and list(records[-1]["dev"]) == [3]
    loaded = checkpoint.load(tmp_path / "run").model
    kept = [[kind for kind in block if kind != "norm"] for block in loaded.encoder.blocks]
    assert kept == ([["ff1", "mhsa"], ["mhsa"]] if layers_from else [["ff1", "conv", "mhsa"], []])
    assert loaded.size == 3
    for other in (dict(blocks=1, sizes=(4,)), dict(blocks=4, block=("mhsa", "ff"), sizes=(8,))):
        if layers_from:
            with pytest.raises(ValueError, match=r"layers are 2 × ff1 conv mhsa ff2, this .* ×"):
                begun(tones, tmp_path / "b", **alone, **other)


def test_weights_come_along_with_what_was_learned_of_the_layers(tmp_path):
    ranking = [5, 2, 0, 7, 1, 3, 6, 4]
    model, tokenizer = random_supernet(ranking, method="iterative-zero-out", tokenizer="gone.model")
    model.config = dataclasses.replace(model.config, corpus=str(write_tones(tmp_path / "corpus")))
    checkpoint.save(tmp_path / "supernet.pt", model, tokenizer)
    loaded = beginning(tmp_path / "supernet.pt", dict(vocabulary=20))  # not by gone.model
    assert loaded.model.output_layers["8"].weight.shape[0] == loaded.tokenizer.labels
    assert not torch.equal(loaded.model.scores, model.scores)  # those zeroed out have old scores
    first = rank(loaded.model.scores, range(8), 0, loaded.model.config)
    assert first == ranking
    assert sorted(loaded.model.scores.tolist()) == sorted(model.scores.tolist())


def test_what_a_changed_corpus_lacks_is_noted_where_a_training_goes_on(root, tmp_path):
    run = begun(root, tmp_path / "run", updates=1)
    finish(run)
    run.locked.close()
    next((root / "train").rglob("*0003.flac")).write_bytes(b"")
    with pytest.warns(UserWarning, match="not those with which this training began"):
        Trainer.resume(tmp_path / "run")
    assert "0-7-0003\t" in (tmp_path / "run" / "left-out.txt").read_text()
    assert "23 utterances" in (tmp_path / "run" / "corpus.txt").read_text()


def test_utterances_without_words_train_silence(root, tmp_path):
    for file in (root / "train").rglob("*.trans.txt"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([line.split()[0] for line in lines[:12]] + lines[12:]))
    run = begun(root, tmp_path / "run", batch_utterances=1)
    finish(run)
    assert not any("skipped" in line for line in logged(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "trained", "kept"),
    [
        (dict(sizes=(8,)), [8], {8: [*range(8)]}),
        (dict(method="layerdrop", sizes=(4, 8)), [8], {4: [0, 2, 4, 6], 8: [*range(8)]}),
        (dict(method="aux-loss"), [8, 5, 3], {k: [*range(k)] for k in (3, 5, 8)}),
    ],
)
def test_without_step_1_each_size_keeps_its_layers(tones, tmp_path, changes, trained, kept):
    config = tiny(updates=3, corpus=str(tones), **changes)
    records = list(Trainer(config, tmp_path / "run").begin().updates())
    assert [(record["step"], record["sizes"]) for record in records] == [(2, trained)] * 3
    names = [f"{block}.{kind}" for block in (1, 2) for kind in LAYERS]
    layers = {size: [names[layer] for layer in of_size] for size, of_size in kept.items()}
    assert {size: row["layers"] for size, row in records[-1]["dev"].items()} == layers


def test_both_steps_train_what_they_should(tones, tmp_path):
    run = tmp_path / "run"
    changes = dict(step1_share=0.5, validate_every=10, save_every=20, sizes=(3, 5, 6, 8))
    trained = begun(tones, run, updates=20, **changes)
    before = {name: weight.clone() for name, weight in trained.model.named_parameters()}
    records = []
    for record in trained.updates():
        records.append(record)
        if record["update"] == 10:
            scores, ranking = trained.model.scores.detach().clone(), list(trained.model.ranking)
    assert [record["step"] for record in records] == [1] * 10 + [2] * 10
    falling = [[8, k] for k in (7, 7, 6, 6, 5, 5, 4, 4, 3, 3)]
    assert [record["sizes"] for record in records[:10]] == falling
    assert all(record["sizes"] in ([8, 6, 3], [8, 5, 3]) for record in records[10:])
    assert not torch.equal(scores, before["scores"])
    assert torch.equal(trained.model.scores, scores) and trained.model.ranking == ranking
    after = trained.model.named_parameters()
    assert not any(torch.equal(weight, before[name]) for name, weight in after)
    assert set(records[-1]["dev"]) == {3, 5, 6, 8} and records[-1]["dev"][3]["words"] > 0
    assert len(records[-1]["dev"][5]["layers"]) == 5 and "dev" not in records[-2]
    lines = logged(run)
    assert [line["update"] for line in lines if "losses" in line] == [4, 8, 12, 16, 20]
    assert [line["update"] for line in lines if "dev" in line] == [10, 20]
    ranked = json.loads((run / "ranking.json").read_text())
    by_score = sorted(ranked, key=lambda layer: -layer["score"])
    assert len(ranked) == 8 and ranked == by_score


def test_a_step_has_clipped_gradients_and_the_scores_their_own_learning_rate(tones, tmp_path):
    run = begun(tones, tmp_path / "run", clip=0.01, score_rate=7.0)
    weights, norms = list(run.model.parameters()), []

    def note() -> None:
        gradients = [weight.grad.norm() for weight in weights if weight.grad is not None]
        norms.append(torch.stack(gradients).norm().item())

    run.optimizer.step = note
    record = next(run.updates())
    assert record["gradient_norm"] > 0.01 and norms == [pytest.approx(0.01, rel=1e-3)]
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [record["learning_rate"], 7 * record["learning_rate"]]


def test_learns_its_training_data(tones, tmp_path):
    changes = dict(updates=300, validate_every=300, save_every=300, dev_splits=("train",))
    changes |= dict(width=32, dropout=0.0, time_mask_every=0, frequency_masks=0)
    learned = begun(tones, tmp_path / "run", peak_learning_rate=3e-3, **changes)
    *_, last = learned.updates()
    assert all(result["wer"] < 0.15 for result in last["dev"].values()), last["dev"]


def test_an_update_that_does_not_use_a_head_leaves_it_and_its_optimizer_state(tones, tmp_path):
    run = begun(tones, tmp_path / "run", sizes=(3, 5, 6, 8), step1_share=0.0, updates=8)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    used: set[int] = set()
    for record in run.updates():
        used |= set(record["sizes"])
        for size in (5, 6):
            head = run.model.output_layers[str(size)].weight
            moved = not torch.equal(head, before[f"output_layers.{size}.weight"])
            assert moved == (size in used) == bool(run.optimizer.state[head])


@pytest.mark.parametrize("save_every", [500, 10])
def test_losses_that_are_not_finite_are_skipped_and_named(tones, tmp_path, monkeypatch, save_every):
    run = begun(tones, tmp_path / "run", updates=30, save_every=save_every)
    loss, calls = ctc.ctc_loss, []

    def sometimes(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) in (2, *range(7, 99)) else 1)

    updates = run.updates()
    next(updates)
    monkeypatch.setattr(ctc, "ctc_loss", sometimes)
    next(updates)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    next(updates)
    assert same(dict(run.model.named_parameters()), before)
    next(updates)
    assert not same(dict(run.model.named_parameters()), before) and run.state["skipped"] == 0
    with pytest.raises(ValueError, match=r"10 updates in a row.*nan.*metrics\.jsonl.*rate"):
        list(updates)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text.replace("loss nan", "") and '"losses"' in text
    skipped = [line for line in logged(tmp_path / "run") if "skipped" in line]
    assert [line["update"] for line in skipped] == [3, *range(8, 18)]
    known = {utterance.id for utterance in run.data.examples.utterances}
    assert all(line["utterances"] and set(line["utterances"]) <= known for line in skipped)
    assert all(weight.isfinite().all() for weight in dict(run.model.named_parameters()).values())
    assert checkpoint.load(tmp_path / "run").training["update"] == 7  # a resumed training repeats 8


def test_a_stop_while_dev_is_decoded_comes_after_the_next_update(tones, tmp_path, monkeypatch):
    run = begun(tones, tmp_path / "run", updates=9, validate_every=4)
    results = run.dev.results

    def stopped_meanwhile(model):
        run.requests.stop = signal.SIGTERM
        return results(model)

    monkeypatch.setattr(run.dev, "results", stopped_meanwhile)
    *_, last = run.updates()
    assert last["update"] == 5 and last["stop"] and "dev" not in last
    assert checkpoint.load(tmp_path / "run").training["update"] == 5
    resumed = Trainer.resume(tmp_path / "run")
    assert [record["update"] for record in resumed.updates()] == [6, 7, 8, 9]


def test_corrupt_training_audio_is_left_out_and_counted(root, tmp_path):
    folder = root / "train" / "0" / "7"
    for name in ("0-7-0003", "0-7-0005"):  # found when listing; when read
        data = (folder / f"{name}.flac").read_bytes()
        (folder / f"{name}.flac").write_bytes(b"" if name == "0-7-0003" else data[: len(data) // 2])
    transcript = folder / "0-7.trans.txt"
    transcript.write_text(transcript.read_text().replace("0-7-0008 ", "0-7-0008 " + "LOW " * 99))
    run = begun(root, tmp_path / "run", updates=20)
    expected = {UNREADABLE: {"0-7-0003"}, "too few frames for its labels": {"0-7-0008"}}
    assert {why: set(names) for why, names in run.data.corpus.left_out.items()} == expected
    assert all(math.isfinite(sum(record["losses"].values())) for record in run.updates())
    report = (tmp_path / "run" / "left-out.txt").read_text()
    named = sorted(line.partition("\t")[0] for line in report.splitlines())
    assert named == [f"0-7-000{n}" for n in (3, 5, 8)]
    assert "encoder frames" in report and "not audio that can be read" in report


def snapshot(run: Trainer) -> list[torch.Tensor]:
    """Copies of all weights and of the optimizer's state."""
    state = [value for of_weight in run.optimizer.state.values() for value in of_weight.values()]
    return [tensor.detach().clone() for tensor in (*run.model.parameters(), *state)]


def test_an_update_of_which_nothing_can_be_read_changes_nothing(root, tmp_path):
    run = begun(root, tmp_path / "run", batch_utterances=1, updates=30)
    (root / "train" / "0" / "7" / "0-7-0003.flac").unlink()
    skipped, before = 0, snapshot(run)
    for record in run.updates():
        after = snapshot(run)
        same_now = len(after) == len(before) and all(map(torch.equal, after, before))
        assert same_now == ("losses" not in record)
        skipped += same_now
        before = after
    assert skipped in (1, 2)
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    told = (tmp_path / "run" / "left-out.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in told] == ["0-7-0003"]


def test_a_corpus_that_disappears_ends_the_training_with_its_last_good_weights(root, tmp_path):
    changes = dict(updates=100, most_left_out=0.99, batch_seconds=2.0, save_every=100)
    run = begun(root, tmp_path / "run", validate_every=100, **changes)
    updates = run.updates()
    list(itertools.islice(updates, 3))
    (root / "train").rename(root / "elsewhere")
    run.data.examples.in_memory.clear()
    expected = snapshot(run)
    with pytest.raises(ValueError, match=r"10 updates in a row.*is .*corpus still there"):
        list(updates)
    assert all(map(torch.equal, snapshot(run), expected))
    (root / "elsewhere").rename(root / "train")
    run.locked.close()
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.done == 3 and all(map(torch.equal, snapshot(resumed), expected))


def test_too_many_unreadable_utterances_end_the_training(root, tmp_path):
    run = begun(root, tmp_path / "run", batch_seconds=2.0, updates=100)
    updates = run.updates()
    left_out = [next(updates)["left_out"]]
    for n in range(0, 24, 2):
        (root / "train" / "0" / "7" / f"0-7-{n:04}.flac").write_bytes(b"")
    run.data.examples.keep = False
    run.data.examples.in_memory.clear()
    with pytest.raises(ValueError, match=r"of 24 training utterances.*--most-left-out 0\.1"):
        left_out.extend(record["left_out"] for record in updates)
    assert left_out[0] == 0 and max(left_out) <= 2  # the update that read more did not train
    assert checkpoint.load(tmp_path / "run").training["update"] == run.done


def test_audio_that_cannot_be_listed_counts_among_what_cannot_be_read(root, tmp_path):
    files = sorted((root / "train" / "0" / "7").glob("*.flac"))
    for file in files[:8]:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"8 of 24 training .*--most-left-out 0\.3; the first: "):
        begun(root, tmp_path / "run", most_left_out=0.3)
    assert not (tmp_path / "run").exists()
    run = begun(root, tmp_path / "run", most_left_out=0.34)
    files[9].write_bytes(b"")
    with pytest.raises(ValueError, match=r"9 of 24 training .*--most-left-out 0\.34; .*names them"):
        list(run.updates())


def test_unreadable_dev_audio_is_left_out_and_named(root, tmp_path):
    run = begun(root, tmp_path / "run", most_left_out=0.3)
    words = [record["dev"][8]["words"] for record in run.updates() if "dev" in record]
    run.locked.close()
    transcript = root / "dev-other" / "2" / "7" / "2-7.trans.txt"
    transcript.write_text(transcript.read_text().replace("LOW", "lOW"))  # scoring needs no labels
    damage_dev(root)
    again = Trainer(run.config, tmp_path / "b").begin()
    fewer = [record["dev"][8]["words"] for record in again.updates() if "dev" in record]
    assert words == words[:1] * 2 and fewer == fewer[:1] * 2 and fewer[0] < words[0]
    report = (tmp_path / "b" / "left-out.txt").read_text()
    assert re.findall(r"^(\S+)\t.*\(dev\)", report, re.M) == ["1-7-0002", "1-7-0003"]


def test_bad_dev_audio_stops_before_training(root, tmp_path):
    damage_dev(root)
    run = begun(root, tmp_path / "run")
    with pytest.raises(ValueError, match=r"2 of 8 dev utterances.*1-7-0002\.flac"):
        next(run.updates())
    assert run.done == 0


def test_dev_is_scored_in_characters_where_a_language_writes_no_blanks(root, tmp_path):
    for transcript in root.rglob("*.trans.txt"):
        text = re.sub("LOW|MID|HIGH|TOP", "低音", transcript.read_text())
        transcript.write_text(text, encoding="utf-8")
    (record,) = begun(root, tmp_path / "run", updates=1).updates()
    text = "".join(path.read_text("utf-8") for path in root.glob("dev-*/*/*/*.txt"))
    for result in record["dev"].values():
        assert result["measure"] == "cer"
        assert result["words"] == text.count("低") + text.count("音")


class Copies(TorchDispatchMode):
    """Counts the copies of tensors from the CPU to another device."""

    counted = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if function in copies:
            sources = [value for value in args if isinstance(value, torch.Tensor)]
            self.counted += sources[-1].device.type == "cpu" != result.device.type
        return result


class Made(TorchFunctionMode):
    """Counts the tensors that are made on another device from numbers of the CPU."""

    counted = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.counted += result.device.type != "cpu"
        return result


@pytest.mark.parametrize("update", [1, 30], ids=["step 1", "step 2"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_update_waits_once_and_copies_one_batch(tones, tmp_path, monkeypatch, update, method):
    """On the device `meta` a number that is read raises; here the one that is waited for is 1."""
    run = begun(tones, tmp_path / "run", updates=40, **method)
    run.state["update"] = update
    drawn = list(itertools.islice(run.data.batches(run.state, pin=False), 2))
    run.device = torch.device("meta")
    run.model.to("meta")
    everything = dict(params=run.model.parameters(), factor=1.0)
    run.optimizer = torch.optim.AdamW([everything], foreach=True)  # fused has no kernel there
    tolist, waits = torch.Tensor.tolist, []

    def ones(tensor: torch.Tensor) -> list:
        if tensor.device.type == "cpu":
            return tolist(tensor)
        waits.append(tensor)
        return [1.0] * tensor.numel()

    monkeypatch.setattr(torch.Tensor, "tolist", ones)
    assert "losses" in one_update(run, drawn[:1])
    with Copies() as copies, Made() as made:
        torch.zeros(1).to("meta").new_tensor([1.0])
        assert copies.counted == made.counted == 1
        copies.counted = made.counted = 0
        assert "losses" in one_update(run, drawn[1:])
    assert len(waits) == 2  # one of each update
    assert made.counted == 0
    assert copies.counted == 5  # features, lengths, labels, label lengths, seeds
    assert len(run.optimizer.state) > 10


def test_the_rehearsal_takes_the_memory_of_the_optimizer_too(tones, tmp_path, monkeypatch):
    run = begun(tones, tmp_path / "run", updates=3)
    weights = sum(weight.numel() for weight in run.model.parameters())
    add, alive, reserved = run.add_gradients, [], []
    ones_like = torch.ones_like

    def kept(tensor, *arguments, **named):
        made = ones_like(tensor, *arguments, **named)
        reserved.append(weakref.ref(made))
        return made

    def gradients(*arguments, **named):
        tensors = [made() for made in reserved if made() is not None]
        alive.append(sum(tensor.numel() for tensor in tensors))
        return add(*arguments, **named)

    monkeypatch.setattr(torch, "ones_like", kept)
    monkeypatch.setattr(run, "add_gradients", gradients)
    list(run.updates())
    assert min(alive[:2]) >= 2 * weights and max(alive[2:]) < 2 * weights


@pytest.mark.parametrize("unread", [1, 99])
def test_the_largest_batch_that_can_be_read_is_rehearsed(root, tmp_path, monkeypatch, unread):
    run = begun(root, tmp_path / "run", batch_utterances=1)
    utterances = sorted(run.data.examples.utterances, key=lambda u: -u.samples)
    for utterance in utterances[:unread]:
        Path(utterance.path).unlink()
    rehearsed = []
    monkeypatch.setattr(run, "add_gradients", lambda _, batches, **__: rehearsed.extend(batches))
    run.rehearse()
    found = [batch.utterances[0].samples for batch in rehearsed]
    assert found == [utterance.samples for utterance in utterances[unread : unread + 1]] * 2


def test_the_student_comes_closer_to_its_teacher(tones, teacher, tmp_path):
    settings = dict(method="none", sizes=(8,), size=3, updates=40, dropout=0.0, validate_every=40)
    settings |= dict(save_every=40, peak_learning_rate=5e-3)
    alone = begun(tones, tmp_path / "alone", **settings)
    taught = begun(tones, tmp_path / "taught", **settings, teacher=str(teacher))
    (batch,) = read_batches(taught.data.examples, [[0, 1, 2, 3]])
    features, lengths = batch.to(taught.device)[:2]
    distances = []
    for trainer in (alone, taught):
        finish(trainer)
        log_probs = trainer.model.eval()(features, lengths, [3])[0][0]
        (target,), inside = taught.teacher(features, lengths, [8])
        distances.append(distillation_loss(target, log_probs, inside).item())
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    "changes", [dict(method="none", sizes=(8,)), dict(method="layerdrop"), dict(sizes=(8,))]
)
def test_a_teacher_needs_one_size_and_self_distillation_sizes_that_train_together(changes):
    with pytest.raises(ValueError, match="--teacher runs/full: needs --method none"):
        tiny(teacher="runs/full")
    with pytest.raises(ValueError, match=r"--self-distillation .* sizes that train together"):
        tiny(self_distillation=0.5, **changes)
    supernet = tiny(self_distillation=0.5)
    assert tiny(self_distillation=0.5, method="aux-loss").self_distillation == 0.5
    for method in ("none", "layerdrop"):  # as in a study
        assert with_method(supernet, method).self_distillation == 0


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(vocabulary=5, units="characters"), "its labels are not those of this training"),
        (dict(hop_ms=12.5), r"was trained with --hop-ms 10\.0, not 12\.5"),
        (dict(mel_bins=10), "was trained with --mel-bins 12, not 10"),
    ],
)
def test_a_teacher_of_other_labels_or_features_is_refused(tones, teacher, tmp_path, changes, why):
    settings = dict(method="none", sizes=(8,), size=3, teacher=str(teacher), corpus=str(tones))
    with pytest.raises(ValueError, match=why):
        Trainer(tiny(**settings, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_output_is_refused(tmp_path):
    model, tokenizer = random_supernet(output="transducer")
    checkpoint.save(tmp_path / "transducer.pt", model, tokenizer)
    config = tiny(method="none", sizes=(8,), size=3, teacher=str(tmp_path / "transducer.pt"))
    with pytest.raises(ValueError, match="a teacher is for the output ctc"):
        load_teacher(config, tokenizer)


def test_a_network_of_blanks_is_told_what_helps(tones, tmp_path):
    trainer = begun(tones, tmp_path / "run", updates=1)
    with torch.no_grad():
        for output in trainer.model.output_layers.values():
            output.bias[0] = 100.0  # the blank's
    record = dict(update=1, dev=trainer.validate())
    assert "--units characters" in dev_lines(record, trainer.model)
    record["dev"][8]["silent"] = False
    assert "--units" not in dev_lines(record, trainer.model)
