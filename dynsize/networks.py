"""A network of one size as a function, audio in, emissions out, for audio of any length.

It comes from a checkpoint or from an ONNX file.
"""

import json
import math
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynsize.checkpoint import Checkpoint
from dynsize.config import Config, from_dict
from dynsize.features import log_mel, window_and_hop
from dynsize.supernet import Supernet
from dynsize.tokenizer import Tokenizer

SUBSAMPLING = 4  # feature frames for one encoder frame, in both front-ends
CONTEXT = 6  # a window's context on each side is its length divided by this
MOST_SECONDS = 30.0  # of a window: attention takes time with the square of its length
# Of a window. Each takes some milliseconds, however short it is: for the same audio, the demo takes
# four times as long in windows of 0.5 s as in windows of 2 s.
LEAST_SECONDS = 2.0
FAINT = 1e-4  # standard deviation of the noise that replaces digital silence; full scale is 1

ONNX_FORMAT = "dynsize onnx 3"

# Audio (samples,), size → what the size's output makes of each frame, (T', ·); of CTC, as in every
# ONNX file, the log-probabilities of V labels.
Network = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Facts:
    """What decoding needs to know of a network, besides the network."""

    config: Config  # of the training
    tokenizer: Tokenizer  # of the V labels
    sizes: tuple[int, ...]  # in layers, ascending
    window_seconds: float  # as long as training's longest utterance, within bounds

    @property
    def step(self) -> int:
        """Samples from one encoder frame to the next."""
        _, hop = window_and_hop(self.config)
        return SUBSAMPLING * hop

    @property
    def window_frames(self) -> int:
        """Encoder frames of one window of long audio, its context included."""
        samples = self.window_seconds * self.config.sample_rate
        return max(CONTEXT, round(samples / self.step))


class OnnxFile(NamedTuple):
    """What a file that `export.export` wrote holds."""

    network: Network
    facts: Facts
    costs: dict[int, dict]  # size → `parameters`, `macs` for 1 s of audio, names of its `layers`


