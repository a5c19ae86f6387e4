"""Distillation: the loss against a sum by hand, what it changes, resuming, and refused teachers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begun, finish, same, tiny

from dynsize import checkpoint
from dynsize.batching import read_batches
from dynsize.config import with_method
from dynsize.initial import load_teacher
from dynsize.steps import distillation_loss
from dynsize.supernet import Supernet
from dynsize.training import Trainer

LABELS = 9


@pytest.fixture(scope="module")
def teacher(tones, tmp_path_factory) -> Path:
    """Return the run of a supernet of 8 layers."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    finish(begun(tones, run, updates=4))
    return run


def test_the_loss_is_the_divergence_of_the_frames_inside_the_utterances():
    torch.manual_seed(0)
    large, small = Supernet(tiny(), LABELS).eval(), Supernet(tiny(), LABELS).eval()
    for network in (large, small):
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    features, lengths = torch.randn(2, 31, 12), torch.tensor([31, 14])
    log_probs = small(features, lengths, [3])[0][0]
    with torch.no_grad():
        (target,), inside = large(features, lengths, [8])
    loss = distillation_loss(target, log_probs, inside)
    target = target.double().numpy()
    p, q = np.exp(target), log_probs.detach().double().numpy()
    expected = 0.0
    for utterance, frames in enumerate((8, 4)):  # a quarter of the feature frames, rounded up
        for frame in range(frames):
            there, here = p[utterance, frame], q[utterance, frame]
            expected += float(np.sum(there * (np.log(there) - here)))
    assert expected > 1
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(weight.grad is None for weight in large.parameters())
    assert any(weight.grad is not None for weight in small.parameters())
    own = torch.tensor(target)
    assert distillation_loss(own, own, inside).item() == pytest.approx(0, abs=1e-4)


def test_resuming_repeats_what_a_teacher_taught(tones, teacher, tmp_path):
    settings = dict(method="none", sizes=(8,), size=3, updates=6, save_every=3)
    settings["teacher"] = str(teacher)
    taught = finish(begun(tones, tmp_path / "taught", **settings))
    broken = begun(tones, tmp_path / "broken", **settings)
    for record in broken.updates():
        if record["update"] == 4:  # the checkpoint is of update 3
            break
    changed = "--teacher  with --resume: it would change what is learned"
    with pytest.raises(ValueError, match=changed):
        Trainer.resume(tmp_path / "broken", dict(teacher=""))
    resumed = Trainer.resume(tmp_path / "broken")
    assert resumed.done == 3
    assert same(finish(resumed), taught)


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


def test_a_teacher_needs_the_method_none():
    with pytest.raises(ValueError, match="--teacher runs/full: needs --method none"):
        tiny(teacher="runs/full")


@pytest.mark.parametrize(
    "changes",
    [dict(method="none", sizes=(8,)), dict(method="layerdrop"), dict(sizes=(8,))],
)
def test_self_distillation_needs_sizes_that_train_together(changes):
    with pytest.raises(ValueError, match=r"--self-distillation .* sizes that train together"):
        tiny(self_distillation=0.5, **changes)
    supernet = tiny(self_distillation=0.5)
    assert tiny(self_distillation=0.5, method="aux-loss").self_distillation == 0.5
    for method in ("none", "layerdrop"):  # as in a study
        assert with_method(supernet, method).self_distillation == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocabulary=5, units="characters"), "its labels are not those of this training"),
        (dict(hop_ms=12.5), r"was trained with --hop-ms 10\.0, not 12\.5"),
        (dict(mel_bins=10), "was trained with --mel-bins 12, not 10"),
    ],
)
def test_a_teacher_of_other_labels_or_features_is_refused(
    tones, teacher, tmp_path, changes, message
):
    settings = dict(method="none", sizes=(8,), size=3, teacher=str(teacher), corpus=str(tones))
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(**settings, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_output_is_refused(tones, teacher, tmp_path):
    loaded = checkpoint.load(teacher)
    labels, file = loaded.tokenizer.labels, tmp_path / "transducer.pt"
    checkpoint.save(file, Supernet(tiny(output="transducer"), labels), loaded.tokenizer)
    config = tiny(corpus=str(tones), method="none", sizes=(8,), size=3, teacher=str(file))
    with pytest.raises(ValueError, match="a teacher is for the output ctc"):
        load_teacher(config, loaded.tokenizer)
