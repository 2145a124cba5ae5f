"""A loader's settings, grouped by who needs them, and checked when they are put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tl_fast.pipeline.nvjpeg import HW_DECODER_LOAD, graph_definition
from tl_fast.pipeline.ways import DECODES, check_hybrid_share
from tl_fast.plan.augment import Augment
from tl_fast.plan.boxes import GEOMETRIES
from tl_fast.plan.order import ORDERS, group_count
from tl_fast.plan.segment import SegmentAugment
from tl_fast.system.mistakes import InputError


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one rank makes.

    batch_size: samples a rank and step, at least 1.
    rank: number of this rank, 0..world_size - 1.
    world_size: number of ranks, at least 1.
    order: of training's samples: "shuffled", or "grouped": a rank keeps to groups of its own
        (`tl_fast.plan.order.grouped_order`).
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    order: str = "shuffled"

    def __post_init__(self) -> None:
        if min(self.batch_size, self.world_size) < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(
                f"batch_size, world_size >= 1 and 0 <= rank < world_size needed, got batch_size={self.batch_size},"
                f" rank={self.rank}, world_size={self.world_size}"
            )
        if self.order not in ORDERS:
            raise InputError(f"order must be one of {ORDERS}, got {self.order!r}")

    @property
    def global_batch(self) -> int:
        """Samples a step of all ranks together."""
        return self.batch_size * self.world_size

    @property
    def groups(self) -> int:
        """Groups that every global batch of training takes equal parts of; 1: the order is free."""
        return group_count(self.global_batch) if self.order == "grouped" else 1


@dataclass(frozen=True)
class Crops:
    """Which part of an image is shown, and how.

    image_size: (height, width) of the output in pixels, at least 1.
    augment: ranges of training's random decisions; its `fill` is the colour outside the image.
    crop_pct: share of the resized image that evaluation keeps, (0, 1]; of no effect in segmentation.
    """

    image_size: tuple[int, int] = (224, 224)
    augment: Augment | SegmentAugment = Augment()
    crop_pct: float = 0.9

    def __post_init__(self) -> None:
        if min(self.image_size) < 1:
            raise InputError(f"image_size must be at least 1 pixel, got image_size={self.image_size}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be in (0, 1], got {self.crop_pct}")

    @property
    def aspect(self) -> float:
        """Width / height of the output."""
        return self.image_size[1] / self.image_size[0]


@dataclass(frozen=True)
class Targets:
    """What token targets are like.

    grid: (rows, columns) of tokens, at least 1.
    smoothing: label smoothing, [0, 1).
    geometry: "correct", or "published" to crop label maps where the published code does.
    dtype: "float32", or "bfloat16" to round them.
    """

    grid: tuple[int, int] = (14, 14)
    smoothing: float = 0.1
    geometry: str = "correct"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise InputError(f"grid must be at least 1 token, got grid={self.grid}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.geometry not in GEOMETRIES:
            raise InputError(f"geometry must be one of {GEOMETRIES}, got {self.geometry!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"targets_dtype must be float32 or bfloat16, got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """Targets of one sample, the class token's included."""
        return 1 + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Decoding:
    """Where batches are made, and how their JPEGs are decoded.

    device: 'cpu' or a CUDA device.
    way: 'cpu', on CUDA devices also 'mixed' (nvJPEG), 'hybrid' (both at once) or 'auto' ('cpu' or 'mixed').
    hybrid_share: of the samples that nvJPEG decodes under 'hybrid', 0..1; None: measured.
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.
    threads: that decode and, on the CPU, run the kernels.
    check: whether every sample's CRC-32 is compared as it is read.
    resident: whether the images lie in the GPU's memory (`tl_fast.pipeline.resident`); "auto": where they fit.

    Raises ImportError for 'mixed' and 'hybrid' without DALI.
    """

    device: torch.device
    way: str = "auto"
    hybrid_share: float | None = None
    hw_decoder_load: float = HW_DECODER_LOAD
    threads: int = 1
    check: bool = False
    resident: bool | str = False

    def __post_init__(self) -> None:
        if self.device.type not in ("cpu", "cuda"):
            raise InputError(f"device must be 'cpu' or a CUDA device, got {str(self.device)!r}")
        needs_gpu = self.way in ("mixed", "hybrid")
        if self.way not in DECODES or (needs_gpu and self.device.type == "cpu"):
            raise InputError(
                f"decode must be one of {DECODES}, 'mixed' and 'hybrid' (nvJPEG) with device='cuda' alone; got "
                f"{self.way!r}, device={str(self.device)!r}"
            )
        if self.resident not in (True, False, "auto"):
            raise InputError(f"resident must be True, False or 'auto', got {self.resident!r}")
        if self.resident is True and self.device.type == "cpu":
            raise InputError("resident=True keeps the images in a GPU's memory: device='cuda' is needed")
        check_hybrid_share(self.hybrid_share, self.way)
        if not 0 <= self.hw_decoder_load <= 1:
            raise InputError(f"hw_decoder_load must be in 0..1, got {self.hw_decoder_load}")
        if needs_gpu:
            graph_definition()  # without DALI an error now, not in a thread when the first batch is made
