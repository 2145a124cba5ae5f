"""Switches of how a step is computed: short runs with each of them follow the run without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import weights
from torch._dynamo.utils import counters

from tl_fast.training import loop as training
from tl_fast.training.config import TrainConfig
from tl_fast.training.runlog import read_rows

# The settings under which tests/training/test_train.py sees a run learn, but with drop path.
LEARNS = dict(scale=(0.5, 1.0), mix_token=False, auto_augment=None, erase=0.0, lr=4e-3, max_steps=15)


def run(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the last checkpoint's tensors."""
    summary = training.train(config)
    losses = [row["loss"] for row in read_rows(Path(summary["metrics"])) if row["kind"] == "train"]
    return losses, weights(summary["checkpoint"])


@pytest.mark.parametrize(
    "base, switches, tolerance",
    [
        pytest.param({}, {"stem_space_to_depth": True}, 1e-4, id="stem_space_to_depth"),
        pytest.param({"dtype": "bfloat16"}, {"residual_dtype": "bfloat16"}, 0.01, id="residual_dtype"),
        # Other samples are dropped: 0.08.
        pytest.param({}, {"drop_path_batched": True}, 0.15, id="drop_path_batched"),
        pytest.param({}, {"attention_backend": "math"}, 1e-4, id="attention_backend"),
        pytest.param({}, {"gelu": "tanh"}, 1e-3, id="gelu"),
        pytest.param({}, {"targets_dtype": "bfloat16"}, 0.01, id="targets_dtype"),
    ],
)
def test_a_short_run_follows_the_one_without_the_switch(tiny, base, switches, tolerance):
    """The loss moves by more than twice the tolerance. Some weight differs in its last bits: else the switch did
    not reach the run."""
    expected, plain = run(tiny("plain", **LEARNS, **base))
    actual, switched = run(tiny("switched", **LEARNS, **base, **switches))
    assert len(expected) == 15 and np.ptp(expected) > 2 * tolerance
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    assert plain.keys() == switched.keys() and any(not torch.equal(plain[name], switched[name]) for name in plain)


ALL = dict(
    stem_space_to_depth=True,
    residual_dtype="bfloat16",
    drop_path_batched=True,
    attention_backend="flash",
    gelu="tanh",
    targets_dtype="bfloat16",
)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_all_switches_together_compile_once_and_follow_the_eager_run(tiny, tmp_path, monkeypatch):
    """Through inductor, in bfloat16, where the losses part by rounding, later by more: 6e-4 in seven steps, 0.03 in the
    tenth. With drop path the compiled run is only asked to learn, for inductor draws other random numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    common = dict(**LEARNS, **ALL, dtype="bfloat16")
    eager, _ = run(tiny("eager", **common, drop_path=0.0))
    before = counters["stats"]["unique_graphs"]
    compiled, _ = run(tiny("compiled", **common, drop_path=0.0, compile=True))
    assert counters["stats"]["unique_graphs"] == before + 1
    np.testing.assert_allclose(compiled[:7], eager[:7], rtol=0, atol=2e-3)
    assert np.ptp(eager[:7]) > 0.1
    torch._dynamo.reset()
    dropping, _ = run(tiny("dropping", **common, drop_path=0.3, compile=True))
    assert counters["stats"]["unique_graphs"] == before + 2
    assert np.mean(dropping[-5:]) < 0.95 * np.mean(dropping[:5])


def test_a_run_may_go_on_with_other_switches(tiny):
    """They change no weight's name or shape, so a checkpoint fits with them and without."""
    training.train(tiny(max_steps=2))
    assert training.train(tiny(max_steps=4, resume="auto", **ALL))["steps"] == 4
    assert training.train(tiny(max_steps=6, resume="auto"))["steps"] == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_an_attention_backend_that_the_device_lacks_is_refused_at_the_start(tiny, backend):
    with pytest.raises(ValueError, match=f"attention_backend '{backend}'.*model lvvit_t on cpu.*default, flash, math"):
        training.train(tiny(device="auto", attention_backend=backend))
