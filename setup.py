"""pip install -e . installs the package; extras add what not everyone needs."""

from setuptools import setup

DEMO = ["espeakng-loader>=0.2.4"]  # espeak-ng (GPL-3) speaks the embedded corpus
TRITON = [
    "triton>=3.6; platform_system == 'Linux'"
]  # the GPU kernels; torch's CUDA builds bring it along
# Its wheel brings KenLM, which scores n-gram language models. It has none for Python 3.13.
LM = ["flashlight-text>=0.0.7; python_version < '3.13'"]
PLOTS = ["matplotlib>=3.9"]
TENSORBOARD = ["tensorboard>=2.14"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]  # to write and to run ONNX files
TEST = ["pytest>=8", "pytest-xdist>=3.2", "hypothesis>=6.100", "jiwer>=3.1", "ruff>=0.6"]
TEST += ["setuptools>=70.1"]  # the first that builds wheels by itself

setup(
    name="dynsize",
    version="0.1.0",
    description="Dynamic encoder size for speech recognition: one supernet, subnets of it",
    license="MIT",
    python_requires=">=3.10",
    packages=["dynsize", "dynsize.kernels"],
    package_dir={"dynsize.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.24",
        "sentencepiece>=0.2",
        "soundfile>=0.12",
        "soxr>=0.3",
        "tqdm>=4.65",
    ],
    entry_points={"console_scripts": ["dynsize = dynsize.__main__:main"]},
    extras_require={
        "demo": DEMO,
        "triton": TRITON,
        "lm": LM,
        "onnx": ONNX,
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "test": DEMO + TRITON + LM + ONNX + PLOTS + TENSORBOARD + TEST,
    },
)
