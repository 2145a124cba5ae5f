"""The CUDA kernels: tests/cuda_cases.py in numba's simulator, and, where there is a GPU, on it and at real sizes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tl_fast.kernels.cuda_device import SIMULATED

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or SIMULATED, reason="no CUDA device (the simulator runs the same cases, smaller)"
)


def run_cases(environment: dict[str, str], *arguments: str) -> None:
    cases = str(ROOT / "tests" / "cuda_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout


# Of the cases those that take a second or two: targets from arrays, geometry, planes, masks, and what is refused.
QUICK = "negative_scores or flipped_crops or class_beyond or masks or libjpegs_pixels"


@pytest.mark.parametrize("cases", [QUICK, pytest.param(f"not ({QUICK})", marks=pytest.mark.slow)], ids=["few", "rest"])
@pytest.mark.timeout(900)
def test_kernels_in_the_simulator(cases):
    """In a process of its own, for NUMBA_ENABLE_CUDASIM counts when numba is imported: on small odd shapes, against
    the njit kernels."""
    run_cases({"NUMBA_ENABLE_CUDASIM": "1"}, "-k", cases)


def test_importing_needs_no_gpu():
    script = "import tl_fast.kernels.cuda, tl_fast.kernels.cuda_device as d; assert not d.SIMULATED"
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


@pytest.mark.gpu
@no_gpu
def test_kernels_on_the_gpu():
    """The same cases, compiled."""
    run_cases({})


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [1000, 21841])
def test_targets_at_real_sizes(num_classes, dtype):
    """A batch of boxes and one of rotated crops, into poisoned torch tensors, twice: every row is written, and sums
    repeat bit for bit."""
    from tests import cuda_cases
    from tl_fast.kernels import cpu, cuda
    from tl_fast.kernels.targets.crops import affines_of_crops
    from tl_fast.labelmaps import format as labelmap

    rng = np.random.default_rng(0)
    batch, grid = 64 if num_classes == 1000 else 4, 14
    spec = labelmap.MapSpec(k=5, height=18, width=18, num_classes=num_classes)
    classes = rng.integers(0, num_classes // 5, (batch, 5, 18, 18)) * 5 + np.arange(5)[:, None, None]
    records = [labelmap.pack(c, rng.normal(3, 3, spec.shape), spec) for c in classes]
    encoded = [labelmap.encode(record, spec) for record in records]
    scores = np.stack(
        [labelmap.dequantise(record["scores"], record["score_min"], record["score_step"]) for record in records]
    )
    ends = np.cumsum([0] + [len(data) for data in encoded])
    bounds = np.stack([ends[:-1], ends[1:]], axis=1)
    ranges = np.array([(record["score_min"], record["score_step"]) for record in records], np.float32)
    boxes = np.concatenate([rng.uniform(0, 0.4, (batch, 2)), rng.uniform(0.1, 0.6, (batch, 2))], 1).astype(np.float32)
    for affines in (affines_of_crops(boxes, rng.random(batch) < 0.5), cuda_cases.rotated(rng, batch)):
        expected = cpu.warped_targets(classes.astype(np.uint16), scores, affines, num_classes, grid, 0.1)
        data = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8).cuda()
        results = []
        for _ in range(2):
            out = torch.full(expected.shape, torch.nan, dtype=dtype, device="cuda")
            errors = torch.zeros(batch, dtype=torch.int32, device="cuda")
            torch.cuda.synchronize()
            arrays = [data, *(torch.from_numpy(array).cuda() for array in (bounds, ranges, affines))]
            cuda.packed_targets(
                *arrays, spec, grid, 0.1, True, out, errors, stream=torch.cuda.current_stream().cuda_stream
            )
            torch.cuda.synchronize()
            assert not errors.any()
            results.append(out)
        assert torch.equal(*results)
        off = np.abs(results[0].float().cpu().numpy() - expected)
        # A point within rounding of the map's edge may fall on either side of it, where crops are cut there.
        assert np.quantile(off.max(axis=2), 0.999) <= (2e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
def test_images_at_real_sizes(photos, dtype):
    """The full recipe on photos, 224 pixels, on a stream of its own; normalised channels-last."""
    from PIL import Image

    from tests import cuda_cases
    from tl_fast.kernels import cuda
    from tl_fast.maths import scalar
    from tl_fast.plan import records as plan

    images = [np.array(Image.open(file).convert("RGB")) for file in sorted(photos.glob("*/*/*.jpg"))[::4]]
    heights, widths = (np.array([image.shape[n] for image in images]) for n in (0, 1))
    augment = plan.Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random")
    plans = plan.draw(5, 1, np.arange(len(images)), heights, widths, augment)
    # Equalize and AutoContrast make many levels of one.
    plans["ops"][np.isin(plans["ops"], (scalar.EQUALIZE, scalar.AUTO_CONTRAST))] = scalar.INVERT
    pixels, regions, expected = cuda_cases.make_batch(images, plans, 224)
    options = {} if dtype == torch.uint8 else {"mean": cuda_cases.MEAN, "std": cuda_cases.STD}
    out = torch.full(expected.shape, 99, dtype=dtype, device="cuda")
    out = out if dtype == torch.uint8 else out.to(memory_format=torch.channels_last)
    scratch = torch.empty(cuda.scratch_bytes(len(images), 224, 224, bool(options)), dtype=torch.uint8, device="cuda")
    arrays = [torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).cuda() for array in (pixels, regions, plans)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    cuda.augment(*arrays, cuda_cases.FILL, out, scratch=scratch, stream=stream.cuda_stream, **options)
    stream.synchronize()
    if options:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cuda_cases.MEAN, cuda_cases.STD))
        out = ((out.float().cpu() * std + mean) * 255).round()
    off = np.abs(out.cpu().numpy().astype(int) - expected)
    assert (off > 3).mean() < 5e-3 and (off > (0 if dtype == torch.uint8 else 1)).mean() < 0.1


@pytest.mark.gpu
@no_gpu
def test_planes_at_real_sizes(photos):
    """Crops of photos, mirrored or rotated, bilinear and bicubic: as from the RGB that libjpeg makes of the planes."""
    from PIL import Image

    from tests import cuda_cases, yuv_planes
    from tl_fast.plan import records as plan

    images = [np.array(Image.open(file).convert("RGB")) for file in sorted(photos.glob("*/*/*.jpg"))[::4]]
    heights, widths = (np.array([image.shape[n] for image in images]) for n in (0, 1))
    plans = plan.draw(5, 1, np.arange(len(images)), heights, widths, plan.Augment(interpolation="random"))
    plans[::4] = cuda_cases.affine_plans(1, (10, 20, 180, 150), 1, [("Rotate", 17.0)])
    cuda_cases.check_planes([yuv_planes.planes_of(image) for image in images], plans, 224)


@pytest.mark.gpu
@no_gpu
def test_segmentation_at_real_sizes(photos):
    """Crops of 512 pixels with distorted colours and their masks, whose indices are the CPU's."""
    from PIL import Image

    from tests import cuda_cases
    from tl_fast.kernels import cuda
    from tl_fast.plan.segment import SegmentAugment
    from tl_fast.plan.segment_records import draw_segment

    size = (512, 512)
    images = [np.array(Image.open(file).convert("RGB")) for file in sorted(photos.glob("*/*/*.jpg"))[::8]]
    masks = [image[:, :, 1] // 2 for image in images]
    heights, widths = (np.array([image.shape[n] for image in images]) for n in (0, 1))
    plans = draw_segment(5, 1, np.arange(len(images)), heights, widths, SegmentAugment(), size)
    pixels, regions, expected = cuda_cases.make_batch(images, plans, size)
    off = np.abs(cuda_cases.augmented(pixels, regions, plans, size).astype(int) - expected)
    assert (off > 3).mean() < 5e-3 and (off > 0).mean() < 0.1
    labels, regions, expected, expected_images = cuda_cases.make_masks(masks, plans, size, 255)
    out = torch.full(expected.shape, 77, dtype=torch.uint8, device="cuda")
    shown = torch.full(expected_images.shape, 9, dtype=torch.uint8, device="cuda")
    arrays = [torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).cuda() for array in (labels, regions, plans)]
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream().cuda_stream
    cuda.show_masks(*arrays, 255, cuda_cases.FILL, out, shown, stream=stream)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)
    np.testing.assert_array_equal(shown.cpu().numpy(), expected_images)
    assert 0 < (expected == 255).mean() < 0.9
