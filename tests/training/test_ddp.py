"""Several ranks: what DistributedDataParallel is told and does, eager and compiled; the order of samples across world
sizes; and whose output is seen."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import kill_run
import pytest
import torch
from tiny_runs import weights
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tl_fast.training import checkpoint, learner, network
from tl_fast.training import loop as training
from tl_fast.training.config import TrainConfig
from tl_fast.training.runlog import read_rows

SMALL, LARGE = 0.02, 25.0  # MiB a bucket: the tiny model's 0.2 MiB of gradients in several, or in one


def watch(record: dict[str, Any]) -> None:
    """Note in `record` what this process's DistributedDataParallel is told and does.

    options, buffer_sync, static_graph, bucket_bytes: of the object. events: of every forward pass, in order, "backward"
    for a node of its graph and "reduce" for a bucket handed to all_reduce. storages: of every step, the number of
    storages that the gradients lie in. grads: of the last step. statistics: of every step, a running mean. ids: of
    every step, sample ids by pass. compilations: so far, at every step. weights: of model and EMA, at the end.
    """
    record |= {"events": [], "storages": [], "statistics": [], "ids": [], "compilations": []}

    class Watched(network.DistributedDataParallel):
        def __init__(self, module, **options):
            super().__init__(module, **options)
            record.update(
                options=options,
                static_graph=self.static_graph,
                bucket_bytes=self.bucket_bytes_cap,
                views=self.gradient_as_bucket_view,
            )
            record["parameters"] = sum(p.requires_grad for p in self.parameters())
            self.register_comm_hook(None, reduce)
            wrapped.append(self)

        def forward(self, *arguments):
            out = super().forward(*arguments)
            events: list[str] = []
            record["events"].append(events)
            nodes, seen = [out[0].grad_fn], set()
            while nodes:
                node = nodes.pop()
                if node is None or node in seen or "AccumulateGrad" in node.name():
                    continue
                seen.add(node)
                node.register_prehook(lambda _, events=events: events.append("backward"))
                nodes.extend(child for child, _ in node.next_functions)
            return out

    def reduce(state, bucket):
        record["events"][-1].append("reduce")
        return allreduce_hook(state, bucket)

    def clip(parameters, *arguments):
        parameters = [p for p in parameters if p.grad is not None]
        record["storages"].append(len({p.grad.untyped_storage().data_ptr() for p in parameters}))
        record["grads"] = [p.grad.clone() for p in parameters]
        return original_clip(parameters, *arguments)

    def add_step(self, *arguments):
        record["ids"].append([ids.tolist() for ids in self._sample_ids])
        record["compilations"].append(counters["stats"]["unique_graphs"])
        if wrapped:
            record["statistics"].append(
                next(b.clone() for n, b in wrapped[0].named_buffers() if n.endswith("running_mean"))
            )
        return original_step(self, *arguments)

    def update(self, model, *arguments, **options):
        original_update(self, model, *arguments, **options)
        record["weights"] = {
            f"{kind}:{name}": p.detach().clone()
            for kind, m in (("model", model), ("ema", self.module))
            for name, p in m.named_parameters()
        }

    wrapped: list[Watched] = []
    original_update, learner.ModelEmaV3.update = learner.ModelEmaV3.update, update
    original_clip, original_step = training.nn.utils.clip_grad_norm_, training.Meter.add_step
    network.DistributedDataParallel = Watched
    training.nn.utils.clip_grad_norm_, training.Meter.add_step = clip, add_step


def full_disk(at: int) -> None:
    """From the `at`-th checkpoint on no file of this process may grow past 64 KiB: writing then fails, as on a full
    disk."""
    original, left = checkpoint.save, [at]

    def save(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        return original(*arguments, **options)

    checkpoint.save = save


def rank_main(
    rank: int, world_size: int, folder: Path, config: TrainConfig, environment: dict[str, str], full_at: int | None
) -> None:
    """One rank's process: train() on `config`; leaves `folder`/<rank>.pt (the record) and <rank>.txt (its output)."""
    with (folder / f"{rank}.txt").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        **environment,
    }
    torch.set_num_threads(1)
    if world_size > 1:
        store = torch.distributed.FileStore(str(folder / "store"), world_size)  # no port to collide on
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    record: dict[str, Any] = {}
    watch(record)
    if full_at:
        full_disk(full_at)
    try:
        record["summary"] = training.train(config)
        torch.save(record, folder / f"{rank}.pt")
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()  # gloo's threads would abort a process that exits around them


@dataclasses.dataclass
class Job:
    codes: list[int]
    outputs: list[str]
    records: list[dict[str, Any]]


@pytest.fixture
def job(tmp_path):
    """Runs train() on a config in some processes and says what became of them."""
    context = kill_run.server()

    def run(
        config: TrainConfig, world_size: int, seconds: float = 240, full_at: int | None = None, **environment: str
    ) -> Job:
        folder = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        folder.mkdir()
        ranks = [
            context.Process(target=rank_main, args=(rank, world_size, folder, config, environment, full_at))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(seconds)
        late = [process.kill() for process in ranks if process.exitcode is None]
        outputs = [(folder / f"{rank}.txt").read_text() for rank in range(world_size)]
        assert not late, f"{len(late)} ranks did not end: {outputs}"
        records = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]
        return Job([process.exitcode for process in ranks], outputs, records)

    return run