def open_onnx(path: Path) -> OnnxFile:
    """Return what a file that `export.export` wrote holds, ready to run on the CPU.

    Raises ValueError for other files, and where a byte of the file has changed since.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    data = path.read_bytes()
    if seal(data[:-SEAL]) != data[-SEAL:]:
        what = "not an ONNX file that this version of dynsize wrote, or changed since"
        raise ValueError(f"{path}: {what}; export it again")
    graph = OnnxGraph(path)

    def log_probs(audio: Tensor, size: int) -> Tensor:
        (result,), (frames,) = graph.run(audio[None], [len(audio)], size)
        return torch.from_numpy(result[:frames])  # (T', V)

    try:
        content = graph.metadata()
        if content["format"] != ONNX_FORMAT:
            raise ValueError(f"{content['format']}, not {ONNX_FORMAT}")
        config = from_dict(content["config"])
        if content["config"].keys() != vars(config).keys():
            raise ValueError("settings are missing")
        tokenizer = Tokenizer(b64decode(content["tokenizer"]))
        costs = {int(size): cost_of(row) for size, row in content["costs"].items()}
        sizes = tuple(costs)
        possible = config.sizes if "size" in graph.inputs else sizes[:1]
        if sizes != possible or not sizes:
            raise ValueError(f"sizes {sizes}, which are not the network's")
        seconds = window_seconds(content["longest_seconds"])
        for size in sizes:
            found = log_probs(torch.zeros(1), size)
            if found.shape[1:] != (tokenizer.labels,):
                raise ValueError(f"{found.shape[1]} outputs for {tokenizer.labels} labels")
    except Exception as error:  # json, sentencepiece and onnxruntime raise a dozen kinds
        what = f"another version of dynsize wrote it, or something else ({error!r})"
        raise ValueError(f"{path}: {what}; export it again") from error
    return OnnxFile(log_probs, Facts(config, tokenizer, sizes, seconds), costs)


def cost_of(row: dict) -> dict:
    """Return what a file says that a size costs."""
    layers = [str(name) for name in row["layers"]]
    return dict(parameters=int(row["parameters"]), macs=int(row["macs"]), layers=layers)


def seal(data: bytes) -> bytes:
    """Return what ends an ONNX file with these bytes: an entry of its metadata, their checksum.

    An ONNX file is a protocol buffer, to which a field can be appended.
    """
    name, digest = b"checksum", sha256(data).hexdigest().encode()
    entry = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(digest)]) + digest
    return b"\x72" + bytes([len(entry)]) + entry


SEAL = len(seal(b""))


class OnnxGraph:
    """The graph of an ONNX file, ready to run on the CPU with as many threads as torch uses."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            install = "pip install -e '.[onnx]'"
            raise ValueError(f"{path}: an ONNX file needs onnxruntime: {install}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # none: errors are raised
        providers = ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime raises a dozen kinds
            raise ValueError(f"{path}: not an ONNX file: {str(error).splitlines()[0]}") from error
        self.inputs = [node.name for node in self.session.get_inputs()]

    def metadata(self) -> dict:
        """Return what `export.export` wrote beside the graph."""
        return json.loads(self.session.get_modelmeta().custom_metadata_map["dynsize"])

    def run(self, audio: Tensor, lengths: Sequence[int], size: int) -> list[np.ndarray]:
        """Return log-probabilities, (B, T', V), and the (B,) frames inside each utterance.

        `audio`: (B, samples) float32, padded. `lengths`: in samples.
        """
        given = dict(audio=audio.numpy(), lengths=np.array(lengths), size=np.array(size, np.int64))
        return self.session.run(None, {name: given[name] for name in self.inputs})


def facts_of(loaded: Checkpoint) -> Facts:
    """Return what decoding needs to know of a checkpoint's network."""
    model = loaded.model
    longest = window_seconds(loaded.longest_seconds)
    return Facts(model.config, loaded.tokenizer, tuple(model.sizes), longest)


def window_seconds(longest_seconds: float) -> float:
    """Return the seconds of a window: those of training's longest utterance, within bounds."""
    if not 0 < longest_seconds < math.inf:
        raise ValueError(f"its longest_seconds is {longest_seconds}, not a time above 0")
    return min(max(LEAST_SECONDS, longest_seconds), MOST_SECONDS)


def network_of(model: Supernet) -> Network:
    """Return a function that runs one size of a network on audio; pruned layers do not run."""

    @torch.inference_mode()
    def emissions(audio: Tensor, size: int) -> Tensor:
        device = next(model.parameters()).device
        features = log_mel(audio, model.config)[None].to(device)  # (1, T, F)
        lengths = torch.tensor([features.shape[1]], device=device)
        result, lengths = model(features, lengths, [size])
        return result[0, 0, : lengths[0]].cpu()  # (T', ·)

    return emissions


def windowed(
    network: Callable[[Tensor], Tensor], blocks: Iterable[np.ndarray], facts: Facts
) -> Iterator[Tensor]:
    """Yield a network's emissions of audio of any length, in parts that follow each other.

    `network`: audio (samples,) float32 → (T', ·). `blocks`: the audio in parts of any length.
    Emissions are joined, not texts: a border may lie inside a word or between two equal labels. The
    transducer and a beam search go on across it; the attention decoder writes a text for each part.

    The network sees windows about as long as training's longest utterance, at most `MOST_SECONDS`.
    A sixth of a window on each side is context, whose frames are dropped. The last window is as
    long as the others and ends with the audio, so its context before is longer. Audio of at most
    one window is seen whole and as it is, as in training. Memory holds two windows and a block, for
    audio of any length.
    """
    step, window = facts.step, facts.window_frames
    context = window // CONTEXT
    analysis, hop = window_and_hop(facts.config)
    audio = np.zeros(0, np.float32)  # what was read and is still needed ...
    first = 0  # ... and the encoder frame at which it begins
    done = 0  # encoder frames that were yielded
    for block in blocks:
        audio = np.concatenate([audio, block]) if len(audio) else block
        while True:
            start = max(0, done - context)
            begin = (start - first) * step
            end = begin + window * step + analysis - hop  # the samples of `window` encoder frames
            if len(audio) <= end:
                break
            frames = network(filled(audio[begin:end], hop))
            yield frames[done - start : window - context]
            done = start + window - context
            # One window before `done` is kept: the last window may begin there.
            outdated = max(0, done - window) - first
            audio = audio[outdated * step :]
            first += outdated
    if done == 0:
        yield network(torch.from_numpy(audio))
        return
    last_start = first + len(audio) // step - window
    start = max(0, min(done - context, last_start))
    audio = audio[(start - first) * step :]
    frames = network(filled(audio, hop))
    yield frames[done - start :]


def filled(audio: np.ndarray, hop: int) -> Tensor:
    """Return the samples, with faint noise in every hop that holds nothing but zeros.

    Zeros, as in a muted call or between joined recordings, are far quieter than any recorded
    silence: a few of them would decide the mean and the variance of a window's features.
    """
    audio = torch.from_numpy(audio)
    parts = audio[: len(audio) // hop * hop].view(-1, hop)
    silent = ~parts.any(1)
    if silent.any():
        audio = audio.clone()
        noise = torch.randn(hop, generator=torch.Generator().manual_seed(0))
        audio[: parts.numel()].view(-1, hop)[silent] = FAINT * noise
    return audio
