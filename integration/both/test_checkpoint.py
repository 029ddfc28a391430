"""Processes that are killed at any moment: the same call goes on to the same integers, and leaves nothing else."""

import multiprocessing
import random
import signal
import sys
import time

import kept_job
import pytest
import torch
from hosts import EACH_HOST, host_of
from safetensors import safe_open

KILLS = 5
"""So often a job is killed before it is let run to its end."""

LATER = 0.05
"""A kill comes up to so many seconds after its phase has begun."""


class Jobs:
    """Runs a job in processes that can be killed."""

    def __init__(self, host, path):
        self._host = host
        self.folder, self.out = path / "kept", path / "out"
        self.out.mkdir(parents=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["kept_job"])

    def run(self, kill=None, after=0.0):
        """Run it to its end, or kill it.

        Args:
            kill: the phase in which it is killed, counted from 0; `None` lets it run.
            after: seconds from the beginning of that phase.

        Returns:
            The names of its phases, and digests of what it made; `None` where it was killed.
        """
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=kept_job.run, args=(self._host, self.folder, self.out, there))
        process.start()
        there.close()
        phases, result = [], None
        try:
            while True:
                found = here.recv()
                if isinstance(found, dict):
                    result = found
                    break
                phases.append(found)
                if len(phases) - 1 == kill:
                    time.sleep(after)
                    process.kill()
                    break
        except EOFError:  # it was faster than the kill, or has failed, which the next line says
            pass
        process.join()
        assert process.exitcode == (0 if kill is None else process.exitcode)
        assert process.exitcode in (0, -signal.SIGKILL)
        return phases, result

    def files(self):
        """Return the names of the files that are kept and saved, after a look at what is kept."""
        kept = sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []
        for name in kept:
            if name.endswith(".safetensors"):
                with safe_open(self.folder / name, framework="pt") as file:
                    assert all(torch.isfinite(file.get_tensor(n).double()).all() for n in file.keys())  # noqa: SIM118
        return kept, sorted(p.name for p in self.out.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", EACH_HOST)
def test_killed_in_each_phase(name, tmp_path):
    """Each phase of job and save is killed once, at a random moment, several kills on the way to one result."""
    host_of(name)
    whole = Jobs(name, tmp_path / "whole")
    phases, expected = whole.run()
    everything = whole.files()
    assert {"compensation", "finetune", "converting"} <= set(phases)
    moments = random.Random(0)
    killed = 0
    for first in range(-(-len(phases) // KILLS)):
        jobs = Jobs(name, tmp_path / str(first))
        for phase in range(first, len(phases), -(-len(phases) // KILLS)):
            # The name says where; later runs have fewer phases where the finetune is done, never more.
            killed += jobs.run(kill=phase, after=moments.uniform(0, LATER))[1] is None
            kept, saved = jobs.files()
            assert {n for n in kept if not n.startswith(".")} <= set(everything[0])
            assert {n for n in saved if not n.startswith(".")} <= set(everything[1])
        assert jobs.run()[1] == expected
        assert jobs.files() == everything
    assert killed >= len(phases) - 2  # the last phases may end before the kill
