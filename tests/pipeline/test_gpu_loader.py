"""The loader's GPU side: all of it in numba's simulator, DALI's graph, the choice of a decoder, and, where there is a
GPU, the real thing."""

import contextlib
import dataclasses
import gc
import io
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_betons import masked_beton, write

from tests import simulated_loader, yuv_planes
from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.samples import Samples
from tl_fast.kernels import cuda_launch
from tl_fast.labelmaps.format import MapSpec
from tl_fast.pipeline import choice, gpu_batches, nvjpeg
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.nvjpeg import NvjpegDecoder, decode_graph
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.regions import DecodeError, Regions
from tl_fast.pipeline.settings import Crops, Decoding, Share, Targets
from tl_fast.plan import records as plan
from tl_fast.system.mistakes import InputError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = plan.Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random", erase=0.25)


def with_damaged_map(source: Path, target: Path, sample: int) -> Path:
    """A copy whose label map of one sample lists classes that do not exist."""
    data = bytearray(source.read_bytes())
    with BetonReader(source) as reader:
        start, size = int(reader._map_ptr[sample]), int(reader._map_size[sample])
    data[start : start + size] = b"\xff" * size
    target.write_bytes(data)
    return target


# --- in the simulator


def small_photos(photos: Path, **options) -> list[bytes]:
    """Eight photos made small; options: of Pillow's encoder."""
    images = []
    for i, photo in enumerate(sorted(photos.glob("train/*/*.jpg"))[:8]):
        with Image.open(photo) as image:
            small = image.convert("RGB").resize((40 + 3 * i, 52 - 2 * i))
            small.save(file := io.BytesIO(), "JPEG", quality=95, **options)
        images.append(file.getvalue())
    return images


@pytest.fixture(scope="module")
def small_beton(photos, tmp_path_factory):
    """Eight small photos, label maps of 5 classes, 3 x 3 cells."""
    return write(tmp_path_factory.mktemp("small") / "small.beton", small_photos(photos), spec=MapSpec(2, 3, 3, 5))


@pytest.fixture(scope="module")
def beton_of_planes(photos, tmp_path_factory):
    """Eight small photos, every fourth one a JPEG, the others planes; label maps as `small_beton`'s."""
    path = tmp_path_factory.mktemp("planes") / "planes.beton"
    as_planes = [n % 4 != 2 for n in range(8)]
    return write(path, small_photos(photos), spec=MapSpec(2, 3, 3, 5), as_planes=as_planes)


