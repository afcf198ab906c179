"""The models that the servers serve. Each has ``predict()``, and does the same in every arm.

As a program: train one, and write it to a file.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ._children import answer

DIGITS = 200  # in each call
ROWS = 5000  # likewise


class Model(Protocol):
    """What every arm calls."""

    def predict(self) -> int: ...


class Noop:
    """A model that costs nothing, so that everything around it shows."""

    def predict(self) -> int:
        return 7


class Trained:
    """A classifier from a file of ``train``, and what it is to classify in each call.

    ``digits``: scikit-learn's gradient boosting on its own digits, hundreds of parallel regions
    a call. ``lightgbm``: trees over enough rows to give every CPU its share of them.
    """

    def __init__(self, path: Path) -> None:
        self._classifier: Any
        self._classifier, self._inputs = pickle.loads(path.read_bytes())

    def predict(self) -> int:
        return int(self._classifier.predict(self._inputs)[0])


class TorchOperations:
    """200 small operations of PyTorch, each of which wants every CPU for a moment."""

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self._torch.manual_seed(0)
        self._weights = self._torch.randn(32, 32, 3, 3) / (32 * 9) ** 0.5
        self._start = self._torch.randn(1, 32, 32, 32)

    def predict(self) -> int:
        with self._torch.inference_mode():
            x = self._start
            for _ in range(200):
                x = self._torch.conv2d(x, self._weights, padding=1)
            return int(x.argmax())


class TorchConvolution:
    """A small convolution net of PyTorch, whose activations take megabytes."""

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self._torch.manual_seed(0)
        nn = self._torch.nn
        self._net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        ).eval()
        self._images = self._torch.randn(4, 3, 128, 128)

    def predict(self) -> int:
        with self._torch.inference_mode():
            return int(self._net(self._images)[0].argmax())


class Temporaries:
    """Arithmetic of NumPy in four steps, each of which makes another array of 32 MiB."""

    def __init__(self) -> None:
        numpy = import_module("numpy")
        self._values = numpy.random.default_rng(0).random(2**23, dtype=numpy.float32)

    def predict(self) -> int:
        values = self._values
        for factor in (2, 3, 5, 7):
            values = values * factor
        return int(values[0])


class Ballast:
    """A model that is nothing but large: every byte of it is in memory."""

    def __init__(self, mebibytes: int) -> None:
        numpy = import_module("numpy")
        self._values = numpy.full(mebibytes * 2**18, 7, dtype=numpy.float32)

    def predict(self) -> int:
        return int(self._values[0])


class Detector:
    """The network that finds text in an image, as rapidocr-onnxruntime brings it."""

    def __init__(self) -> None:
        runtime: Any = import_module("onnxruntime")
        package = find_spec("rapidocr_onnxruntime")  # found, not imported: no OpenCV is wanted
        assert package is not None
        assert package.origin is not None
        network = Path(package.origin).with_name("models") / "ch_PP-OCRv4_det_infer.onnx"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = import_module("asgi_infer.native").thread_count()
        options.inter_op_num_threads = 1
        self._session = runtime.InferenceSession(
            str(network), options, providers=["CPUExecutionProvider"]
        )
        numpy = import_module("numpy")
        image = numpy.random.default_rng(0).random((1, 3, 384, 384), dtype=numpy.float32)
        self._inputs = {self._session.get_inputs()[0].name: image}

    def predict(self) -> int:
        return int(self._session.run(None, self._inputs)[0].argmax())


def warm_up(model: Model) -> None:
    """Use a model a few times."""
    for _ in range(3):
        model.predict()


def train_digits(iterations: int) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits
    from sklearn.ensemble import HistGradientBoostingClassifier

    images, digits = load_digits(return_X_y=True)
    classifier = HistGradientBoostingClassifier(max_iter=iterations).fit(images, digits)
    return classifier, images[:DIGITS]


def train_lightgbm(iterations: int) -> tuple[Any, Any]:
    lightgbm, numpy = import_module("lightgbm"), import_module("numpy")
    random = numpy.random.default_rng(0)
    rows = random.random((4 * ROWS, 20))
    large = rows[:, 0] + rows[:, 1] ** 2 + 0.3 * random.random(len(rows)) > 0.8
    classifier = lightgbm.LGBMClassifier(n_estimators=iterations, verbose=-1).fit(rows, large)
    return classifier.booster_, rows[:ROWS]


TRAINERS = {"digits": train_digits, "lightgbm": train_lightgbm}
READY_MADE: dict[str, Callable[[], Model]] = {
    "noop": Noop,
    "torch-operations": TorchOperations,
    "torch-convolution": TorchConvolution,
    "temporaries": Temporaries,
    "detector": Detector,
}
PACKAGES = {
    "torch-operations": "torch",
    "torch-convolution": "torch",
    "detector": "rapidocr_onnxruntime",
    "lightgbm": "lightgbm",
}
"""What a model can't do without, where that is not in the dependency group ``bench``."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options by which a program is told its model: see ``loader``."""
    parser.add_argument("--model", choices=[*READY_MADE, *TRAINERS], default="noop")
    parser.add_argument("--file", type=Path, help="with the model, if that had to be trained")


def loader(name: str, path: Path | None = None) -> Callable[[], Model]:
    """What makes the model of this name: from a file of ``train``, if it had to be trained."""
    return READY_MADE[name] if path is None else partial(Trained, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._models")
    parser.add_argument("model", choices=TRAINERS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--iterations", type=int, required=True)
    options = parser.parse_args()
    options.path.write_bytes(pickle.dumps(TRAINERS[options.model](options.iterations)))
    answer(event="trained")


if __name__ == "__main__":
    main()
