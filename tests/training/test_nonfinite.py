"""Steps whose loss is not finite: on record with their samples, and a stop or a skip that changes nothing, on one rank
and on two."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import kill_run
import pytest
import torch
from kill_run import Blow
from tiny_runs import weights

from tl_fast.beton.reader import BetonReader
from tl_fast.models.normalise import Normalise
from tl_fast.plan.order import epoch_order
from tl_fast.training import checkpoint
from tl_fast.training import loop as training
from tl_fast.training.meter import Meter
from tl_fast.training.nonfinite import NonFiniteError
from tl_fast.training.runlog import read_rows


@pytest.fixture
def poison(monkeypatch):
    """Makes the images of these steps (from 0) NaN, so that batch norm's statistics are hit as well."""

    def make(*steps: int) -> None:
        original, count = Normalise.forward, [0]

        def forward(self, images):
            count[0] += 1
            return original(self, images) * (math.nan if count[0] - 1 in steps else 1)

        monkeypatch.setattr(Normalise, "forward", forward)

    return make


@pytest.fixture(params=["read at once", "read a step late"])
def reading(request, monkeypatch):
    """As on the CPU, and in the order of a GPU, where the host looks at a window's values after its end."""
    if request.param == "read a step late":
        init = Meter.__init__
        monkeypatch.setattr(
            Meter, "__init__", lambda self, *rest: init(self, *rest) or setattr(self, "_at_once", False)
        )
    return request.param


def ids_of(config, step: int) -> list[int]:
    with BetonReader(Path(config.train_data)) as reader:
        return epoch_order(config.seed, 0, len(reader))[
            step * config.batch_size : (step + 1) * config.batch_size
        ].tolist()


def test_stop_names_the_step_and_keeps_its_samples_on_record(tiny, poison, reading):
    """Nothing of that step is saved, though a checkpoint was due within the window that had not been read yet."""
    poison(3)
    config = tiny(checkpoint_steps=1, keep=9, log_every=2, mix_token=False)
    ids = ids_of(config, 3)
    with pytest.raises(
        NonFiniteError,
        match=(
            r"loss nan, gradient norm nan at step 3 \(epoch 0, lr .*, rank 0\).*step-0000000003\.json.*--non_finite"
            r" skip"
        ),
    ) as caught:
        training.train(config)
    assert str(ids) in str(caught.value)
    record = json.loads((Path(config.output_dir) / "nonfinite" / "step-0000000003.json").read_text())
    assert (
        record["step"] == 3
        and record["ranks"] == [{"rank": 0, "loss": "nan", "sample_ids": ids}]
        and record["grad_norm"] == "nan"
    )
    with BetonReader(Path(config.train_data)) as reader:
        assert all(reader.source_ids[i] in record["names"][str(i)] for i in ids)
    assert [path.name[-1] for path in checkpoint.checkpoints(Path(config.output_dir) / "checkpoints")] == [
        "1",
        "2",
        "3",
    ]


def test_a_skipped_step_changes_neither_weights_nor_moving_average_nor_statistics_nor_moments(
    tiny, poison, reading, capsys
):
    before = training.train(tiny("before", max_steps=3))
    poison(3)
    summary = training.train(tiny("skipping", max_steps=4, non_finite="skip"))
    assert summary["steps"] == 4 and summary["skipped"] == 1
    found, expected = weights(summary["checkpoint"]), weights(before["checkpoint"])
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    rows = read_rows(Path(summary["metrics"]))
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1] and "loss" not in rows[-1]
    assert "skipped a step (1 of at most 10), not finite: loss nan" in capsys.readouterr().out


def test_the_mean_of_a_window_leaves_skipped_steps_out(tiny, poison, reading):
    single = [row["loss"] for row in read_rows(Path(training.train(tiny("single", max_steps=3))["metrics"]))]
    poison(2)
    row = read_rows(Path(training.train(tiny("window", max_steps=3, log_every=3, non_finite="skip"))["metrics"]))[-1]
    assert row["loss"] == pytest.approx((single[0] + single[1]) / 2, rel=1e-6) and math.isfinite(row["grad_norm"])


def test_skipping_is_bounded_also_over_resumptions(tiny, poison):
    poison(1, 3, 5)
    config = tiny(non_finite="skip", max_skipped=2, max_steps=4)
    assert training.train(config)["skipped"] == 2
    with pytest.raises(NonFiniteError, match="step 5 .*more than the 2 steps that max_skipped allows"):
        training.train(dataclasses.replace(config, max_steps=None, resume="auto"))


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step late"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_two_ranks_agree_about_a_step_that_only_one_of_them_saw_fail(tiny, policy, late):
    """The second rank's images are not numbers: both stop and name its samples, or both skip."""
    config = tiny(max_steps=5, non_finite=policy, mix_token=False, log_every=5)
    run = kill_run.run(kill_run.server(), config, 2, Blow("reading images", None, 1, 4), late)
    path = Path(config.output_dir) / "nonfinite" / "step-0000000003.json"
    record, ids = json.loads(path.read_text()), ids_of(config, 3)
    assert sorted(sum((part["sample_ids"] for part in record["ranks"]), [])) == sorted(ids)
    guilty = record["ranks"][1]
    assert guilty["loss"] == "nan" and record["ranks"][0]["loss"] != "nan" and len(guilty["sample_ids"]) == 8
    message = rf"at step 3 (epoch 0, lr {record['lr']:.3e}, rank 1); sample ids {guilty['sample_ids']}"
    if policy == "stop":
        assert run.codes == [1, 1] and all(message in output for output in run.outputs), run.outputs
        assert not (Path(config.output_dir) / "checkpoints").exists()
    else:
        assert run.codes == [0, 0] and message in run.outputs[0] and "'skipped': 1" in run.outputs[0], run.outputs
        assert all(
            torch.isfinite(t).all()
            for t in weights(checkpoint.latest(Path(config.output_dir) / "checkpoints")).values()
        )
