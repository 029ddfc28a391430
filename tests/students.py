"""Students of one and of two layers, what they train on, and their settings."""

from typing import Any

from torch import Tensor, nn

from qft_plugin.config import FinetuneConfig
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs
from qft_plugin.training.loss import Prediction


def inputs_of(x: Tensor) -> Inputs:
    return Inputs((x,), {}, (len(x),), x.device)


def settings(**changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {"images_fed": 400, "batch_size": 10, "restarts": 2, "seed": 3}
    return FinetuneConfig(**(values | changes))


class Linear(nn.Module):
    """A network of one layer, as a student or as a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def __call__(self, call: Call) -> Any:
        return Prediction((self.linear(call[0][0]),), None)


class Two(nn.Module):
    """Two layers, compared after each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def __call__(self, call: Call) -> Any:
        hidden = self.first(call[0][0])
        return Prediction((hidden, self.second(hidden)), None)
