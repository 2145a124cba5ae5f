"""benchmarks/gpu_decode.py's contenders, as far as they run without a GPU."""

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


class Files:
    """What a decoder reads, from memory."""

    def __init__(self, files: list[bytes]):
        self.files = [np.frombuffer(file, np.uint8) for file in files]

    def image(self, sample_id: int) -> np.ndarray:
        return self.files[sample_id]


def test_nvimagecodec_decodes_the_regions(monkeypatch, photos):
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_decode = importlib.import_module("gpu_decode")
    files = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:4]]
    decoder = gpu_decode.NvImageCodec(Files(files), 1, torch.device("cpu"), 0.5)
    ids, starts = np.array([2, 0, 3]), np.array([[3, 5], [0, 0], [10, 2]])
    shapes = np.array([[40, 30], [17, 60], [1, 1]])
    for i, start, shape, region in zip(ids, starts, shapes, decoder(ids, starts, shapes), strict=True):
        with Image.open(io.BytesIO(files[i])) as image:
            whole = np.asarray(image.convert("RGB")).astype(int)
        (top, left), (rows, columns) = start, shape
        off = np.abs(np.asarray(region.cpu()) - whole[top : top + rows, left : left + columns])
        assert np.asarray(region.cpu()).shape == (rows, columns, 3) and off.mean() < 3
    damaged = gpu_decode.NvImageCodec(Files([files[0][:200]]), 1, torch.device("cpu"), 0.5)
    with pytest.raises(RuntimeError):
        damaged(np.array([0]), np.zeros((1, 2), int), np.full((1, 2), 4))
    decoder.close()