def overlapped(events: list[str]) -> int:
    """How many nodes of the backward pass ran after the first bucket had been handed to all_reduce."""
    return events[events.index("reduce") :].count("backward")


@pytest.mark.parametrize("bucket_mb", [SMALL, LARGE])
def test_gradients_are_views_of_buckets_reduced_during_the_backward_pass(tiny, job, bucket_mb):
    """With one bucket nothing can overlap, which shows that the measure would notice."""
    run = job(tiny(max_steps=4, bucket_mb=bucket_mb), 2)
    assert run.codes == [0, 0], run.outputs
    for record in run.records:
        assert record["static_graph"] and record["views"] and record["bucket_bytes"] == int(bucket_mb * 2**20)
        assert [
            record["options"][name]
            for name in ("forward_sync_buffers", "broadcast_buffers")
            if name in record["options"]
        ] == [False]
        steps = record["events"][2:]  # the first of a static graph finds the order out
        assert len(steps) == 2
        for events, storages in zip(steps, record["storages"][2:], strict=True):
            assert events.count("reduce") == storages < record["parameters"] / 2 and (storages > 3) == (
                bucket_mb == SMALL
            )
            nodes = events.count("backward")
            assert nodes > 50 and (overlapped(events) > nodes / 3 if bucket_mb == SMALL else overlapped(events) == 0)
    first, second = run.records
    assert all(torch.equal(a, b) for a, b in zip(first["grads"], second["grads"], strict=True)) and any(
        g.any() for g in first["grads"]
    )
    assert not torch.equal(first["statistics"][-1], second["statistics"][-1]), (
        "batch norm's statistics are to stay local"
    )


def test_accumulation_reduces_on_the_last_pass_alone(tiny, job):
    run = job(tiny(max_steps=3, accumulate=2, bucket_mb=SMALL), 2)
    assert run.codes == [0, 0], run.outputs
    for record in run.records:
        assert not record["static_graph"] and len(record["events"]) == 6
        assert not any("reduce" in events for events in record["events"][::2])
        assert all(overlapped(events) > 50 for events in record["events"][3::2])
    first, second = run.records
    assert all(torch.equal(a, b) for a, b in zip(first["grads"], second["grads"], strict=True))


def test_frozen_parameters_are_not_exchanged(tiny, job):
    """Stem and first block frozen on two ranks: DDP knows the other parameters alone, and these stay in step."""
    config = tiny(max_steps=3, freeze=2, accumulate=2)
    run = job(config, 2)
    assert run.codes == [0, 0], run.outputs
    torch.manual_seed(config.seed)
    model = network.build_network(dataclasses.replace(config, num_classes=4))
    frozen = {name for name, _ in model.named_parameters() if not name.startswith(("blocks.1.", "norm", "head", "aux"))}
    first, second = run.records
    assert first["parameters"] == len(list(model.parameters())) - len(frozen) and frozen
    for name, weight in model.named_parameters():
        for kind in ("model", "ema"):
            ours = first["weights"][f"{kind}:{name}"]
            assert torch.equal(ours, second["weights"][f"{kind}:{name}"])
            assert torch.equal(ours, weight) is (name in frozen), (kind, name)