@pytest.mark.slow
def test_the_whole_loader_in_the_simulator_gives_the_cpu_loaders_batches(
    photos, small_beton, beton_of_planes, tmp_path
):
    damaged = with_damaged_map(small_beton, tmp_path / "damaged.beton", 1)
    all_planes = write(tmp_path / "all.beton", small_photos(photos), spec=MapSpec(2, 3, 3, 5), store="yuv420")
    out = tmp_path / "simulated.npz"
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    masked_beton(masked := tmp_path / "masked.beton", 6, ((24, 30), (20, 16)))
    command = [
        sys.executable,
        "-m",
        "tests.simulated_loader",
        *map(str, (small_beton, masked, beton_of_planes, all_planes, damaged, out)),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    simulated = dict(np.load(out))
    for name in ("epoch", "batch"):
        words = str(simulated.pop(f"error/{name}"))
        assert "damaged.beton: label_map: sample 1 (image-1.jpg)" in words and "outside 0..4" in words, words
    expected = simulated_loader.run(*map(str, (small_beton, masked, beton_of_planes, all_planes)), "cpu")
    assert simulated.keys() == expected.keys()
    kinds = "SETTINGS", "PLANES_SETTINGS", "RESIDENT_SETTINGS", "SEGMENT_SETTINGS"
    settings = {name for kind in kinds for name in getattr(simulated_loader, kind)}
    assert {name.split("/")[0] for name in simulated} == settings
    for name, values in expected.items():
        field = name.split("/")[-1]
        assert simulated[name].dtype == values.dtype and simulated[name].shape == values.shape, name
        if field == "images":
            off = np.abs(simulated[name].astype(int) - values)
            # Within a level; operations like Equalize and Posterize multiply a level that differs.
            multiplied = ("recipe", "rectangle", "planes/", "resident/", "segment/")
            assert (off > 1).mean() < (0.02 if name.startswith(multiplied) else 1e-9), (name, off.max())
        elif field == "targets":
            # What differs in the last bit may be rounded to the next bfloat16.
            step = 2.0**-8 if name.startswith("bfloat16") else 0
            np.testing.assert_allclose(simulated[name], values, rtol=step, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(simulated[name], values, err_msg=name)
    assert "recipe/0/erase" in simulated and "validation/0/targets" not in simulated
    assert "segment/0/masks" in simulated and "segment, validation/5/masks" in simulated


# --- streams and events, recorded in place of a GPU


class Streams:
    """A stand-in for `torch` in gpu_batches: streams and events that do nothing but write down who was asked for what,
    in `log`."""

    def __init__(self):
        self.log: list[tuple] = []
        self.happened: set = set()  # events
        world = self

        class Stream:
            cuda_stream = 0

            def wait_event(self, event):
                world.log.append(("wait", self, event))

            def record_event(self):
                return Event().record(self)

            def synchronize(self):
                world.log.append(("synchronize", self))

        class Event:
            def __init__(self, blocking=False):
                self.blocking = blocking

            def record(self, stream):
                world.log.append(("record", stream, self))
                return self

            def query(self):
                return self in world.happened

            def synchronize(self):
                world.log.append(("synchronize", self))
                world.happened.add(self)

        self.Stream, self.Event, self.consumer = Stream, Event, Stream()
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            current_stream=lambda device: self.consumer,
            stream=lambda stream: contextlib.nullcontext(),
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, pin_memory=False, **options):
        return torch.empty(*shape, **options)

    def calls(self, *names) -> list[tuple]:
        return [entry for entry in self.log if entry[0] in names]


def two_regions() -> Regions:
    """Pixels of two regions of 4 x 4, which the GPU's stand-in takes for its own."""
    pixels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    return Regions(pixels.data_ptr() + np.array([0, 48]), np.full((2, 2), 4), True, pixels)


@pytest.fixture
def streams(monkeypatch):
    world = Streams()
    monkeypatch.setattr(gpu_batches, "torch", world)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: world.log.append(("use", stream, tensor.data_ptr()))
    )
    pixels = np.zeros(1, np.uint8)  # no kernel runs
    monkeypatch.setattr(gpu_batches, "numba_cuda", SimpleNamespace(as_cuda_array=lambda span, sync: pixels))
    monkeypatch.setattr(cuda_launch, "launch", lambda name, *_: world.log.append(("launch", name)))
    monkeypatch.setattr(cuda_launch, "shared_limit", lambda name: 200 << 10)
    return world


@pytest.fixture
def made_on(streams, small_beton):
    """A function: (GpuBatches on stubs, a function that makes a batch of two samples with erasing), with so many
    batches ahead."""

    def build(ahead):
        host = torch.device("cpu")
        crops = Crops((8, 8), dataclasses.replace(RECIPE, fill=(1, 2, 3)))
        planner = Planner(Samples(small_beton), Share(2), crops, Targets(grid=(2, 2)), seed=0, train=True)
        batches = gpu_batches.GpuBatches(planner, host, Decoding(host), ahead)
        batches.stream, batches.decode_stream = streams.Stream(), streams.Stream()
        batch_plan = planner.plan(np.array([3, 5]), epoch=0)
        batch_plan = dataclasses.replace(batch_plan, shapes=np.full((2, 2), 4))

        def make(regions=None, decoded=None):
            return batches.make(batch_plan, two_regions() if regions is None else regions, decoded)

        make.plan = batch_plan
        return batches, make

    return build


def test_kernels_wait_for_the_decode_and_are_three_launches(streams, made_on):
    batches, make = made_on(3)
    decoded = batches.decode_stream.record_event()
    assert streams.log == [("record", batches.decode_stream, decoded)]
    made = make(decoded=decoded)
    assert streams.log[1:] == [
        ("wait", batches.stream, decoded),
        ("launch", "images: geometry"),
        ("launch", "images: colours"),
        ("launch", "targets: bytes, float32"),
        ("record", batches.stream, made.event),
    ]


