"""Dynamic encoder size: one Conformer-CTC supernet, and subnets that share its weights.

The modules, by what they are for:

The network and the paper's algorithms
    conformer           front-end, the four kinds of layers, and one forward for all sizes
    supernet            the encoder with a ranking of its layers and an output for each size
    simple_top_k        learns the ranking by the straight-through top k of relaxed weights
    iterative_zero_out  learns it by zeroing out the layers of smallest weight, a few at a time
    ortho_softmax       learns it by a distribution over the layers for each place of the ranking
    algorithms          the table of these three, and the rankings of the baselines
    schedule            the spans of step 1, their sizes, the learning rate: functions of the update
    ctc                 the output of the paper: the loss with its gradient, greedy decoding
    transducer          another output: a joiner of frames and labels, its loss, greedy decoding
    attention_decoder   another output: a decoder that attends to the frames, with CTC beside it

Training
    config              every setting with its check, the presets, the methods' defaults
    steps               one update: which networks, with which gates and loss weights; the losses
    training            the loop: read, forward and backward, step, log, validate, save, resume
    training_data       what is trained on, and the dev splits
    initial             where the weights begin: new ones, another run's; teacher; optimizer

From audio to batches
    corpora             a corpus as utterances, what is left out of it, and what it looks like
    readers             the directory layouts and list files in which corpora come
    audio               audio files: how long they are, and their samples
    text                one spelling for the same text; normalisers
    tokenizer           SentencePiece units as labels, and the text of labels
    features            log-mel features and SpecAugment
    batching            which utterances share a batch, their speeds and masks; worker processes
    spoken, digits      two corpora that anyone can make

What keeps a training safe
    checkpoint          one file with all that decoding or more training needs
    files               files that appear whole or not at all, and the cache
    run_directory       who may write in a run, and what is logged there
    processes           one training in several processes; what computes here
    terminal            flags and messages of the commands, and how they end

Deployment
    subnet              cutting a size out of a supernet; parameters, MACs, milliseconds
    export              ONNX files of one size, or of all sizes in one
    networks            checkpoint or ONNX file as a function of audio and size; windows
    decoding            prefix beam search, and a language model of words
    recogniser          text, with the time of each word, from audio of any length
    __main__            the command `dynsize`

Results
    evaluation          texts of a test split by every size; comparisons of networks
    wer                 alignment, word error rates, and their intervals
    report              tables and files of results
    study               the paper's comparison: all methods, with several seeds
    compression         parameters, time and error rate of each size, side by side
    plots               pictures of a run or a study

Beside them, `dynsize.kernels` has Triton kernels of three ops for a GPU. Their definitions in torch
are in `kernels/reference.py`, `ctc` and `simple_top_k`.

Where a detail is

    which checkpoint is used where one is damaged; why loading
    one runs no code of its author                              checkpoint
    signals; threads, GPUs and processes                        terminal.signals; processes
    float32 or bfloat16                                         supernet.precision
    what is skipped and what ends a training                    training, above `skip`; corpora
    empty transcripts, which train silence                      corpora.remarks, ctc.ctc_loss
    dropout, the same for all sizes of an utterance             conformer.Encoder.forward
    features have mean 0 and variance 1 in each utterance,
    or window of a long one                                     features; a copy for ONNX: export
    of several channels, which one is taken                     corpora to train; recogniser
    samples that are no numbers; empty audio has no words       audio to train; recogniser
    NFC, invisible signs, normalisers                           text
    word and character errors, intervals, sclite's alternatives wer
    the output of a size that was not trained                   supernet.Supernet.output
    the largest size within a budget                            subnet for prune.py; recogniser
    long audio; word times; captions                            networks.windowed; recogniser;
                                                                __main__
    what an ONNX file takes and gives, its checksum, and what
    is compared before it appears                               export, networks
    tests of safety; of flags; of all three scripts             tests/test_faults.py; test_flags.py;
                                                                test_scripts.py
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynsize.recogniser import Recogniser

__version__ = "0.1.0"

# GNU OpenMP reads this when torch is imported. Threads that wait spin, by default for long, which
# stops all others where something else runs too. On two cores the demo trained 132 seconds of audio
# a second with this value, and 131 without it; beside one busy process 42, where without it 40
# updates took more than 130 seconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def load(path: str | Path) -> "Recogniser":
    """Return the recogniser of a run directory, of one checkpoint, or of an ONNX file.

    Raises ValueError where `path` is none of these.
    """
    from dynsize import recogniser  # here, so that the kernels need only torch

    return recogniser.open_recogniser(path)
