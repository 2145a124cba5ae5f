"""Forked workers: results in order, through shared memory or not; what a death on either side does."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from test_interrupted import NAMES, PAGE, SPEC, make_samples

from tl_fast.beton.layout import BetonError
from tl_fast.convert import processes as forked
from tl_fast.convert.processes import Forked, ProcessDied
from tl_fast.convert.write import write_beton


def sized(number: int):
    return number, pickle.PickleBuffer(bytes([number % 251]) * (number * 37 % 5000))


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("slot", (100, 1 << 20))  # most results are larger than the first
def test_results_come_in_order_and_whole(monkeypatch, count, slot):
    monkeypatch.setattr(forked, "SLOT", slot)
    with Forked(count, sized) as workers:
        for number, (echoed, data) in enumerate(workers.map(range(200))):
            assert echoed == number and bytes(data) == bytes([number % 251]) * (number * 37 % 5000)
    assert not any(process.is_alive() for process in workers._processes)


def test_what_the_function_raises_is_raised_here():
    with Forked(2, lambda number: 1 / (number - 5)) as workers:
        results = workers.map(range(10))
        assert [next(results) for _ in range(5)][0] == -0.2
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_a_killed_worker_is_noticed():
    with Forked(2, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 7 else number) as workers:
        with pytest.raises(ProcessDied, match="exit code -9"):
            list(workers.map(range(20)))


def test_workers_end_with_their_parent():
    code = """
import os, time
from tl_fast.convert.processes import Forked
with Forked(2, lambda _: time.sleep(0.05)) as workers:
    print(*(process.pid for process in workers._processes), flush=True)
    list(workers.map(range(10_000)))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(
        os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in open(f"/proc/{pid}/status").read() for pid in pids
    ):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)


def test_processes_and_threads_write_the_same_beton(jpegs, tmp_path):
    samples = make_samples(jpegs, 100)
    samples[31] = replace(samples[31], image=lambda: b"no image")
    for processes in (False, True):
        summary = write_beton(
            tmp_path / f"{processes}.beton",
            samples,
            class_names=NAMES,
            spec=SPEC,
            page_size=PAGE,
            workers=3,
            processes=processes,
            on_error="quarantine",
        )
        assert summary.rejected == 1
    first, second = ((tmp_path / f"{processes}.beton").read_bytes() for processes in (False, True))
    assert first == second
    assert (tmp_path / "False.beton.rejects.jsonl").read_text() == (tmp_path / "True.beton.rejects.jsonl").read_text()


def test_a_run_whose_worker_died_can_be_resumed(jpegs, tmp_path):
    whole, path = tmp_path / "whole.beton", tmp_path / "out.beton"
    samples = make_samples(jpegs, 100)
    options = {"class_names": NAMES, "spec": SPEC, "page_size": PAGE, "workers": 2, "processes": True}
    write_beton(whole, samples, **options)
    deadly = list(samples)
    deadly[90] = replace(samples[90], image=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BetonError, match="out of memory") as raised:
        write_beton(path, deadly, **options)
    assert not path.exists() and "--workers" in str(raised.value)
    write_beton(path, samples, **options, resume=True)
    assert path.read_bytes() == whole.read_bytes()
