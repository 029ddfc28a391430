"""What the page says of a saved file.

This folder stands below that which writes files, so a report of one is known here by what is read of it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qft_plugin.errors import ConfigError
from qft_plugin.report.record import Layer


class Difference(Protocol):
    """How two networks differ, `deploy.proof.Difference`."""

    @property
    def relative(self) -> float: ...  # noqa: D102
    @property
    def same_class(self) -> float: ...  # noqa: D102
    @property
    def images(self) -> int: ...  # noqa: D102


class FileProof(Protocol):
    """The proof of a file, `deploy.proof.Proof`."""

    @property
    def weights(self) -> int: ...  # noqa: D102
    @property
    def quantizers(self) -> int: ...  # noqa: D102
    @property
    def stretch_error(self) -> float: ...  # noqa: D102
    @property
    def ties(self) -> float: ...  # noqa: D102
    @property
    def from_torch(self) -> Difference: ...  # noqa: D102
    @property
    def torch_from_itself(self) -> Difference: ...  # noqa: D102


class SavedFile(Protocol):
    """The report of a saved file: `OpenVINOReport`, `QCDQReport`, `QONNXReport`; it may have more."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102
    @property
    def proof(self) -> FileProof: ...  # noqa: D102


def saved_files(file: SavedFile | Sequence[SavedFile] | None) -> tuple[SavedFile, ...]:
    """Return the given reports of files as a tuple.

    Raises:
        ConfigError: one of them is something else.
    """
    files = () if file is None else tuple(file) if isinstance(file, (list, tuple)) else (file,)
    for saved in files:
        if not all(hasattr(saved, name) for name in ("path", "bytes", "proof")):
            raise ConfigError(
                "save_html: file should be what save_openvino, save_qcdq or save_qonnx returned, or a list of these. "
                f"Found {type(saved).__name__}. Save the model first."
            )
    return files


def described(saved: SavedFile, layers: Sequence[Layer]) -> dict[str, Any]:
    """Collect what is shown of a saved file.

    Args:
        saved: its report.
        layers: of the network, whose weights its size is compared with.
    """
    found = {"convolutions": getattr(saved, "convolutions", {}), "linear layers": getattr(saved, "linear", {})}
    other = getattr(saved, "openvino", None)  # only a QCDQ file is proved in a second runtime
    first = "the runtime" if not hasattr(saved, "linear") else "OpenVINO" if other is None else "ONNX Runtime"
    proofs: list[tuple[str, FileProof]] = [(first, saved.proof)] + ([] if other is None else [("OpenVINO", other)])
    whole = 4 * sum(layer.weights for layer in layers)
    return {
        "path": str(saved.path),
        "name": Path(saved.path).name,
        "bytes": saved.bytes,
        "share": saved.bytes / whole if whole else None,
        "precisions": [(kind, sorted(Counter(of.values()).items())) for kind, of in found.items() if of],
        "proofs": [(runtime, proof) for runtime, proof in proofs if proof.from_torch.images or proof.weights],
    }
