"""The hosts, each with the same few calls, for tests that hold under every one of them."""

import importlib.util

import nets
import pytest
import torch
from conftest import four_bits

from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.report.kept import report_of


class UnderNNCF:
    """Quantizes with NNCF."""

    format = "ir"

    def __init__(self):
        import nncf

        import qft_plugin.nncf as host
        from qft_plugin.nncf._save import weight_integers

        self._nncf, self._host, self._integers = nncf, host, weight_integers

    def quantize(self, model, items, config):
        """Return a quantized model."""
        return self.finetuned(model, items, config)[1]

    def finetuned(self, model, items, config):
        """Return the result of a finetune and the model."""
        job = self._host.quantize(model, self._nncf.Dataset(items), config)
        return job.result, job.model

    def report(self, model, items, config):
        """Quantize a float model and return the report."""
        return self._host.quantize(model, self._nncf.Dataset(items), config).report

    def run(self, model, items, config, *, callback):
        """Quantize a model and follow the finetune."""
        self._host.quantize(model, self._nncf.Dataset(items), config, callback=callback)

    def kept(self, model, items, config, folder):
        """Return a quantized model; the job is kept in a folder."""
        return self._host.quantize(model, self._nncf.Dataset(items), config, checkpoint=folder).model

    def inspect(self, model, items, config):
        """Return what a job would decide and cost."""
        return self._host.inspect(model, self._nncf.Dataset(items), config)

    def outputs(self, model, item):
        """Run a quantized model."""
        with torch.no_grad(), self._host.without_compiler():
            return list(tensors_in(nets.call(model, item)))

    def integers(self, model, item):
        """Return the integers of every weight by name."""
        with self._host.without_compiler():
            return self._integers(model, item)

    def save(self, model, folder, item):
        """Save what `finetuned` returned as IR; the file is proved."""
        return self._host.save_openvino(model, folder / "net.xml", item)

    save_folded = save


class UnderBrevitas:
    """Quantizes with Brevitas."""

    format = "qcdq"

    def __init__(self):
        from qft_plugin import brevitas
        from qft_plugin.brevitas._save import weight_integers

        self._host, self._integers = brevitas, weight_integers

    def quantize(self, model, items, config):
        """Return a quantized model, folded."""
        return self._host.fold(self._host.quantize(model, items, config=config))

    def finetuned(self, model, items, config):
        """Return the result of a finetune and the model, linked."""
        start = four_bits(**{name: getattr(config, name) for name in START}, finetune=None)
        quantized = self._host.quantize(model, items, config=start)
        if config.finetune is None:
            return None, quantized
        linked = four_bits(small_layer_share=0.01, train_cross_layer=config.train_cross_layer, finetune=config.finetune)
        return self._host.finetune(quantized, model, items, linked), quantized

    def report(self, model, items, config):
        """Quantize a float model and return the report."""
        return report_of(self._host.quantize(model, items, config=config))

    def run(self, model, items, config, *, callback):
        """Quantize a model and follow the finetune."""
        self._host.quantize(model, items, config=config, callback=callback)

    def kept(self, model, items, config, folder):
        """Return a quantized model, linked; the job is kept in a folder."""
        return self._host.quantize(model, items, config=config, checkpoint=folder)

    def inspect(self, model, items, config):
        """Return what a job would decide and cost."""
        return self._host.inspect(model, items, config=config)

    def outputs(self, model, item):
        """Run a quantized model."""
        with torch.no_grad():
            return list(tensors_in(nets.call(model, item)))

    def integers(self, model, _):
        """Return the integers of every weight by name."""
        return self._integers(model)

    def save(self, model, folder, item):
        """Save what `finetuned` returned as QCDQ; the file is proved."""
        return self.save_folded(self._host.fold(model), folder, item)

    def save_folded(self, model, folder, item):
        """Save what `quantize` returned."""
        return self._host.save_qcdq(model, folder / "net.onnx", item)


START = ("weight_bits", "equalize", "compensate", "train_cross_layer", "activation_range")
"""Settings of the start, which Brevitas' `finetune` does not look at."""

HOSTS = {"nncf": UnderNNCF, "brevitas": UnderBrevitas}

EACH_HOST = [pytest.param("nncf", marks=pytest.mark.nncf_only), "brevitas"]
"""One host after the other, for tests that are parametrized by a host."""


def host_of(name):
    """Return a host; skip the test where it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed here")
    return HOSTS[name]()


@pytest.fixture(params=EACH_HOST)
def host(request):
    """Return one host after the other."""
    return host_of(request.param)


@pytest.fixture
def both():
    """Return all hosts."""
    return [host_of(name) for name in HOSTS]
