"""A rank's part of a data set in a GPU's memory: what is uploaded, when it is refused. That batches made from there are
those made from the file is tested in test_gpu_loader.py, in the simulator."""

import time

import numpy as np
import pytest
import torch
from small_betons import write

from tl_fast.beton.layout import BetonError
from tl_fast.beton.samples import Samples
from tl_fast.labelmaps.format import MapSpec
from tl_fast.pipeline import gpu_batches, resident
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.resident import Resident, open_resident
from tl_fast.pipeline.settings import Crops, Decoding, Share, Targets
from tl_fast.plan.augment import Augment
from tl_fast.system.mistakes import InputError

HOST = torch.device("cpu")
SPEC = MapSpec(k=3, height=9, width=7, num_classes=10)


@pytest.fixture(scope="module")
def files(photos):
    return [path.read_bytes() for path in sorted(photos.glob("train/*/*.jpg"))[:32]]


@pytest.fixture(scope="module")
def planes(files, tmp_path_factory):
    """32 photos as planes, in two files, with label maps."""
    folder = tmp_path_factory.mktemp("resident")
    return [
        write(folder / f"{part}.beton", files[part::2], spec=SPEC, store="yuv420", short_side=96) for part in range(2)
    ]


def planner_of(paths, batch_size=8, rank=0, world_size=1, order="grouped", train=True) -> Planner:
    share = Share(batch_size, rank, world_size, order)
    return Planner(Samples(paths), share, Crops((32, 32), Augment()), Targets((2, 2)), seed=0, train=train)


def decoding(wanted=True, **options) -> Decoding:
    return Decoding(torch.device("cuda"), resident=wanted, threads=3, **options)