def test_taking_a_batch_makes_the_stream_wait_and_never_the_host(streams, made_on):
    batches, make = made_on(3)
    made = make()
    streams.log.clear()
    batch = batches.hand_over(made)
    assert streams.calls("synchronize") == [] and streams.calls("wait") == [("wait", streams.consumer, made.event)]
    used = {address for _, stream, address in streams.calls("use") if stream is streams.consumer}
    fields = [batch.images, batch.labels, batch.targets, batch.sample_ids, batch.erase, batch.noise]
    # No field's memory may be given out again before the consumer is through.
    assert {field.untyped_storage().data_ptr() for field in fields} == used
    batches.check(wait=False)
    assert streams.calls("synchronize") == []
    batches.check(wait=True)
    assert streams.calls("synchronize") == [("synchronize", made.event)]


@pytest.fixture
def made_with_masks(made_on):
    """Another of `made_on`: of batches with masks in place of targets."""

    def build(ahead):
        batches, make = made_on(ahead)
        samples = SimpleNamespace(labels=np.arange(8), mask_spec=SimpleNamespace(ignore_index=200))
        masks = [np.arange(40 * 50, dtype=np.uint8).reshape(40, 50) + n for n in range(2)]
        starts, heights, widths = np.array([[3, 5], [36, 1]]), np.full(2, 40), np.full(2, 50)
        batch_plan = dataclasses.replace(
            make.plan, heights=heights, widths=widths, starts=starts, affines=None, extras={}, masks=masks
        )
        batches.samples = samples
        return batches, batch_plan

    return build


def test_masks_are_one_launch_and_their_memory_is_kept_for_the_consumer(streams, made_with_masks):
    batches, batch_plan = made_with_masks(3)
    made = batches.make(batch_plan, two_regions(), None)
    kernels = [name for _, name in streams.calls("launch")]
    assert kernels == ["images: geometry", "images: colours", "masks"] and made.maps is None
    batch = batches.hand_over(made)
    assert batch.masks.dtype == torch.uint8 and batch.masks.shape == (2, 8, 8) and batch.targets is None
    assert batch.masks.data_ptr() in {address for _, stream, address in streams.calls("use")}


def test_of_masks_the_part_is_uploaded_that_the_images_show(made_with_masks):
    batches, batch_plan = made_with_masks(1)
    parts = gpu_batches.upload_parts(batches.samples, batch_plan, np.array([0, 48]), np.array([False, True]))
    regions, values = parts["mask_regions"], parts["mask_bytes"]
    assert regions["offset"].tolist() == [0, 16] and parts["regions"]["offset"].tolist() == [0, 48]
    assert parts["regions"]["planes"].tolist() == [0, 1] and not regions["planes"].any()
    assert (regions["rows"] == 4).all() and regions["height"].tolist() == [40, 40] and values.size == 32
    for b, (top, left) in enumerate([(3, 5), (36, 1)]):
        expected = batch_plan.masks[b][top : top + 4, left : left + 4]
        np.testing.assert_array_equal(values[16 * b : 16 * b + 16].reshape(4, 4), expected)


def test_pixels_are_kept_until_their_kernels_are_through(streams, made_on):
    batches, make = made_on(3)
    regions = two_regions()
    alive = weakref.ref(regions)
    first = make(regions)
    del regions
    second = make()
    gc.collect()
    assert alive() is not None
    streams.happened.add(first.event)
    make()
    gc.collect()
    assert alive() is None
    assert streams.calls("synchronize") == [("synchronize", first.event)]  # which has happened: no wait
    make()
    assert streams.calls("synchronize")[1:] == []
    make()
    assert streams.calls("synchronize")[1:] == [("synchronize", second.event)]  # the one three batches back


def test_a_consumer_that_runs_ahead_is_waited_for_by_the_worker(streams, made_on):
    batches, make = made_on(2)

    def take():
        made = make()
        streams.happened.add(made.event)
        del streams.log[:]
        batches.hand_over(made)
        (consumed,) = [event for _, stream, event in streams.calls("record") if stream is streams.consumer]
        assert streams.calls("synchronize") == [] and consumed.blocking
        # The end of the batch before is recorded.
        assert [entry[0] for entry in streams.log][:2] == ["record", "wait"]
        return consumed

    first, second = take(), take()
    waited = [event for _, event in streams.calls("synchronize")]
    assert waited == []
    make()
    waited = [event for _, event in streams.calls("synchronize")]
    assert first in waited and second not in waited


