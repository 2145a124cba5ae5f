"""The training loop on real betons of the bundled photos: it learns, resumes exactly, agrees across world sizes, and
stops when it must."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import fuzz_beton
import kill_run
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import CLASSES, ROOT, TINY, flags, weights
from torch._dynamo.utils import counters

from tl_fast import evaluate
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.models import step as training_step
from tl_fast.models.erase import erase
from tl_fast.pipeline.loader import Loader
from tl_fast.system.ranks import Ranks
from tl_fast.training import accuracy, checkpoint, classification, learner, network, optimiser
from tl_fast.training import loop as training
from tl_fast.training.classification import Classification
from tl_fast.training.nonfinite import NonFiniteError
from tl_fast.training.runlog import read_rows


def test_a_run_learns_and_leaves_its_record(tiny, betons):
    easy = dict(drop_path=0.0, scale=(0.5, 1.0), mix_token=False, auto_augment=None, erase=0.0)  # 30 steps are few
    config = tiny(val_data=str(betons / "val.beton"), epochs=6, keep=2, lr=4e-3, **easy)
    summary = training.train(config)
    rows = read_rows(Path(summary["metrics"]))
    steps, validations = [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "val"]
    per_epoch = len(Loader(config.train_data, 16, image_size=64, grid=4))
    assert [r["step"] for r in steps] == list(range(1, 6 * per_epoch + 1)) and summary["steps"] == 6 * per_epoch
    assert [r["epoch"] for r in validations] == [1, 2, 3, 4, 5, 6]
    assert np.mean([r["loss"] for r in steps[-5:]]) < 0.9 * np.mean([r["loss"] for r in steps[:5]])
    for row in steps:
        assert row["loss"] == pytest.approx(row["class_loss"] + 0.5 * row["token_loss"], rel=1e-4)
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 and row["grad_norm"] > 0
    assert summary["best_top1"] == max(max(r["val_top1_ema"], r["val_top1_raw"]) for r in validations)
    assert summary["val_top1_raw"] == validations[-1]["val_top1_raw"] and summary["images_per_second"] > 0
    folder = Path(config.output_dir)
    kept = checkpoint.checkpoints(folder / "checkpoints")
    assert 2 <= len(kept) <= 3 and str(kept[-1]) == summary["checkpoint"] and Path(summary["best_checkpoint"]) in kept
    assert list((folder / "tensorboard").glob("events*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["num_classes"] == 4
    assert checkpoint.verify(kept[-1])["class_names"] == CLASSES


@pytest.mark.parametrize("interrupt", ["at an epoch's end", "within an epoch"])
def test_resume_is_exact(tiny, betons, interrupt):
    """Weights, EMA and optimiser of an interrupted run equal the uninterrupted one's bit for bit, drop path and
    MixToken on."""
    straight = training.train(tiny("straight"))
    per_epoch = straight["steps"] // 3
    stop = per_epoch if interrupt == "at an epoch's end" else per_epoch + 2
    first = training.train(tiny("broken", max_steps=stop))
    assert first["steps"] == stop
    second = training.train(tiny("broken", resume="auto"))
    expected, found = weights(straight["checkpoint"]), weights(second["checkpoint"])
    assert expected.keys() == found.keys() and len(expected) > 100
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert any("running_mean" in name for name in expected)

    def losses(summary):
        return [(r["step"], r["epoch"], r["loss"], r["lr"]) for r in read_rows(Path(summary["metrics"]))]

    assert losses(second) == losses(straight)


@pytest.mark.usefixtures("one_thread")
def test_resume_is_exact_with_mixup_and_cutmix(tiny, betons):
    """Neither the process nor where it starts decides how a step is mixed; the seed does."""
    plain = dict(train_data=str(betons / "plain.beton"), token_label=False, mix_token=False, epochs=2)
    settings = plain | dict(mixup=0.8, cutmix=1.0)
    straight = training.train(tiny("straight", **settings))
    training.train(tiny("broken", **settings, max_steps=3))
    np.random.seed(17)
    resumed = training.train(tiny("broken", **settings, resume="auto"))
    expected, continued = weights(straight["checkpoint"]), weights(resumed["checkpoint"])
    assert expected.keys() == continued.keys()
    assert not [name for name in expected if not torch.equal(expected[name], continued[name])]
    unmixed = weights(training.train(tiny("unmixed", **plain))["checkpoint"])
    assert not torch.equal(unmixed["model.safetensors:head.weight"], expected["model.safetensors:head.weight"])


def test_drop_path_and_mixtoken_are_on_in_the_exactness_test(tiny):
    """The test above would pass without randomness; each of these changes the first step's loss."""
    losses = {}
    for name, changes in {
        "both": {},
        "no drop path": {"drop_path": 0.0},
        "no mix": {"mix_token": False},
        "seed": {"seed": 1},
    }.items():
        losses[name] = training.train(tiny(name, max_steps=2, **changes))["loss"]
    assert len({round(loss, 6) for loss in losses.values()}) == 4, losses


