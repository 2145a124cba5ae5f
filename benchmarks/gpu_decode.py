"""How many crops/s reach the GPU decoded: by our decoder or DALI's on the CPU, by DALI's nvJPEG, by nvImageCodec alone,
of whole images by torchvision's nvJPEG?

    python benchmarks/gpu_decode.py [--images FOLDER | --beton FILE] [--samples 4096] [--batch 256] [--threads 4 8 16]

All decode what random resized crops to 224 px need, nvJPEG and nvImageCodec with several shares of the images for the
hardware engine; torchvision decodes whole images. Pixels are on the GPU when the clock stops. Rows go to
benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from gpu_rows import add_data, beton_of, need_gpu, parser, without_nvjpeg, write_row

from tl_fast.beton.samples import Samples
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.nvjpeg import NvjpegDecoder, decoded_regions
from tl_fast.plan import records as plan
from tl_fast.plan.order import epoch_order

LOADS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
SIZE = 224


class DaliCpu:
    """DALI's CPU half, and its upload, called as a `Decoder`."""

    def __init__(self, samples: Samples, batch: int, threads: int, device: torch.device):
        from nvidia.dali import pipeline_def

        @pipeline_def(
            batch_size=batch, num_threads=threads, device_id=device.index, prefetch_queue_depth=1, exec_dynamic=True
        )
        def graph() -> Any:
            return decoded_regions("cpu").gpu()

        self.samples, self.graph = samples, graph()
        self.graph.build()

    def __call__(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> Any:
        jpegs = [self.samples.image(i) for i in ids]  # memory of the beton's, which stays
        return self.graph.run(jpegs=jpegs, starts=starts.astype(np.int32), shapes=shapes.astype(np.int32))

    def close(self) -> None:
        self.graph = None


class TorchvisionNvjpeg:
    """torchvision's decode_jpeg on the GPU, of whole images, called as a `Decoder`."""

    def __init__(self, samples: Samples, device: torch.device):
        from torchvision.io import ImageReadMode, decode_jpeg

        self.samples, self.decode = samples, functools.partial(decode_jpeg, mode=ImageReadMode.RGB, device=device)

    def __call__(self, ids: np.ndarray, *_: np.ndarray) -> Any:
        return self.decode([torch.from_numpy(self.samples.image(i).copy()) for i in ids])

    def close(self) -> None:
        pass


class NvImageCodec:
    """nvImageCodec by itself, of the regions alone, called as a `Decoder`. On the CPU its CPU decoder, for the test.

    load: share of the images for the GPU's JPEG engine, 0..1; its cores decode the others.
    """

    def __init__(self, samples: Samples, threads: int, device: torch.device, load: float):
        from nvidia import nvimgcodec

        self.samples, self.codec, self.device = samples, nvimgcodec, device
        kinds = [nvimgcodec.CPU_ONLY]
        if device.type == "cuda":
            kinds = [nvimgcodec.HW_GPU_ONLY] * (load > 0) + [nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU]
        number = device.index if device.type == "cuda" else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        loads = {nvimgcodec.HW_GPU_ONLY: load}
        backends = [nvimgcodec.Backend(kind, load_hint=loads.get(kind, 1.0)) for kind in kinds]
        self.decoder = nvimgcodec.Decoder(device_id=number, max_num_cpu_threads=threads, backends=backends)
        self.params = nvimgcodec.DecodeParams(apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.I_RGB)

    def __call__(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> list:
        streams = []
        for i, start, stop in zip(ids, starts.tolist(), (starts + shapes).tolist(), strict=True):
            view = self.codec.CodeStreamView(region=self.codec.Region(*start, *stop))
            streams.append(self.codec.CodeStream(self.samples.image(i)).get_sub_code_stream(view))
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        images = self.decoder.decode(streams, params=self.params, cuda_stream=stream)
        missing = [int(i) for i, image in zip(ids, images, strict=True) if image is None]
        if missing:
            raise RuntimeError(f"nvImageCodec could not decode samples {missing[:5]}")
        return images

    def close(self) -> None:
        self.decoder = None


def batches(samples: Samples, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random resized crops as training draws them, epoch after epoch: ids, first pixels and shapes, without end."""
    if len(samples) < batch:
        raise ValueError(f"{len(samples)} samples do not fill a batch of {batch}; lower --batch or raise --samples")
    for epoch in itertools.count():
        order = epoch_order(0, epoch, len(samples))
        for first in range(0, len(order) - batch + 1, batch):
            ids = order[first : first + batch]
            heights, widths = samples.heights[ids], samples.widths[ids]
            starts, stops = warp.needed(
                plan.draw(0, epoch, ids, heights, widths, plan.Augment()), heights, widths, SIZE
            )
            yield ids, starts, stops - starts


def rates(decode: Callable, work: Iterator, seconds: float, warm_up: int = 3) -> list[float]:
    """Images/s of batch after batch."""
    values: list[float] = []
    for number, (ids, starts, shapes) in enumerate(work):
        begin = time.perf_counter()
        decode(ids, starts, shapes)
        torch.cuda.synchronize()
        if number >= warm_up:
            values.append(len(ids) / (time.perf_counter() - begin))
        if number == warm_up:
            stop = begin + seconds
        if number > warm_up and time.perf_counter() >= stop:
            return values
    return values


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_data(options)
    options.add_argument("--batch", type=int, default=256)
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=int, nargs="+", default=sorted({min(n, cores) for n in (4, 8, 16)}))
    options.add_argument("--seconds", type=float, default=6, help="of each contender")
    arguments = options.parse_args()
    need_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    with beton_of(arguments) as path:
        if path is None:
            return
        samples = Samples(path)
        mean = round(float(np.mean([len(samples.image(i)) for i in range(min(len(samples), 1000))])))
        facts = {
            "batch": arguments.batch,
            "samples": len(samples),
            "mean_bytes": mean,
            "images": (arguments.beton or arguments.images).name,
        }
        contenders: dict[str, tuple[int | None, Callable]] = {}
        for n in arguments.threads:
            contenders[f"cpu, {n} threads"] = n, functools.partial(Decoder, samples, n, device)
        for n in arguments.threads:
            contenders[f"DALI's cpu half, {n} threads"] = (
                n,
                functools.partial(DaliCpu, samples, arguments.batch, n, device),
            )
            for load in LOADS:
                make = functools.partial(NvjpegDecoder, samples, arguments.batch, n, device, load)
                contenders[f"mixed, {n} threads, hw_decoder_load {load}"] = n, make
        for load in LOADS:
            n = max(arguments.threads)
            make = functools.partial(NvImageCodec, samples, n, device, load)
            contenders[f"nvImageCodec, {n} threads, load of the engine {load}"] = n, make
        contenders["torchvision nvJPEG, whole images"] = None, functools.partial(TorchvisionNvjpeg, samples, device)
        failed, missing = False, without_nvjpeg()
        for name, (threads, make) in contenders.items():
            if name.startswith("mixed") and missing:
                print(f"{name}: skipped: {missing}", flush=True)
                continue
            try:
                with contextlib.closing(make()) as decoder:
                    values = rates(decoder, batches(samples, arguments.batch), arguments.seconds)
            except (ImportError, RuntimeError) as error:
                unable = isinstance(error, ImportError) or name.startswith(
                    "torchvision"
                )  # which may be built without nvJPEG
                print(f"{name}: {'skipped' if unable else 'FAILED'}: {str(error).splitlines()[0]}", flush=True)
                failed |= not unable
                continue
            write_row(arguments.results, "decode", name, values, "images/s", threads=threads, **facts)
    sys.exit(failed)


if __name__ == "__main__":
    main()