def test_threads_decode_the_next_batch_while_one_region_of_this_one_takes_long(made_on, photos, monkeypatch):
    """Of progressive JPEGs, which are left to Pillow."""
    batches, make = made_on(3)
    files = [np.frombuffer(file, np.uint8) for file in small_photos(photos, progressive=True)]
    places = np.array([(file.ctypes.data, file.size) for file in files])
    sides, planes = np.zeros(8, np.int64), np.zeros(8, bool)
    samples = SimpleNamespace(
        image=files.__getitem__,
        image_addresses=lambda ids: places[ids].T,
        heights=sides,
        widths=sides,
        stored_as_planes=planes,
    )
    monkeypatch.setattr(batches, "decoder", decoder := Decoder(samples, threads=2))
    with_pillow, released, decoded = decoder._with_pillow, threading.Event(), []

    def slow_for_one(sample_id, *arguments):
        if sample_id == 3:
            assert released.wait(60), "the other thread waits for this one"
        pixels = with_pillow(sample_id, *arguments)
        decoded.append(int(sample_id))
        if sample_id == 6:
            released.set()
        return pixels

    monkeypatch.setattr(decoder, "_with_pillow", slow_for_one)
    starts, shapes = np.zeros((2, 2), int), np.full((2, 2), 4)
    plans = [
        dataclasses.replace(make.plan, ids=np.array(ids), starts=starts, shapes=shapes) for ids in ([3, 5], [2, 6])
    ]
    under_way = [batches.start(batch_plan) for batch_plan in plans]
    assert [batches.finish(batch).sample_ids.tolist() for batch in under_way] == [[3, 5], [2, 6]]
    assert decoded == [5, 2, 6, 3]
    decoder.close()


def test_the_worker_thread_keeps_no_batches_alive(made_on):
    """Else a loader that is dropped, not closed, would stay with its threads and memory."""
    batches, make = made_on(2)
    batches._worker.submit(make).result()
    alive = weakref.ref(batches)
    del batches, make
    gc.collect()
    assert alive() is None


# --- DALI's graph


def parsed(data: bytes) -> list:
    """A serialised protobuf message without its schema: [(field number, number, bytes or nested message), ...].
    ValueError where it is none."""
    fields, position = [], 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data):
                raise ValueError("cut off")
            byte, position = data[position], position + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if key < 8 or (size is None and key & 7 != 2):
            raise ValueError(f"no field {key >> 3} of type {key & 7}")
        if size == 0:
            fields.append((key >> 3, varint()))
            continue
        size = varint() if size is None else size
        part, position = data[position : position + size], position + size
        if len(part) < size:
            raise ValueError("cut off")
        # Strings are left alone: some could be read as messages too.
        if key & 7 == 2 and part and not part.decode("latin1").isprintable():
            try:
                part = parsed(part)
            except ValueError:
                pass
        fields.append((key >> 3, part))
    return fields


def differences(a, b, path=()) -> list:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = []
        for i, ((field_a, value_a), (field_b, value_b)) in enumerate(zip(a, b, strict=True)):
            pairs += differences(value_a, value_b, (*path, i)) if field_a == field_b else [(path, field_a, field_b)]
        return pairs
    return [] if a == b else [(path, a, b)]