def test_two_ranks_follow_one(tiny, betons, tmp_path):
    """2 ranks x 8 against 1 rank x 16, MixToken off, batch norm frozen: loss within 1e-3 over 10 steps.

    The two ranks stop after 4 steps, within an epoch, and a second job continues.
    """
    same = dict(drop_path=0.0, mix_token=False, freeze_stem_bn=True, max_steps=10, val_data=str(betons / "val.beton"))
    one, two = tiny("one", **same), tiny("two", **same)
    training.train(one)
    for config, says in (
        (dataclasses.replace(two, max_steps=4, val_data=None), "from step 0 to 4"),
        (dataclasses.replace(two, resume="auto"), "from step 4 to 10"),
    ):
        run = kill_run.run(kill_run.server(), config, 2)
        assert run.codes == [0, 0], run.outputs
        assert says in run.outputs[0] and not run.outputs[1], "only the first rank talks"
    rows_one, rows_two = (read_rows(Path(c.output_dir) / "metrics.jsonl") for c in (one, two))
    loss_one, loss_two = ([r["loss"] for r in rows if r["kind"] == "train"] for rows in (rows_one, rows_two))
    assert len(loss_one) == len(loss_two) == 10
    assert np.ptp(loss_one) > 0.02, "the losses must move for their agreement to mean anything"
    np.testing.assert_allclose(loss_two, loss_one, rtol=0, atol=1e-3)
    assert rows_two[-1]["kind"] == "val" and rows_two[-1]["val_loss_raw"] == pytest.approx(
        rows_one[-1]["val_loss_raw"], abs=1e-3
    )
    assert rows_two[-1]["val_top1_raw"] == pytest.approx(rows_one[-1]["val_top1_raw"])


def test_ranks_see_disjoint_shards_that_cover_the_epoch(tiny):
    """The loaders that the loop builds for two ranks; a global batch of the two equals the single rank's."""
    seen = []
    for rank, world_size in ((0, 2), (1, 2), (0, 1)):
        loader, _ = Classification(tiny(), Ranks(rank, world_size, torch.device("cpu"))).make_loaders()
        loader.set_epoch(1)
        seen.append([set(batch.sample_ids.tolist()) for batch in loader])
    first, second, alone = seen
    assert not set().union(*first) & set().union(*second)
    assert [a | b for a, b in zip(first, second, strict=True)] == alone and len(set().union(*alone)) == 16 * len(alone)


def test_accumulation_follows_one_big_batch(tiny):
    same = dict(drop_path=0.0, mix_token=False, freeze_stem_bn=True, max_steps=4)
    rows = [read_rows(Path(training.train(tiny(f"x{n}", accumulate=n, **same))["metrics"])) for n in (1, 2)]
    np.testing.assert_allclose([r["loss"] for r in rows[1]], [r["loss"] for r in rows[0]], rtol=0, atol=1e-4)
    np.testing.assert_allclose([r["grad_norm"] for r in rows[1]], [r["grad_norm"] for r in rows[0]], rtol=1e-3)


