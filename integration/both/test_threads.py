"""A job beside other threads: they run on as if it were not there, and two jobs at once give what each gives alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import nets
import pytest
import torch
from conftest import few_steps, four_bits

pytestmark = pytest.mark.core


def quantized(host, model, items):
    """Return the integers of a small job."""
    return host.integers(host.quantize(model, items, four_bits(finetune=few_steps())), items[0])


def test_two_jobs_beside_a_float_network(host):
    """The network of a third thread computes the same all the time, and each job gives the integers of one alone."""
    # Made here: torch has one state of random numbers for all threads.
    asked = [(nets.build(name), nets.items(name)) for name in ("residual", "branches")]
    alone = [quantized(host, *each) for each in asked]
    model, (x, *_) = nets.build("residual"), nets.items("residual")
    with torch.no_grad():
        expected = model(x)
    ended, different = threading.Event(), []

    def run():
        with torch.no_grad():
            while not ended.is_set():
                different.append(not torch.equal(model(x), expected))

    with ThreadPoolExecutor() as threads:
        beside = threads.submit(run)
        jobs = [threads.submit(quantized, host, *each) for each in asked]
        try:
            found = [job.result() for job in jobs]
        finally:
            ended.set()
        beside.result()
    assert different
    assert not any(different)
    for one, other in zip(found, alone, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
