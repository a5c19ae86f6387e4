"""ONNX files against the checkpoint's network, which computes its features by FFT."""

import fcntl
import json
import math
import os
import random
import re
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RATE, random_supernet, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import done_well, refused

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

import onnx
import onnxruntime
import sentencepiece

import dynsize
from dynsize import checkpoint
from dynsize import export as exporting
from dynsize.export import Features, export, quantize
from dynsize.features import log_mel
from dynsize.networks import OnnxGraph, network_of
from dynsize.supernet import Supernet
from dynsize.tokenizer import train_tokenizer

LENGTHS = [1, 150, 201, 5_003, 24_000]  # samples; a window has 200


def saved(folder: Path, **changes) -> checkpoint.Checkpoint:
    """The checkpoint of a supernet of one block whose layers and outputs are random."""
    settings = dict(blocks=1, sizes=(1, 2, 4), kernel=7) | changes
    checkpoint.save(folder / "checkpoint.pt", *random_supernet([2, 0, 3, 1], **settings))
    return checkpoint.load(folder / "checkpoint.pt")


def exported(factory: pytest.TempPathFactory, size: int | None, **changes) -> checkpoint.Checkpoint:
    """A checkpoint with its ONNX files beside it. The first process of a test run exports them."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    name = "supernet" if size is None else f"size-{size}"
    folder = root / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{name}-int8.onnx").exists():
            export(saved(folder, **changes), size, folder / f"{name}.onnx")
            quantize(folder / f"{name}.onnx", folder / f"{name}-int8.onnx")
    return checkpoint.load(folder / "checkpoint.pt")


@pytest.fixture(scope="session")
def supernet(tmp_path_factory) -> checkpoint.Checkpoint:
    """A supernet with `supernet.onnx` and `supernet-int8.onnx` beside it. Not to be changed."""
    if torch.__version__ < exporting.TORCH:
        pytest.skip(f"all sizes in one file need torch {exporting.TORCH}")
    return exported(tmp_path_factory, None, rotary=True)


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> checkpoint.Checkpoint:
    """A supernet with `size-2.onnx` and `size-2-int8.onnx` beside it. Not to be changed."""
    vgg = dict(front_end="vgg", front_end_channels=(3, 4, 4, 3))
    return exported(tmp_path_factory, 2, precision="bfloat16", **vgg)


def beside(loaded: checkpoint.Checkpoint, name: str) -> Path:
    return loaded.path.with_name(name)


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The operators of a graph and of the graphs in it."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            yield from operators(attribute.g)


@pytest.mark.parametrize("window_ms, hop_ms", [(25.0, 10.0), (25.125, 12.5), (40.0, 40.0)])
def test_features_are_those_of_training(window_ms, hop_ms):
    config = tiny(window_ms=window_ms, hop_ms=hop_ms, mel_bins=20)
    features = Features(Supernet(config, 5))
    audio = 0.1 * torch.randn(len(LENGTHS), max(LENGTHS))
    audio[3, 2000:3000] = 0.0  # digital silence
    for row, length in enumerate(LENGTHS):
        audio[row, length:] = math.nan  # a caller may leave anything in the padding
    found, frames = features(audio, torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        expected = log_mel(audio[row, :length], config)
        assert frames[row] == len(expected)
        torch.testing.assert_close(found[row, : frames[row]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [[4], [2, 3], [0, 1, 2, 3, 4], [3, 3, 1, 0, 3, 2, 1]])
@pytest.mark.parametrize("name", ["supernet", "single"])
def test_a_file_gives_the_networks_log_probabilities(name, batch, request):
    loaded = request.getfixturevalue(name)
    path = beside(loaded, "supernet.onnx" if name == "supernet" else "size-2.onnx")
    graph = OnnxGraph(path)
    loaded.model.config = tiny(**vars(loaded.model.config) | dict(precision="float32"))
    network = network_of(loaded.model)
    lengths = [LENGTHS[i] for i in batch]
    torch.manual_seed(1)
    audio = 0.1 * torch.randn(len(batch), max(lengths))
    for size in (1, 2, 4) if name == "supernet" else (2,):
        found, frames = graph.run(audio, lengths, size)
        for row, length in enumerate(lengths):
            expected = network(audio[row, :length], size).numpy()
            assert frames[row] == len(expected)
            np.testing.assert_allclose(found[row, : frames[row]], expected, rtol=0, atol=1e-4)


def test_the_recogniser_takes_a_file_as_it_takes_a_checkpoint(supernet, single):
    audio = 0.1 * np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)
    run, file = dynsize.load(supernet.path), dynsize.load(beside(supernet, "supernet.onnx"))
    for size in (1, 2, 4):
        expected = run.transcribe(audio, sample_rate=RATE, size=size)
        assert file.transcribe(audio, sample_rate=RATE, size=size) == expected
    one = dynsize.load(beside(single, "size-2.onnx"))
    assert (file.sizes, one.sizes) == ((1, 2, 4), (2,))
    assert one.facts.tokenizer.units == dynsize.load(single.path).facts.tokenizer.units


def test_text_is_made_without_dynsize_as_export_tells(supernet):
    session = onnxruntime.InferenceSession(beside(supernet, "supernet.onnx"))
    content = json.loads(session.get_modelmeta().custom_metadata_map["dynsize"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=b64decode(content["tokenizer"]))
    audio = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    inputs = dict(audio=audio[None], lengths=np.array([RATE]), size=np.array(4))
    log_probs, frames = session.run(None, inputs)
    best = log_probs[0, : frames[0]].argmax(-1)
    labels = [int(new) for old, new in pairwise([0, *best]) if new not in (old, 0)]
    expected = dynsize.load(supernet.path).transcribe(audio, sample_rate=RATE, size=4).text
    assert pieces.decode(labels) == expected != ""


def test_weights_are_stored_once_where_an_optional_layer_is_computed(supernet):
    path = beside(supernet, "supernet.onnx")
    graph = onnx.load(path).graph
    assert Counter(operators(graph))["If"] == 4
    tensors = [*supernet.model.parameters(), *Features(supernet.model).buffers()]
    assert path.stat().st_size < sum(x.nbytes for x in tensors) + 60_000  # the graph itself
    outside = {tensor.name for tensor in graph.initializer}
    branches = [a.g for node in graph.node if node.op_type == "If" for a in node.attribute]
    convolutions = 0
    for branch in branches:
        inside = {tensor.name for tensor in branch.initializer}
        for node in branch.node:
            if node.op_type == "Conv":
                convolutions += 1
                assert set(node.input[1:]) <= inside - outside
    assert convolutions == sum("conv" in block for block in supernet.model.encoder.blocks)


def test_a_file_of_one_size_has_no_other_layers(single):
    path = beside(single, "size-2.onnx")
    count = Counter(operators(onnx.load(path).graph))
    assert count["If"] == count["Softmax"] - 1 == 0  # self-attention is kept
    costs = OnnxGraph(path).metadata()["costs"]
    assert list(costs) == ["2"] and costs["2"]["layers"] == ["1.ff1", "1.mhsa"]


@pytest.mark.parametrize("name, products", [("supernet", 9), ("single", 6)])
def test_int8_replaces_the_products_with_weights(name, products, request):
    # front-end 1, ff1 2, conv 2, mhsa 2, ff2 2; of one size: front-end 1, ff1 2, mhsa 2, output 1
    loaded = request.getfixturevalue(name)
    name = "supernet" if name == "supernet" else "size-2"
    before = Counter(operators(onnx.load(beside(loaded, f"{name}.onnx")).graph))
    path = beside(loaded, f"{name}-int8.onnx")
    after = Counter(operators(onnx.load(path).graph))
    assert after["MatMulInteger"] == products == before["MatMul"] - after["MatMul"]
    exact, rounded = dynsize.load(beside(loaded, f"{name}.onnx")), dynsize.load(path)
    audio = 0.1 * torch.randn(2 * RATE)
    for size in exact.sizes:
        difference = exact.network(audio, size) - rounded.network(audio, size)
        assert 0 < difference.abs().mean() < 0.3


def test_a_file_with_other_results_is_refused_and_not_left(single, monkeypatch, tmp_path):
    right = exporting.network_of
    monkeypatch.setattr(
        exporting, "network_of", lambda model: lambda audio, size: right(model)(audio, size) + 2e-4
    )
    # the export that the fixture made, which takes its time
    original = beside(single, "size-2.onnx").read_bytes()
    monkeypatch.setattr(exporting, "write_graph", lambda *given: given[-1].write_bytes(original))
    with pytest.raises(ValueError, match="other results than the checkpoint's: size 2"):
        export(single, 2, tmp_path / "size-2.onnx")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(exporting, "network_of", right)
    export(single, 2, tmp_path / "size-2.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["size-2.onnx"]


def test_prune_writes_files_of_each_size_and_of_all(supernet, tmp_path, monkeypatch):
    written = beside(supernet, "supernet.onnx").read_bytes()  # in place of an export's long time
    asked = []

    def export(loaded: checkpoint.Checkpoint, size: int | None, path: Path) -> None:
        asked.append((loaded.model.size, size, path.name))
        path.write_bytes(written)

    monkeypatch.setattr(exporting, "export", export)
    command = ("prune.py", supernet.path, "--output", tmp_path)
    done = done_well(*command, "--export", "onnx", "--int8")
    assert not done.stderr and "size-2-int8.onnx" in done.stdout
    assert asked == [(None, None, "supernet.onnx"), (2, 2, "size-2.onnx"), (1, 1, "size-1.onnx")]
    names = {path.name for path in tmp_path.iterdir() if path.suffix == ".onnx"}
    stems = ("supernet", "size-2", "size-1")
    assert names == {f"{stem}{kind}.onnx" for stem in stems for kind in ("", "-int8")}
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    line = refused(*command, "--export", "onnx", "--int8", cwd=tmp_path)
    assert "supernet.onnx: exists already; --overwrite replaces it" in line
    assert "--export onnx writes it" in refused(*command, "--int8", cwd=tmp_path)
    done_well(*command, "--sizes", 2)
    done_well("prune.py", tmp_path / "size-2.pt", "--export", "onnx", "--overwrite")
    assert asked[-1] == (2, 2, "size-2.onnx")
    for flags in ([], ["--export", "onnx", "--ranking", "first"]):
        line = refused("prune.py", tmp_path / "size-2.pt", *flags, cwd=tmp_path)
        assert "was cut already, to 2 layers; --export onnx writes" in line


def test_all_sizes_in_one_file_name_the_torch_they_need(tmp_path, monkeypatch):
    loaded = saved(tmp_path)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.11.0+cpu"))
    line = refused("prune.py", loaded.path, "--export", "onnx", cwd=tmp_path)
    assert "need torch 2.13 or newer, this is 2.11.0+cpu" in line
    with pytest.raises(ValueError, match="all sizes in one file need"):
        export(loaded, None, tmp_path / "supernet.onnx")
    assert list(tmp_path.iterdir()) == [loaded.path]


def test_a_missing_checksum_and_a_changed_byte_are_noticed(single, tmp_path):
    original = beside(single, "size-2.onnx").read_bytes()
    draw, changed = random.Random(0), tmp_path / "changed.onnx"
    unsealed = onnx.load_from_string(original)
    del unsealed.metadata_props[-1]
    files = [unsealed.SerializeToString()]
    for place in (0, len(original) - 1, *draw.choices(range(len(original)), k=60)):
        files.append(bytearray(original))
        files[-1][place] ^= 1 << draw.randrange(8)
    for data in files:
        changed.write_bytes(data)
        with pytest.raises(ValueError, match=r"changed\.onnx: not an ONNX file that"):
            dynsize.load(changed)


# Files with a right checksum that are not as `export` writes them.


def told_of(graph: onnx.ModelProto, metadata: str, path: Path) -> str:
    """The one line with which a file is refused; nothing where audio can be transcribed."""
    onnx.helper.set_model_props(graph, dict(dynsize=metadata))
    onnx.save(graph, path)
    exporting.add_seal(path)
    found = ""
    try:
        dynsize.load(path).transcribe(np.ones(3000, np.float32), sample_rate=2 * RATE)
    except ValueError as error:
        found = str(error)
    assert not found or (found.startswith(f"{path}: ") and "\n" not in found)
    return found


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(), ""),
        (dict(format="dynsize onnx 2"), "dynsize onnx 2, not dynsize onnx 3"),
        (dict(longest_seconds=math.inf), "longest_seconds is inf"),
        (dict(config=dict(new_setting=1)), "new_setting"),
        (dict(config=dict(sample_rate=1e300)), "--sample-rate 1e+300: must be"),
        (dict(config=dict(hop_ms=0)), "--hop-ms 0: must be"),
        (dict(config={}), "settings are missing"),
        (dict(costs={"1": {}}), "KeyError('layers')"),
        (dict(costs={}), "sizes (), which are not the network's"),
        (dict(tokenizer=""), "unk is not defined"),
        ("[" * 100_000, "RecursionError"),
        ("supernet", "sizes (1, 2, 4), which are not the network's"),
        ("tokenizer", "13 outputs for 6 labels"),
    ],
)
def test_metadata_that_cannot_be_is_refused(single, tmp_path, changes, why):
    path = beside(single, "size-2.onnx")
    content = OnnxGraph(path).metadata()
    if changes == "supernet":  # a graph of one size with the metadata of all sizes
        changes = dict(costs={str(size): content["costs"]["2"] for size in (1, 2, 4)})
    if changes == "tokenizer":
        changes = dict(tokenizer=b64encode(train_tokenizer(["LOW"] * 9, 9).model).decode())
    if isinstance(changes, dict):
        if changes.get("config"):
            changes = changes | dict(config=content["config"] | changes["config"])
        changes = json.dumps(content | changes)
    found = told_of(onnx.load(path), changes, tmp_path / "a.onnx")
    assert why in found and bool(why) == bool(found)


ODD = st.sampled_from([0, -1, 10**30, 0.5, 1e300, math.inf, math.nan, "", "x", None, True, [], {}])


@given(st.integers(0, 10**6), ODD | st.lists(ODD, max_size=3) | st.just("to be deleted"))
@settings(max_examples=10)
def test_any_change_of_the_metadata_is_harmless(single, tmp_path_factory, number, value):
    path = beside(single, "size-2.onnx")
    content = OnnxGraph(path).metadata()
    places = [content, content["config"], content["costs"], content["costs"]["2"]]
    places = [(place, name) for place in places for name in place]
    place, name = places[number % len(places)]
    place[name] = value
    if value == "to be deleted":
        del place[name]
    told_of(onnx.load(path), json.dumps(content), tmp_path_factory.getbasetemp() / "any.onnx")


@pytest.mark.parametrize("shape", [["B", "N"], ["B"], ["B", "N", 12]])
@pytest.mark.parametrize("name", ["audio", "x"])
def test_a_foreign_graph_with_our_metadata_is_refused(single, tmp_path, name, shape):
    kind = onnx.TensorProto
    audio = onnx.helper.make_tensor_value_info(name, kind.FLOAT, shape)
    result = onnx.helper.make_tensor_value_info("y", kind.FLOAT, shape)
    node = onnx.helper.make_node("Identity", [name], ["y"])
    graph = onnx.helper.make_graph([node], "foreign", [audio], [result])
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    metadata = json.dumps(OnnxGraph(beside(single, "size-2.onnx")).metadata())
    assert "or something else" in told_of(model, metadata, tmp_path / "a.onnx")


def test_a_file_is_evaluated_like_its_checkpoint(supernet, tones, tmp_path):
    corpus = ("--corpus", tones, "--split", "test-clean")
    rows = {}
    for name in ("checkpoint.pt", "supernet.onnx", "supernet-int8.onnx"):
        output = tmp_path / name
        done = done_well("evaluate.py", beside(supernet, name), *corpus, "--output", output)
        assert not done.stderr and ("onnxruntime" in done.stdout) == name.endswith(".onnx")
        report = json.loads((output / "test-clean" / "results.json").read_text())
        rows[name] = [row | dict(real_time_factor=0) for row in report["sizes"]]
    assert rows["supernet.onnx"] == rows["checkpoint.pt"]
    assert [row["size"] for row in rows["checkpoint.pt"]] == [4, 2, 1]
    costs = ("size", "parameters", "macs", "layers")
    for exact, rounded in zip(rows["supernet.onnx"], rows["supernet-int8.onnx"], strict=True):
        assert [exact[name] for name in costs] == [rounded[name] for name in costs]
    trn = [tmp_path / name / "test-clean" / "hyp-2.trn" for name in rows]
    assert trn[0].read_bytes() == trn[1].read_bytes()


def test_files_are_compared_like_checkpoints(supernet, single, tones):
    corpus = ("--corpus", tones, "--split", "test-other")
    paths = [beside(supernet, "checkpoint.pt"), beside(supernet, "supernet.onnx")]
    done = done_well("evaluate.py", "--compare", *paths, *corpus)
    same = r"\| 1, size \d \| 2, size \d \|.*\+0.00 \| \+0.00 to \+0.00 \| not significantly"
    assert len(re.findall(same, done.stdout)) == 3 and not done.stderr
    paths = [beside(single, f"size-2{kind}.onnx") for kind in ("", "-int8")]
    done = done_well("evaluate.py", "--compare", *paths, *corpus, "--beam", 2)
    assert "| 1, size 2 | 2, size 2 |" in done.stdout and not done.stderr


@pytest.mark.parametrize("flag", ["--device cuda", "--precision bfloat16", "--batch-seconds 9.5"])
def test_flags_that_a_file_cannot_follow_are_refused(single, tones, tmp_path, flag):
    command = ("evaluate.py", beside(single, "size-2.onnx"), "--corpus", tones, *flag.split())
    assert f"{flag} is for checkpoints" in refused(*command, cwd=tmp_path)


def test_an_onnx_file_of_another_output_is_refused_before_anything_is_written(tmp_path):
    loaded = saved(tmp_path, output="transducer")
    line = refused("prune.py", loaded.path, "--export", "onnx", cwd=tmp_path)
    assert "supernet.onnx: an ONNX file is for the output ctc" in line