def test_a_non_finite_step_stops_the_run_and_names_it(tiny, tmp_path):
    config = tiny(max_steps=5)
    state = network.build_network(dataclasses.replace(config, num_classes=4)).state_dict()
    state["norm.bias"][0] = math.inf
    torch.save(state, tmp_path / "poisoned.pth")
    with pytest.raises(
        NonFiniteError, match=r"step 0 \(epoch 0, lr 1\.000e-06, rank 0\); sample ids \[\d+(, \d+){15}\]"
    ):
        training.train(dataclasses.replace(config, init_weights=str(tmp_path / "poisoned.pth")))
    assert not (Path(config.output_dir) / "checkpoints").exists()


def test_without_token_labels_only_the_class_token_learns(tiny, betons):
    config = tiny(
        train_data=str(betons / "plain.beton"), token_label=False, val_data=str(betons / "val.beton"), max_steps=4
    )
    summary = training.train(config)
    model = network.build_network(dataclasses.replace(config, num_classes=4))
    checkpoint.load_weights(model, Path(summary["checkpoint"]), use_ema=False)
    images = torch.randn(3, 3, 64, 64)
    assert not model.aux_head.weight.any()
    with torch.no_grad():
        features = model.eval().forward_features(images)
        assert torch.equal(model(images), model.head(features[:, 0]))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"train_data": "plain.beton"}, r"plain\.beton has no label maps.*--token_label false"),
        ({"num_classes": 10}, r"train\.beton has 4 classes, the model 10"),
        ({"batch_size": 512}, "512"),
        (
            {"model": "pit_ti_224", "model_kwargs": {}},
            "pit_ti_224 at 64 px takes no token labels: its features .* a single token",
        ),
        ({"model": "resnet_of_dreams"}, "resnet_of_dreams' is not known to timm; near it: .*resnet"),
        ({"img_size": 100}, "lvvit_t at 100 px.*multiples of 16"),
        ({"model": "mobilenetv3_small_050", "model_kwargs": {"depth": 3}}, "mobilenetv3_small_050.*depth"),
        ({"model": "ghostnet_050", "model_kwargs": {}, "drop_path": 0.1}, "set drop_path 0, this model has none"),
        ({"model_kwargs": {"embed_width": 3}}, "embed_width"),
        ({"batch_size": 16, "accumulate": 16}, "mix_token mixes .* leaves one"),
        (
            {"batch_size": 16, "accumulate": 16, "mixup": 0.8, "token_label": False, "mix_token": False},
            "mixup or cutmix mixes .* leaves one: raise batch_size, or set both 0",
        ),
        pytest.param(
            {"device": "auto", "sync_bn": True},
            "sync_bn needs GPUs.* device is cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(tiny, betons, changes, named):
    changes = {k: str(betons / v) if k == "train_data" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=named):
        training.train(tiny(**changes))


def test_a_first_bucket_larger_than_the_others_is_refused(tiny):
    with pytest.raises(ValueError, match="bucket_mb 0.5 is below 1"):
        Classification(tiny(compile=True, bucket_mb=0.5), Ranks(0, 2, torch.device("cpu"))).make_loaders()


def test_what_has_no_effect_is_said(tiny, capsys):
    training.train(tiny(max_steps=1, compile_mode="max-autotune-no-cudagraphs", residual_dtype="bfloat16"))
    said = capsys.readouterr().out
    assert "compile_mode max-autotune-no-cudagraphs has no effect on the CPU" in said
    assert "residual_dtype bfloat16 has no effect" in said


def test_a_label_below_0_is_refused_with_its_sample(tiny, tmp_path):
    """In a file of stock FFCV's writer: ours refuses such a label, and one with class names is checked when it is
    opened."""
    data = bytearray(lzma.decompress((ROOT / "tests" / "stock_ffcv.beton.xz").read_bytes()))
    offset, size = fuzz_beton.places(data)[0]["row4.f1"]
    data[offset : offset + size] = (-1).to_bytes(size, "little", signed=True)
    (tmp_path / "stock.beton").write_bytes(data)
    config = tiny(train_data=str(tmp_path / "stock.beton"), token_label=False, batch_size=2)
    with pytest.raises(ValueError, match=f"sample 4 .*{tmp_path}/stock.beton has label -1, and labels start at 0"):
        training.train(config)


def test_init_weights_and_resume_take_a_runs_folder(tiny, betons, tmp_path):
    """As evaluation's --checkpoint does."""
    first = training.train(tiny("first", epochs=1))
    still = dict(max_steps=1, lr=1e-9, min_lr=0, warmup_lr=0)
    for init_ema, file in ((True, "ema"), (False, "model")):
        starting = tiny(f"from_{file}", init_weights=str(tmp_path / "first"), init_ema=init_ema, **still)
        began = weights(training.train(starting)["checkpoint"])["model.safetensors:head.weight"]
        expected = weights(first["checkpoint"])[f"{file}.safetensors:head.weight"]
        torch.testing.assert_close(began, expected, rtol=0, atol=1e-6)
    continued = training.train(tiny("continued", resume=str(tmp_path / "first"), max_steps=6))
    assert continued["steps"] == 6
    for changes in ({"init_weights": str(tmp_path / "nowhere")}, {"resume": str(tmp_path / "nowhere")}):
        with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist"):
            training.train(tiny("refused", **changes))


def test_missing_data_is_named(tiny):
    with pytest.raises(FileNotFoundError, match="nowhere.beton"):
        training.train(tiny(train_data="nowhere.beton"))


def test_batch_that_ranks_cannot_share_is_refused(tiny):
    with pytest.raises(ValueError, match="batch_size 16 must be a multiple of 3 ranks"):
        Classification(tiny(), Ranks(0, 3, torch.device("cpu"))).make_loaders()


def test_resume_refuses_another_run(tiny):
    training.train(tiny(max_steps=1))
    with pytest.raises(checkpoint.CheckpointError, match="seed 0 -> 7"):
        training.train(tiny(resume="auto", seed=7))


def test_resume_refuses_data_of_another_size_and_takes_the_new_optimiser_settings(tiny, betons, monkeypatch):
    training.train(tiny(max_steps=1))
    with pytest.raises(checkpoint.CheckpointError, match="steps_per_epoch"):
        training.train(tiny(resume="auto", train_data=[str(betons / "train.beton")] * 2))
    seen = []
    monkeypatch.setattr(
        training, "seed_step", lambda *_: seen.append([group["weight_decay"] for group in optimizers[-1].param_groups])
    )
    optimizers, build = [], learner.build_optimizer
    monkeypatch.setattr(
        learner, "build_optimizer", lambda *arguments: optimizers.append(build(*arguments)) or optimizers[-1]
    )
    training.train(tiny(resume="auto", max_steps=2, weight_decay=0.2))
    assert sorted(seen[0]) == [0.0, 0.2]


def test_evaluation_refuses_other_class_names(tiny, betons, tmp_path):
    summary = training.train(tiny(max_steps=1))
    with BetonReader(betons / "val.beton") as reader:
        samples = [Sample(str(i), int(reader.labels[i]), reader.image(i).tobytes) for i in range(4)]
    write_beton(tmp_path / "other.beton", samples, class_names=["fish", "animal", "monument", "tool"])
    with pytest.raises(ValueError, match="other.beton has the classes"):
        accuracy.evaluate(str(tmp_path / "other.beton"), Path(summary["checkpoint"]))


def test_a_new_run_does_not_start_among_an_old_ones_checkpoints(tiny):
    summary = training.train(tiny(epochs=2))
    first, last = checkpoint.checkpoints(Path(summary["checkpoint"]).parent)
    for changes in ({}, {"resume": str(first)}):
        with pytest.raises(checkpoint.CheckpointError, match=f"already holds .*{last.name}.*--resume auto"):
            training.train(tiny(epochs=2, **changes))
    elsewhere = training.train(tiny("elsewhere", epochs=2, resume=str(first)))
    assert weights(elsewhere["checkpoint"])["optimizer:0:step"] == weights(last)["optimizer:0:step"]
    assert all(torch.equal(weights(last)[name], tensor) for name, tensor in weights(elsewhere["checkpoint"]).items())
    finished = training.train(tiny(epochs=2, resume=str(Path(summary["checkpoint"]).parent.parent)))
    assert finished["steps"] == summary["steps"] and finished["checkpoint"] == str(last)


def learning_rates(config, epochs: int, steps_per_epoch: int = 5) -> np.ndarray:
    """[epochs, steps_per_epoch] of the config's schedule, asked step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    schedule = optimiser.build_schedule(optimizer, config, steps_per_epoch)
    rates = []
    for step in range(epochs * steps_per_epoch):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return np.array(rates).reshape(epochs, steps_per_epoch)


def test_schedule_is_warm_up_cosine_cooldown(tiny):
    config = tiny(epochs=10, warmup_epochs=2, cooldown_epochs=3, lr=1e-3, lr_base_batch=32, min_lr=1e-5, warmup_lr=1e-6)
    peak = 1e-3 * 16 / 32
    expected = [
        1e-6 + (peak - 1e-6) * s / 10
        if s < 10
        else 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * s / 50)) / 2
        if s < 50
        else 1e-5
        for s in range(65)
    ]
    np.testing.assert_allclose(learning_rates(config, 13).ravel(), expected, rtol=1e-9)


def test_schedule_by_epoch_holds_within_an_epoch(tiny):
    """The published order: epoch 0 as a whole at warmup_lr, the cosine from epoch 0, min_lr in the cooldown."""
    given = dict(epochs=10, warmup_epochs=2, cooldown_epochs=3, lr=1e-3, min_lr=1e-5, warmup_lr=1e-6)
    rates = learning_rates(tiny(**given, schedule_by="epoch"), 13)
    assert (rates == rates[:, :1]).all()
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(2, 10)]
    np.testing.assert_allclose(rates[:, 0], [1e-6, 1e-6 + (1e-3 - 1e-6) / 2, *cosine, 1e-5, 1e-5, 1e-5], rtol=1e-9)
    np.testing.assert_allclose(learning_rates(tiny(**given), 13)[:, 0], rates[:, 0], rtol=1e-9)


@pytest.mark.parametrize("schedule_by", ["step", "epoch"])
def test_a_peak_equal_to_min_lr_is_a_constant_learning_rate(tiny, schedule_by):
    config = tiny(epochs=4, warmup_epochs=0, cooldown_epochs=1, lr=5e-6, min_lr=5e-6, schedule_by=schedule_by)
    np.testing.assert_allclose(learning_rates(config, 5), 5e-6, rtol=1e-12)


def test_decay_spares_norms_biases_and_tokens(tiny):
    model = network.build_network(dataclasses.replace(tiny(), num_classes=4))
    groups = optimiser.build_optimizer(model, tiny()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.mlp.fc1.bias", "patch_embed.bn1.weight"} <= spared
    assert decayed == {n for n in names.values() if n.endswith("weight") and "norm" not in n and ".bn" not in n}


@pytest.mark.parametrize("decay, warmup", [(0.3, True), (0.3, False), (0.0, False)])
def test_ema_follows_its_decay(tiny, monkeypatch, decay, warmup):
    """The checkpoint's EMA is the recurrence e += (1 - d) (w - e) over the weights after each step. With warm-up d is
    min(decay, (1 + t) / (10 + t)), without it decay. A decay of 0 leaves the weights themselves."""
    seen = []
    original = learner.ModelEmaV3.update

    def spy(self, model, step=None):
        seen.append(model.head.weight.detach().clone())
        original(self, model, step=step)

    monkeypatch.setattr(learner.ModelEmaV3, "update", spy)
    config = tiny(max_steps=6, ema_decay=decay, ema_warmup=warmup)
    summary = training.train(config)
    torch.manual_seed(config.seed)
    average = network.build_network(dataclasses.replace(config, num_classes=4)).head.weight.detach()
    for t, weight in enumerate(seen):
        average = average + (1 - (min(decay, (1 + t) / (10 + t)) if warmup else decay)) * (weight - average)
    saved = safetensors.torch.load_file(Path(summary["checkpoint"]) / checkpoint.EMA)["head.weight"]
    torch.testing.assert_close(saved, average, rtol=1e-5, atol=1e-7)
    assert torch.equal(saved, seen[-1]) if decay == 0 else not torch.allclose(saved, seen[-1], atol=1e-5)


def test_evaluation_counts_every_sample_once(tiny, betons, tmp_path, capsys):
    """Top-1 and top-5 equal a count image by image, with a partial last batch. (Two ranks: see
    test_two_ranks_follow_one.)"""
    summary = training.train(tiny(max_steps=6))
    model = network.build_network(dataclasses.replace(tiny(), num_classes=4))
    model.load_state_dict(safetensors.torch.load_file(Path(summary["checkpoint"]) / checkpoint.EMA))
    model.eval()
    hits, number = 0, 0
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for batch in Loader(str(betons / "val.beton"), 1, image_size=64, grid=4, train=False, threads=1):
        pixels = (batch.images[0].numpy().transpose(1, 2, 0) / 255 - mean) / std
        with torch.no_grad():
            logits = model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
        hits, number = hits + int(logits.argmax() == batch.labels[0]), number + 1
    assert number % 7, "the last batch of 7 must be partial for this test"
    command = [
        str(betons / "val.beton"),
        "--checkpoint",
        str(tmp_path / "run"),
        "--batch-size",
        "7",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    result = evaluate.main(command)
    assert (
        result["samples"] == number and result["top1"] == pytest.approx(100 * hits / number) and result["top5"] == 100
    )
    assert evaluate.main([*command, "--raw"])["loss"] != result["loss"]
    assert f"top-1 {result['top1']:.2f} %, top-5 100.00 %, {number} images" in capsys.readouterr().out


def test_evaluation_at_another_size_and_of_bare_weights(tiny, betons, tmp_path, capsys):
    config = tiny(max_steps=1)
    summary = training.train(config)
    larger = evaluate.main(
        [str(betons / "val.beton"), "--checkpoint", summary["checkpoint"], "--img-size", "96", "--crop-pct", "1.0"]
    )
    assert any("resized pos_embed from 16 to 36" in remark for remark in larger["remarks"])
    torch.save({}, tmp_path / "empty.pth")
    for arguments, named in (
        (["--checkpoint", str(tmp_path / "empty.pth"), "--model", "lvvit_t"], "empty.pth holds no state dict"),
        (["--checkpoint", str(tmp_path / "empty.pth")], "give --model"),
        (["--checkpoint", str(tmp_path / "none.pth"), "--model", "lvvit_t"], "none.pth does not exist"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(betons / "val.beton"), *arguments])
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_plain_python_runs_the_script(tiny, tmp_path):
    """Without torchrun, from the repository's root, with tl_fast/ first on sys.path; flags override the recipe."""
    command = [
        sys.executable,
        "tl_fast/train.py",
        *flags(tiny(), tmp_path / "c.yaml"),
        "--max_steps",
        "2",
        "--compile",
        "false",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "images/s, data wait" in run.stdout
    meta = json.loads((checkpoint.latest(tmp_path / "run" / "checkpoints") / "meta.json").read_text())
    assert meta["global_step"] == 2 and meta["config"]["max_steps"] == 2


def test_erasing_reaches_the_network(tiny, monkeypatch):
    """The boxes that the loader draws are filled with noise before the network sees the images, and only those."""
    seen = []

    def record(images, boxes, seeds):
        before = images.clone()
        after = erase(images, boxes, seeds)
        seen.append((before, after, boxes))
        return after

    monkeypatch.setattr(training_step, "erase", record)
    training.train(tiny(max_steps=2, epochs=1, erase=1.0))
    assert len(seen) == 2
    for before, after, boxes in seen:
        for old, new, (top, left, height, width) in zip(before, after, boxes.tolist(), strict=True):
            assert height > 0 and width > 0
            changed = (old != new).any(0)
            assert changed[top : top + height, left : left + width].all() and changed.sum() == height * width


def test_checkpoints_by_the_clock_change_nothing(tiny):
    """A checkpoint after every step (0 minutes) and one in 15 minutes: the same weights; what they hold is a place to
    continue from."""
    seldom, often = training.train(tiny("seldom")), training.train(tiny("often", checkpoint_minutes=0.0, keep=100))
    expected, found = weights(seldom["checkpoint"]), weights(often["checkpoint"])
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    kept = checkpoint.checkpoints(Path(often["checkpoint"]).parent)
    assert [checkpoint.read_meta(path)["global_step"] for path in kept] == list(range(1, seldom["steps"] + 1))
    assert len(checkpoint.checkpoints(Path(seldom["checkpoint"]).parent)) == 3
    elsewhere = training.train(tiny("elsewhere", resume=str(kept[6])))
    assert not [name for name in expected if not torch.equal(expected[name], weights(elsewhere["checkpoint"])[name])]


def test_the_record_of_a_run(tiny):
    """Recipe, versions and commit of every start; a fresh start begins a new record."""
    config = tiny(max_steps=1)
    training.train(config)
    training.train(dataclasses.replace(config, max_steps=2, resume="auto"))
    first, second = json.loads((Path(config.output_dir) / "run.json").read_text())["starts"]
    assert (first["step"], second["step"]) == (0, 1)
    assert (
        second["config"]["max_steps"] == 2
        and second["config"]["num_classes"] == 4
        and second["versions"]["torch"] == torch.__version__
    )
    described = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    head = described.stdout.strip() if (ROOT / ".git").exists() and described.returncode == 0 else None
    assert (first["versions"]["commit"] or "").removesuffix("-dirty") == (head or "")
    meta = checkpoint.read_meta(checkpoint.latest(Path(config.output_dir) / "checkpoints"))
    assert meta["versions"] == second["versions"] and meta["config"] == second["config"]


def test_deterministic_mode_is_on_during_the_run_alone(tiny, monkeypatch):
    seen, original = [], training.seed_step

    def spy(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))
        original(*arguments)

    monkeypatch.setattr(training, "seed_step", spy)
    plain = training.train(tiny("plain", max_steps=2))
    exact = training.train(tiny("exact", max_steps=2, deterministic=True))
    assert seen == [(False, False)] * 2 + [(True, True)] * 2 and not torch.are_deterministic_algorithms_enabled()
    assert plain["loss"] == exact["loss"]


def test_loss_terms_are_means_of_the_window(tiny):
    single = [row for row in read_rows(Path(training.train(tiny("single", max_steps=4))["metrics"]))]
    row = read_rows(Path(training.train(tiny("window", max_steps=4, log_every=4))["metrics"]))[-1]
    for name in ("loss", "class_loss", "token_loss", "grad_norm"):
        assert row[name] == pytest.approx(sum(r[name] for r in single) / 4, rel=1e-6)
    assert len({r["token_loss"] for r in single}) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_is_the_eager_one_and_compiles_once(tiny, betons, tmp_path, monkeypatch):
    """Two epochs with validation through inductor: the gradients of the first step, and the losses of all, equal the
    eager run's.

    Drop path is off, for the generators differ. Losses agree within 1e-3 (of about 2.1); rounding grows with the steps,
    and reached 2e-4 in the tenth.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    graphs, boxes, gradients = [], set(), {True: [], False: []}
    add_step, draw, clip = training.Meter.add_step, classification.mix_box, torch.nn.utils.clip_grad_norm_

    def counted(self, *arguments):
        graphs.append(counters["stats"]["unique_graphs"])
        return add_step(self, *arguments)

    def drawn(*arguments):
        box = draw(*arguments)
        boxes.add(tuple(box.tolist()))
        return box

    def seen(parameters, *arguments):
        parameters = list(parameters)
        gradients[config.compile].append([p.grad.clone() for p in parameters])
        return clip(parameters, *arguments)

    monkeypatch.setattr(training.Meter, "add_step", counted)
    monkeypatch.setattr(classification, "mix_box", drawn)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", seen)
    rows = []
    for compile in (False, True):
        config = tiny(
            f"compile-{compile}",
            compile=compile,
            val_data=str(betons / "val.beton"),
            model_kwargs={**TINY, "depth": 1},
            drop_path=0.0,
            epochs=2,
        )
        before = counters["stats"]["unique_graphs"]
        rows.append(read_rows(Path(training.train(config)["metrics"])))
    # The step, and after the first epoch validation's way from pixels to logits.
    assert graphs == [before] * 10 + [before + 1] * 5 + [before + 2] * 5
    assert len(boxes) > 5 and len({row["lr"] for row in rows[0] if row["kind"] == "train"}) == 10
    for eager, other in zip(gradients[False][0], gradients[True][0], strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-5)
    assert [row["kind"] for row in rows[0]] == (["train"] * 5 + ["val"]) * 2
    for eager, other in zip(*rows, strict=True):
        losses = [key for key in eager if "loss" in key]
        assert losses and [other[key] for key in losses] == pytest.approx([eager[key] for key in losses], abs=1e-3)


@pytest.mark.parametrize("world_size, sync_bn", [(2, True), (1, True), (2, False)])
def test_sync_bn_converts_batch_norm_before_the_step_is_compiled(tiny, monkeypatch, world_size, sync_bn):
    """The real one needs GPUs: the run is stopped where it has made its network."""

    class Made(Exception):
        pass

    class Alone(Ranks):
        """One of several that has no others to speak to."""

        def gather(self, value):
            return [value] * self.world_size

        def from_main(self, value):
            return value

    def made(step, *_):
        raise Made(step)

    monkeypatch.setattr(network, "compiled", made)
    config, ranks = dataclasses.replace(tiny(compile=True), num_classes=4), Alone(0, world_size, torch.device("cpu"))
    task = Classification(config, ranks)
    task.open()
    task.config = dataclasses.replace(task.config, sync_bn=sync_bn, device="auto")
    with pytest.raises(Made) as caught:
        training._run(task, None, None)
    norms = [
        module for module in caught.value.args[0].modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 3
    assert [isinstance(module, torch.nn.SyncBatchNorm) for module in norms] == [sync_bn and world_size > 1] * 3


def test_tensorboard_holds_the_numbers_of_the_log(tiny, betons):
    """Every number of every row, under kind/name at its step, and nothing else; after a resumption too."""
    config = tiny(val_data=str(betons / "val.beton"), epochs=2, non_finite="skip")
    training.train(dataclasses.replace(config, max_steps=7))
    rows = read_rows(Path(training.train(dataclasses.replace(config, resume="auto"))["metrics"]))
    expected = {
        (f"{row['kind']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in ("kind", "step", "epoch")
    }
    board = EventAccumulator(str(Path(config.output_dir) / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = [((tag, point.step), point.value) for tag in board.Tags()["scalars"] for point in board.Scalars(tag)]
    assert len(points) == len(dict(points)) and dict(points) == pytest.approx(expected, rel=1e-6)
    tags = {tag for tag, _ in expected}
    assert {
        "train/loss",
        "train/class_loss",
        "train/token_loss",
        "train/grad_norm",
        "train/lr",
        "train/images_per_second",
        "train/data_wait",
        "val/val_top1_ema",
        "val/val_top1_raw",
    } <= tags and len(expected) > 90