def test_the_graph_for_nvjpeg_is_the_cpus_but_for_one_argument():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    options = dict(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    graphs = {way: parsed(decode_graph(way, **options).serialize()) for way in ("cpu", "mixed")}
    flat = repr(graphs["mixed"])
    for word in ("hw_decoder_load", "adjust_orientation", "axis_names", "ImageSlice", "no_copy"):
        assert word in flat, word
    values = [(a, b) for _, a, b in differences(graphs["cpu"], graphs["mixed"])]
    # The operator's `device`, and what it makes of the place of its own output.
    assert values.count((b"cpu", b"mixed")) == 1 and set(values) <= {(b"cpu", b"mixed"), (b"cpu", b"gpu")}, values
    # The comparison notices an argument.
    assert differences(graphs["cpu"], parsed(decode_graph("cpu", 0.9, **options).serialize()))


def test_regions_are_decoded_from_where_the_jpegs_lie(small_beton, monkeypatch):
    """What `Decoder` does for nvJPEG, by the CPU's half of DALI: the pixels are Pillow's, and what they are made from
    lives as long as they do."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    def on_the_cpu(device, device_id, **options):
        assert device == "mixed" and device_id == 3
        graph = decode_graph("cpu", device_id=None, **options)
        return SimpleNamespace(build=graph.build, run=lambda stream, **inputs: graph.run(**inputs))

    monkeypatch.setattr(nvjpeg, "decode_graph", on_the_cpu)
    decoder = NvjpegDecoder(samples := Samples(small_beton), 8, 2, SimpleNamespace(index=3, type="cpu"))
    ids = np.array([2, 0, 7])
    starts, shapes = np.array([[1, 2], [0, 0], [9, 5]]), np.array([[10, 12], [30, 31], [1, 1]])
    events = []
    stream = SimpleNamespace(record_event=lambda: events.append("decoded") or events)
    started = decoder.start(ids, starts, shapes, stream)
    assert events == ["decoded"]  # before the stream gets work of the next batch
    pixels, event = started()
    assert event is events and events == ["decoded"] and len(pixels) == 3
    for region, i, (top, left), (height, width) in zip(pixels, ids, starts, shapes, strict=True):
        with Image.open(io.BytesIO(samples.image(i))) as image:
            whole = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(np.asarray(region), whole[top : top + height, left : left + width])
    assert all(np.may_share_memory(jpeg, samples.image(i)) for jpeg, i in zip(pixels.memory[1], ids, strict=True))
    graph = decode_graph("cpu", batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    fed = samples.image(0).copy()
    graph.feed_input("jpegs", [fed])
    graph.feed_input("starts", np.zeros((1, 2), np.int32))
    graph.feed_input("shapes", np.full((1, 2), 8, np.int32))
    fed[:] = 0  # which a copy would not show
    with pytest.raises(RuntimeError):
        graph.run()
    decoder.close()


@pytest.mark.parametrize("all_planes", [True, False], ids=["planes", "both"])
def test_regions_of_planes_are_the_files_bytes(photos, beton_of_planes, tmp_path, all_planes):
    path = beton_of_planes
    if all_planes:
        path = write(tmp_path / "all.beton", small_photos(photos), store="yuv420")
    samples, ids = Samples(path), np.array([5, 2, 0, 5])
    starts, stops = np.array([[3, 4], [0, 0], [1, 7], [0, 0]]), np.array([[20, 21], [9, 8], [2, 8], [42, 55]])
    decoder = Decoder(samples, 2)
    regions = decoder(ids, starts, stops - starts)
    assert (regions.plane_bytes > 0).tolist() == [True, all_planes, True, True] and len(regions) == 4
    span, offsets = regions.span()
    whole = np.asarray(span)
    for b, i in enumerate(ids):
        if samples.stored_as_planes[i]:
            expected = yuv_planes.cut(samples.planes(i), tuple(starts[b]), tuple(stops[b]))
        else:
            with Image.open(io.BytesIO(samples.image(i))) as image:
                expected = np.asarray(image.convert("RGB"))[starts[b, 0] : stops[b, 0], starts[b, 1] : stops[b, 1]]
        np.testing.assert_array_equal(np.asarray(regions[b]), expected)
        np.testing.assert_array_equal(whole[offsets[b] :][: expected.size], expected.ravel())
    assert offsets[-1] + regions.plane_bytes[-1] == whole.size == np.asarray(regions[3]).size + offsets[3]
    decoder.close()


# --- settings


def planner_of(path: Path) -> Planner:
    crops = Crops((8, 8), RECIPE)
    return Planner(Samples(path), Share(2), crops, Targets(grid=(2, 2)), seed=0, train=True)


@pytest.mark.parametrize("way", ["mixed", "hybrid"])
def test_nvjpeg_is_refused_for_planes(beton_of_planes, way):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoding = Decoding(torch.device("cuda"), way)
    message = rf"decode='{way}'.*sample 0 \(image-0.jpg\) of .*planes.beton is stored as YUV.*use decode='cpu'"
    with pytest.raises(InputError, match=message):
        gpu_batches.open_decoder(planner_of(beton_of_planes), torch.device("cuda"), decoding, choice.call)


def test_auto_is_the_cpu_for_planes_and_measured_for_jpegs(beton_of_planes, small_beton):
    device = torch.device("cuda")
    for path, kind in ((beton_of_planes, Decoder), (small_beton, choice.AutoDecoder)):
        decoder = gpu_batches.open_decoder(planner_of(path), device, Decoding(device), choice.call)
        assert type(decoder) is kind
        decoder.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_device_is_refused_by_name(small_beton):
    with pytest.raises(ValueError, match="0 CUDA devices.*device='cpu'"):
        Loader(small_beton, 2, device="cuda")


@pytest.mark.parametrize("way", ["mixed", "hybrid"])
def test_nvjpeg_without_dali_is_refused_at_once(small_beton, monkeypatch, way):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    nvjpeg.graph_definition.cache_clear()
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        Loader(small_beton, 2, device="cuda", decode=way)


def test_a_share_of_nvjpeg_must_be_one_and_needs_hybrid():
    cuda = torch.device("cuda")
    for way, share in (("cpu", 0.5), ("hybrid", 1.5), ("hybrid", float("nan"))):
        with pytest.raises(ValueError, match="hybrid_share must be in 0..1, with decode='hybrid' alone"):
            Decoding(cuda, way, share)
    with pytest.raises(ValueError, match="'hybrid' .nvJPEG. with device='cuda' alone"):
        Decoding(torch.device("cpu"), "hybrid")


@pytest.mark.parametrize("load", [-0.1, 1.5, float("nan")])
def test_the_jpeg_engines_share_must_be_one(small_beton, load):
    with pytest.raises(ValueError, match="hw_decoder_load must be in 0..1"):
        Loader(small_beton, 2, hw_decoder_load=load)


# --- on a GPU


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
try:
    import nvidia.dali  # noqa: F401

    HAS_DALI = True
except ImportError:
    HAS_DALI = False
WAYS = [
    pytest.param("cpu", marks=gpu),
    pytest.param("mixed", marks=[*gpu, pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")]),
]


@pytest.fixture(scope="module")
def photo_beton(photos, tmp_path_factory):
    """48 photos with label maps of 100 classes, 9 x 9 cells, k = 5."""
    images = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:48]]
    return write(tmp_path_factory.mktemp("photos") / "photos.beton", images, spec=MapSpec(5, 9, 9, 100))


@pytest.fixture(params=WAYS)
def way(request):
    """A way to decode, as `Loader` takes it."""
    return request.param


SETTINGS = {
    "crop+flip": {},
    "recipe": {"augment": RECIPE},
    "validation": {"train": False},
    "published": {"geometry": "published"},
    "rectangle": {"augment": RECIPE, "image_size": (96, 160), "grid": (6, 10)},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_batches_are_those_of_the_cpu_loader(photo_beton, way, setting):
    """CPU decode: the same pixels go in, so a level at most, but for operations that multiply a level's difference.
    nvJPEG upsamples chroma otherwise and its inverse DCT rounds otherwise: 2 levels on average and 99 % within 16."""
    options = dict(image_size=112, grid=7, seed=3) | setting
    with (
        Loader(photo_beton, 12, **options) as ours,
        Loader(photo_beton, 12, device="cuda", decode=way, **options) as theirs,
    ):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert b.images.is_cuda and b.images.dtype == torch.uint8 and b.labels.is_cuda
            for field in ("labels", "sample_ids", "erase", "noise"):
                mine, other = getattr(a, field), getattr(b, field)
                assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other.cpu())), field
            off = (a.images.int() - b.images.cpu().int()).abs()
            if way == "mixed":
                mean, share = (6, 0.1) if "augment" in setting else (2, 0.01)
                assert off.float().mean() < mean and (off > 16).float().mean() < share
            else:
                assert (off > 1).float().mean() < (0.02 if "augment" in setting else 1e-3), off.max()
            assert (a.targets is None) == (b.targets is None)
            if a.targets is not None:
                torch.testing.assert_close(b.targets.cpu(), a.targets, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "setting", [{}, {"augment": RECIPE}, {"train": False}], ids=["crop+flip", "recipe", "validation"]
)
def test_batches_of_planes_are_those_of_the_cpu_loader(photos, tmp_path, setting):
    files = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:48]]
    beton = write(tmp_path / "planes.beton", files, as_planes=[n % 4 != 2 for n in range(48)], short_side=256)
    options = dict(image_size=112, seed=3, check=True) | setting
    with Loader(beton, 12, **options) as ours, Loader(beton, 12, device="cuda", **options) as theirs:
        assert theirs.decode == "cpu"
        for a, b in zip(ours, theirs, strict=True):
            off = (a.images.int() - b.images.cpu().int()).abs()
            assert (off > 1).float().mean() < (0.02 if "augment" in setting else 1e-3), off.max()
            assert torch.equal(a.labels, b.labels.cpu())


def test_a_thousand_batches_keep_memory_flat(photo_beton, way):
    with Loader(photo_beton, 12, image_size=64, grid=4, augment=RECIPE, device="cuda", decode=way) as loader:
        used, steps, epoch = [], 0, 0
        total = torch.zeros((), device="cuda")
        while steps < 1000:
            loader.set_epoch(epoch := epoch + 1)
            for batch in loader:
                total += batch.targets.sum() + batch.images.float().mean()
                steps += 1
                if steps % 100 == 0:
                    torch.cuda.synchronize()
                    free, whole = torch.cuda.mem_get_info()
                    used.append((whole - free) / 2**20)
        assert torch.isfinite(total)
    assert max(used[3:]) - used[2] <= 64, used  # MiB; allocators settle in the first hundreds


def test_batches_belong_to_their_consumer(photo_beton, way):
    """What was handed out is never written again, and the stream that takes a batch finds it whole without waiting on
    the host."""
    with Loader(photo_beton, 12, image_size=64, grid=4, device="cuda", decode=way) as loader:
        held = [(batch, batch.images.clone(), batch.targets.clone()) for batch in loader]
        loader.set_epoch(1)
        for _ in loader:
            pass
        torch.cuda.synchronize()
        assert all(
            torch.equal(batch.images, images) and torch.equal(batch.targets, targets) for batch, images, targets in held
        )
        loader.set_epoch(0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            again = [batch.images.clone() for batch in loader]
        side.synchronize()
        assert all(torch.equal(images, copy) for (_, images, _), copy in zip(held, again, strict=True))


def test_an_epoch_synchronises_nothing(photo_beton, way):
    with Loader(photo_beton, 12, image_size=64, grid=4, augment=RECIPE, device="cuda", decode=way) as loader:
        total = torch.zeros((), device="cuda")
        for batch in loader:  # compiles
            total += batch.targets.sum()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for epoch in (1, 2):
                loader.set_epoch(epoch)
                for batch in loader:
                    total += batch.targets.sum()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(total)


def test_a_captured_graph_consumes_batches(photo_beton, way):
    """Captured while the loader's threads work, as `torch.compile(mode="reduce-overhead")` does; a replay reads each
    batch from a place of its own."""
    with Loader(photo_beton, 12, image_size=64, grid=4, device="cuda", decode=way) as loader:
        eager = [(batch.images.float().mean((2, 3)), batch.targets.sum(1)) for batch in loader]
        replayed, graph, inputs, outputs = [], torch.cuda.CUDAGraph(), None, None
        for batch in loader:
            if inputs is None:
                inputs = batch.images.clone(), batch.targets.clone()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    outputs = inputs[0].float().mean((2, 3)), inputs[1].sum(1)
            for static, values in zip(inputs, (batch.images, batch.targets), strict=True):
                static.copy_(values)
            graph.replay()
            replayed.append([output.clone() for output in outputs])
        for mine, theirs in zip(replayed, eager, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)


def test_memory_is_bounded_however_far_the_host_runs_ahead(photo_beton, way):
    """Every batch occupies its consumer for some 20 ms of GPU time, which the host does not wait for."""
    with Loader(photo_beton, 12, image_size=224, grid=14, device="cuda", decode=way) as loader:
        for batch in loader:
            pass
        one = batch.images.nbytes + batch.targets.nbytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for epoch in range(1, 21):
            loader.set_epoch(epoch)
            for batch in loader:
                torch.cuda._sleep(40_000_000)
                batch.images.float().mean()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.synchronize()
        assert peak < 40 * one, (peak, one)  # for 80 batches; those under way take scratch memory and pixels besides


def test_leaving_early_and_damaged_maps(photo_beton, way, tmp_path):
    damaged = with_damaged_map(photo_beton, tmp_path / "damaged.beton", 7)
    with Loader(damaged, 12, image_size=32, grid=2, device="cuda", decode=way) as loader:
        for _ in range(2):
            with pytest.raises(BetonError, match=r"damaged.beton.*image-7.jpg"):
                list(loader)
        assert loader.batch(np.array([0, 1])).targets.isfinite().all()
    with Loader(photo_beton, 12, image_size=32, grid=2, device="cuda", decode=way) as loader:
        whole = [batch.sample_ids.tolist() for batch in loader]
        for _ in range(20):
            for _batch in loader:
                break
        assert [batch.sample_ids.tolist() for batch in loader] == whole
    gc.collect()


@pytest.mark.parametrize("decode_way", WAYS)
def test_a_damaged_jpeg_is_named(photo_beton, decode_way, tmp_path):
    data = bytearray(photo_beton.read_bytes())
    with BetonReader(photo_beton) as reader:
        picture = bytes(reader.image(11))
    offset = bytes(data).index(picture)
    data[offset : offset + 64] = bytes(64)
    (tmp_path / "damaged.beton").write_bytes(data)
    with Loader(tmp_path / "damaged.beton", 12, image_size=32, grid=2, device="cuda", decode=decode_way) as loader:
        for _ in range(2):
            with pytest.raises(DecodeError, match=r"sample 11 \(image-11.jpg\)"):
                list(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_says_what_it_took(photo_beton, capfd, monkeypatch):
    monkeypatch.setattr(choice, "WARM_UP", 1)
    monkeypatch.setattr(choice, "MEASURED", 2)
    with Loader(photo_beton, 12, image_size=32, grid=2, device="cuda") as loader:
        assert loader.decode == "auto" and len(list(loader)) == 4
        assert loader.decode in (("cpu", "mixed") if HAS_DALI else ("cpu",))
        assert f"decode {loader.decode!r}" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_hybrid_decodes_each_sample_always_in_the_same_way(photo_beton):
    options = dict(image_size=64, grid=4, device="cuda")
    with (
        Loader(photo_beton, 12, decode="cpu", **options) as cpu,
        Loader(photo_beton, 12, decode="hybrid", hybrid_share=0.5, **options) as hybrid,
    ):
        for a, b in zip(cpu, hybrid, strict=True):
            off = (a.images.int() - b.images.int()).abs().float()
            by_nvjpeg = torch.from_numpy(choice.chosen(a.sample_ids.cpu().numpy(), 0.5)).cuda()
            assert 0 < by_nvjpeg.sum() < 12 and off[~by_nvjpeg].max() == 0 and off[by_nvjpeg].mean() < 2


@pytest.mark.parametrize(
    "setting",
    [{"augment": RECIPE}, {"order": "grouped", "rank": 1, "world_size": 2}, {"train": False}],
    ids=["recipe", "grouped", "validation"],
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_resident_batches_are_those_from_the_file(photos, tmp_path, device, setting):
    images = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:48]]
    path = write(tmp_path / "planes.beton", images, spec=MapSpec(5, 9, 9, 100), store="yuv420", short_side=160)
    options = dict(image_size=112, grid=7, seed=3, device=device, check=True) | setting
    with Loader(path, 8, **options) as from_file, Loader(path, 8, resident=True, **options) as resident:
        assert resident.decode == "resident" and len(from_file) == len(resident)
        for a, b in zip(from_file, resident, strict=True):
            for field in dataclasses.fields(a):
                mine, other = getattr(a, field.name), getattr(b, field.name)
                assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other)), field.name