@pytest.mark.parametrize("chunk", [1 << 26, 40_000, 1])
def test_images_and_maps_lie_where_they_are_said_to(planes, chunk, monkeypatch, capsys):
    monkeypatch.setattr(resident, "CHUNK", chunk)
    planner = planner_of(planes, 8, rank=1, world_size=2)
    samples, ids = planner.samples, planner.rank_ids()
    part = Resident(samples, ids, HOST, decoding(check=True), announce=True)
    regions, event = part.start(ids, None, None)()
    span, offsets = regions.span()
    whole = np.asarray(span)
    assert event is None and len(ids) == 16
    for b, i in enumerate(ids):
        np.testing.assert_array_equal(regions[b], samples.image(i))
        np.testing.assert_array_equal(whole[offsets[b] :][: regions.plane_bytes[b]], samples.image(i))
    bounds, ranges = part.map_parts(ids[::-1])
    maps, expected = samples.raw_label_maps(ids[::-1])
    np.testing.assert_array_equal(ranges, expected)
    for (first, stop), label_map in zip(bounds, maps, strict=True):
        np.testing.assert_array_equal(part.maps[first:stop], label_map)
    assert part.num_bytes == resident.resident_bytes(samples, ids)
    assert "16 images are in the memory of cpu" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_samples_and_never_leave_their_part(planes, world_size):
    parts = []
    for rank in range(world_size):
        planner = planner_of(planes, 16 // world_size, rank, world_size)
        parts.append(planner.rank_ids())
        for epoch in range(3):
            order = planner.order(epoch)
            taken = np.concatenate([planner.ids(order, step) for step in range(len(planner))])
            assert np.isin(taken, parts[-1]).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(32))
    assert all(len(part) == 32 // world_size for part in parts)


def test_a_free_order_needs_all_samples_and_evaluation_its_own(planes):
    assert len(planner_of(planes, rank=1, world_size=2, order="shuffled").rank_ids()) == 32
    np.testing.assert_array_equal(planner_of(planes, rank=1, world_size=4, train=False).rank_ids(), range(1, 32, 4))


def test_a_sample_of_another_rank_is_refused(planes):
    planner = planner_of(planes, rank=0, world_size=2)
    part = Resident(planner.samples, planner.rank_ids(), HOST, decoding())
    missing = np.setdiff1d(np.arange(32), planner.rank_ids())
    with pytest.raises(InputError, match=f"sample {missing[0]} is in another rank's part"):
        part.whole(np.array([planner.rank_ids()[0], missing[0]]))


def test_damage_is_found_while_uploading(planes, tmp_path):
    data = bytearray(planes[0].read_bytes())
    with Samples(planes[0]).readers[0] as reader:
        data[data.find(bytes(reader.image(3)))] ^= 4
    (damaged := tmp_path / "damaged.beton").write_bytes(data)
    planner = planner_of(damaged)
    with pytest.raises(BetonError, match=r"crc: sample 3 \(image-3.jpg\)"):
        Resident(planner.samples, planner.rank_ids(), HOST, decoding(check=True))


def test_jpegs_are_refused_by_name_or_left_to_the_file(files, tmp_path):
    as_planes = [n != 5 for n in range(8)]
    planner = planner_of(write(tmp_path / "mixed.beton", files[:8], as_planes=as_planes), 4)
    message = r"sample 5 \(image-5.jpg\) of .*mixed.beton is a JPEG, and 1 of 8 images are.*--store yuv420"
    with pytest.raises(InputError, match=message):
        open_resident(planner, HOST, decoding())
    assert open_resident(planner, HOST, decoding("auto")) is None


def test_what_does_not_fit_is_refused_with_what_would(planes, monkeypatch):
    one, two = planner_of(planes), planner_of(planes, 4, world_size=2, order="shuffled")
    needed = resident.resident_bytes(one.samples, one.rank_ids())
    monkeypatch.setattr(resident, "memory_of", lambda device: (needed / 0.9 - 10, 100 * needed))
    for planner in (one, two):
        with pytest.raises(
            InputError, match=r"rank 0 take .* GB.*--short-side 64; now 96 on average.*or more GPUs"
        ) as e:
            open_resident(planner, HOST, decoding())
        assert ("order 'grouped'" in str(e.value)) == (planner is two)
        assert open_resident(planner, HOST, decoding("auto")) is None
    assert open_resident(planner_of(planes, 4, world_size=2), HOST, decoding()) is not None  # half of it
    monkeypatch.setattr(resident, "memory_of", lambda device: (100 * needed, needed / 0.3 + 10))
    assert open_resident(one, HOST, decoding("auto")) is not None
    assert open_resident(planner_of(planes, train=False), HOST, decoding("auto")) is None  # validation comes once
    assert open_resident(one, HOST, decoding(False)) is None
    monkeypatch.setattr(resident, "memory_of", lambda device: (100 * needed, needed / 0.3 - 10))
    assert open_resident(one, HOST, decoding("auto")) is None


def test_settings_that_cannot_be(planes):
    with pytest.raises(InputError, match="resident=True keeps the images in a GPU's memory: device='cuda' is needed"):
        Loader(planes, 8, resident=True)
    with pytest.raises(InputError, match="resident must be True, False or 'auto', got 'yes'"):
        Loader(planes, 8, resident="yes")
    with Loader(planes, 8, image_size=32, grid=2, resident="auto") as loader:  # no GPU: from the file
        assert loader.decode == "cpu" and len(list(loader)) == 4


def test_the_hosts_part_of_a_batch_takes_microseconds(planes):
    """What is decided and put together for a batch of 256, besides one copy and the launches."""
    planner = planner_of(planes * 8, 256)
    part = Resident(planner.samples, planner.rank_ids(), HOST, decoding())
    order, times = planner.order(0), []
    for _ in range(15):
        begin = time.perf_counter()
        plan = planner.plan(planner.ids(order, 0), 0)
        regions, _ = part.start(plan.ids, None, None)()
        parts = gpu_batches.upload_parts(planner.samples, plan, regions.span()[1], regions.plane_bytes > 0, part)
        times.append(time.perf_counter() - begin)
    assert "maps" not in parts and sum(array.nbytes for array in parts.values()) < 300 * 256
    assert min(times) / 256 < 50e-6  # measured: 0.6e-6; a bound that a busy machine keeps