def test_mixup_on_two_ranks_is_that_of_two_passes(tiny, betons, job):
    """2 ranks against 1 rank that accumulates 2 passes: the batches of 8 are the same, and so is how they are mixed."""
    same = dict(train_data=str(betons / "plain.beton"), token_label=False, mix_token=False, drop_path=0.0, max_steps=8)
    same |= dict(freeze_stem_bn=True, mixup=0.8, cutmix=1.0)
    losses = {}
    for name, world_size, changes in (
        ("two", 2, {}),
        ("one", 1, {"accumulate": 2}),
        ("unmixed", 1, {"accumulate": 2, "mixup": 0.0, "cutmix": 0.0}),
    ):
        config = tiny(name, **same | changes)
        run = job(config, world_size)
        assert run.codes == [0] * world_size, run.outputs
        losses[name] = [row["loss"] for row in read_rows(Path(config.output_dir) / "metrics.jsonl")]
    assert len(losses["two"]) == 8 and losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["unmixed"] != pytest.approx(losses["one"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_on_two_ranks_is_the_eager_one(tiny, betons, job, tmp_path):
    """DDP around the compiled step: both ranks end with the same weights and EMA, the losses are the eager run's, and
    nothing compiles twice.

    torch cuts the graph where a bucket is full, at 1 MiB and then at every `bucket_mb`, so that the all-reduce overlaps
    the backward pass of a compiled step too.
    """
    settings = dict(
        model_kwargs={"embed_dim": 192, "depth": 1, "num_heads": 2, "stem_width": 8},
        epochs=2,
        drop_path=0.0,
        bucket_mb=1.0,
        val_data=str(betons / "val.beton"),
    )
    rows, runs = {}, {}
    for name in ("eager", "compiled"):
        config = tiny(name, compile=name == "compiled", **settings)
        runs[name] = job(config, 2, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
        assert runs[name].codes == [0, 0], runs[name].outputs
        rows[name] = read_rows(Path(config.output_dir) / "metrics.jsonl")
    assert len(rows["eager"]) == 12
    for eager, other in zip(rows["eager"], rows["compiled"], strict=True):
        same = [key for key in eager if "loss" in key]
        assert same and [other[key] for key in same] == pytest.approx([eager[key] for key in same], abs=2e-3)
        assert (other["step"], other["epoch"], other.get("lr")) == (eager["step"], eager["epoch"], eager.get("lr"))
    # Drop path draws other samples when compiled, so that this one has nothing to be compared with.
    runs["dropping"] = job(
        tiny("dropping", compile=True, **settings | {"drop_path": 0.3}),
        2,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert runs["dropping"].codes == [0, 0], runs["dropping"].outputs
    for name in ("compiled", "dropping"):
        first, second = runs[name].records
        for weight, tensor in first["weights"].items():
            assert tensor.isfinite().all() and torch.equal(tensor, second["weights"][weight]), weight
        for record in (first, second):
            # The step, and after the first epoch validation.
            step = record["compilations"][0]
            assert step > 0 and record["compilations"] == [step] * 5 + [step + 1] * 5
            assert all(overlapped(events) > 0 for events in record["events"][2:])


@pytest.mark.parametrize(
    "before, after, accumulate",
    [
        (2, 1, 2),
        pytest.param(1, 2, 1, marks=(pytest.mark.slow, pytest.mark.matrix)),
        pytest.param(2, 1, 1, marks=(pytest.mark.slow, pytest.mark.matrix)),
        pytest.param(1, 2, 2, marks=(pytest.mark.slow, pytest.mark.matrix)),
    ],
)
def test_another_world_size_takes_the_samples_in_the_same_order(tiny, job, before, after, accumulate):
    """Of every global step: its samples pass by pass and, within a pass, rank by rank. The second job goes on within
    the second epoch."""

    def order(run: Job) -> list[list[int]]:
        steps = zip(*(record["ids"] for record in run.records), strict=True)
        return [[sample for passes in zip(*step, strict=True) for part in passes for sample in part] for step in steps]

    config = tiny(epochs=2, resume="auto")
    runs = [
        job(config_, world_size)
        for config_, world_size in (
            (tiny("straight", epochs=2), 1),
            (dataclasses.replace(config, max_steps=7), before),
            (dataclasses.replace(config, accumulate=accumulate), after),
        )
    ]
    assert not any(code for run in runs for code in run.codes), [run.outputs for run in runs]
    straight, first, second = map(order, runs)
    assert len(straight) == 10 and len(first) == 7 and first + second == straight
    assert all(len(set(step)) == 16 for step in straight) and straight[0] != straight[5]
    assert len(runs[2].records[0]["ids"][0]) == accumulate


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(tiny, job, world_size):
    """At the second checkpoint, within the first epoch. The error names it; from the first one a run goes on to the
    weights of a run without trouble."""
    settings = dict(max_steps=7, checkpoint_steps=2)
    straight, config = tiny("straight", **settings), tiny("full", **settings)
    start = time.monotonic()
    run = job(config, world_size, full_at=2)
    assert time.monotonic() - start < 60
    folder = Path(config.output_dir) / "checkpoints"
    assert all(run.codes) and not run.records, run.outputs
    assert (
        f"cannot write checkpoint {folder}/step-0000000004" in run.outputs[0] and "File too large" in run.outputs[0]
    ), run.outputs
    assert [path.name for path in folder.iterdir()] == ["step-0000000002"] and checkpoint.verify(
        folder / "step-0000000002"
    )
    resumed, expected = job(dataclasses.replace(config, resume="auto"), world_size), job(straight, world_size)
    assert not any(resumed.codes + expected.codes) and "from step 2 to 7" in resumed.outputs[0], resumed.outputs
    found, wanted = (weights(job_.records[0]["summary"]["checkpoint"]) for job_ in (resumed, expected))
    assert found.keys() == wanted.keys()
    # Running statistics, which no gradient sees: saving averages them over ranks.
    assert not [
        name
        for name in wanted
        if not torch.equal(found[name], wanted[name]) and not (world_size > 1 and "running_" in name)
    ]


def test_the_first_rank_alone_shows_progress(tiny, job):
    """On a terminal a bar, elsewhere lines, of the first rank; the other one is silent."""
    on_terminal, elsewhere = job(tiny("terminal", max_steps=2), 2, FORCE_COLOR="1"), job(tiny("file", max_steps=2), 2)
    for run in (on_terminal, elsewhere):
        assert run.codes == [0, 0] and "from step 0 to 2" in run.outputs[0] and run.outputs[1] == ""
    assert "2/2" in on_terminal.outputs[0] and "\x1b[" in on_terminal.outputs[0]
    assert (
        "epoch 0 step 2: loss" in elsewhere.outputs[0]
        and "2/2" not in elsewhere.outputs[0]
        and "\x1b[" not in elsewhere.outputs[0]
    )
