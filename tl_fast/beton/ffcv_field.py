"""Our fields for stock ffcv: `ffcv.Loader(file, ..., custom_fields={"label_map": LabelMapField})`, and where images are
stored as planes `"image": PlanesImageField`.

Only this module imports ffcv; tl_fast's own writer and reader do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ffcv.fields.base import ARG_TYPE, Field
from ffcv.fields.rgb_image import (
    CenterCropRGBImageDecoder,
    RandomResizedCropRGBImageDecoder,
    RGBImageField,
    SimpleRGBImageDecoder,
)
from ffcv.libffcv import imdecode, resize_crop
from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import types

from tl_fast.beton.layout import (
    JPEG,
    LABEL_MAP,
    PLANES,
    BetonError,
    image_arguments,
    spec_from_arguments,
    spec_to_arguments,
)
from tl_fast.jpeg.planes_loops import from_rgb, write_rgb
from tl_fast.labelmaps.format import LEVELS, MapSpec, encode, encoded_sizes
from tl_fast.labelmaps.loops import expand

# ffcv 1.0.2 declares the memory it reads from by setting `mutable = False` on numba's own type objects, which are keys
# of every table of compiled functions in the process. Other code that uses these types then fails with "Cannot modify
# readonly array" or KeyError, or its type inference does not end. The code below declares the same by a
# read-only type of its own.
_READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)


def _compile_os_cache_reader(manager: OSCacheManager) -> Callable:
    def read(address, mem_state):
        size = mem_state[2][np.searchsorted(mem_state[1], address)]
        return mem_state[0][address : address + size]

    return Compiler.compile(read, _READ_ONLY(types.uint64, manager.state_type))


OSCacheManager.state_type = property(lambda manager: types.Tuple([_READ_ONLY, *[types.uint64[::1]] * 2]))
OSCacheManager.compile_reader = _compile_os_cache_reader
ProcessCacheManager.state_type = property(
    lambda manager: types.Tuple([types.uint8[:, ::1], *[types.uint64[::1]] * 2, types.uint32[::1]])
)


class LabelMapDecoder(Operation):
    """Decodes to float32 `[B, 2, k, H, W]`, laid out as published maps are.

    `[:, 0]` holds the dequantised scores, `[:, 1]` the classes.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (2, *self.field.spec.shape)
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("<f4"))
        return state, AllocationQuery(shape, np.dtype("<f4"))

    def generate_code(self) -> Callable:
        memory_read, parallel_range = self.memory_read, Compiler.get_iterator()
        spec, sizes, curve = self.field.spec, encoded_sizes(self.field.spec), LEVELS
        cells, num_classes = spec.cells, spec.num_classes

        def decode(batch_indices, destination, metadata, storage_state):
            classes = np.empty((len(batch_indices), cells), np.uint16)
            for row in parallel_range(len(batch_indices)):
                sample = metadata[batch_indices[row]]
                data = memory_read(sample["ptr"], storage_state)
                values = destination[row].reshape(-1)
                if expand(data, num_classes, sizes, classes[row]):
                    values[:] = np.nan  # damaged: stock ffcv has no way to raise; BetonReader and verify do
                    continue
                for i in range(cells):
                    values[i] = curve[data[len(data) - cells + i]] * sample["score_step"] + sample["score_min"]
                    values[cells + i] = classes[row, i]
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class LabelMapField(Field):
    """One packed label map per sample (`tl_fast.labelmaps.format`).

    All maps of a file share one MapSpec, which the field's arguments hold.
    """

    def __init__(self, spec: MapSpec) -> None:
        self.spec = spec

    @property
    def metadata_type(self) -> np.dtype:
        return LABEL_MAP

    @staticmethod
    def from_binary(binary: np.ndarray) -> LabelMapField:
        return LabelMapField(spec_from_arguments(binary))

    def to_binary(self) -> np.ndarray:
        result = np.zeros(1, dtype=ARG_TYPE)[0]
        result[0][:] = spec_to_arguments(self.spec)
        return result

    def encode(self, destination: np.ndarray, record: np.void, malloc: Callable) -> None:
        """For ffcv's own writer: `record` is made by `labelmaps.format.pack` with this field's spec."""
        data = np.frombuffer(encode(record, self.spec), np.uint8)
        destination["ptr"], storage = malloc(data.size)
        storage[:] = data
        destination["score_min"], destination["score_step"] = record["score_min"], record["score_step"]

    def get_decoder_class(self) -> type[Operation]:
        return LabelMapDecoder


def _compile_show() -> Callable:
    """The compiled function that writes an image's RGB pixels, `show(data, mode, height, width, out)`; out: uint8
    [height * width * 3]."""
    decode_jpeg = Compiler.compile(imdecode)

    def show(data, mode, height, width, out):
        if mode == JPEG:
            decode_jpeg(data, out, height, width, height, width, 0, 0, 1, 1, False, False)
        elif len(data) != height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2):
            out[:] = 0  # damaged: stock ffcv has no way to raise; BetonReader and verify do
        else:
            write_rgb(data, height, width, out)

    return Compiler.compile(show)


class PlanesImageDecoder(SimpleRGBImageDecoder):
    """Whole images, uint8 [B, H, W, 3], of a file in which all are of one size."""

    def generate_code(self) -> Callable:
        memory_read, parallel_range, show = self.memory_read, Compiler.get_iterator(), _compile_show()

        def decode(batch_indices, destination, metadata, storage_state):
            for row in parallel_range(len(batch_indices)):
                sample = metadata[batch_indices[row]]
                data = memory_read(sample["data_ptr"], storage_state)
                height, width = np.int64(sample["height"]), np.int64(sample["width"])
                show(data, sample["mode"], height, width, destination[row].reshape(-1))
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class _ResizedCrop(PlanesImageDecoder):
    """A crop of each image, drawn and resized as ffcv's decoder of the same name does."""

    def generate_code(self) -> Callable:
        memory_read, parallel_range, show = self.memory_read, Compiler.get_iterator(), _compile_show()
        resize, draw_crop = Compiler.compile(resize_crop), Compiler.compile(self.get_crop_generator)
        scale, ratio = (np.array(value) if isinstance(value, tuple) else value for value in (self.scale, self.ratio))

        def decode(batch_indices, memory, metadata, storage_state):
            destination, images = memory
            for row in parallel_range(len(batch_indices)):
                sample = metadata[batch_indices[row]]
                data = memory_read(sample["data_ptr"], storage_state)
                height, width = np.int64(sample["height"]), np.int64(sample["width"])
                pixels = images[row].reshape(-1)[: 3 * height * width]
                show(data, sample["mode"], height, width, pixels)
                top, left, rows, columns = draw_crop(height, width, scale, ratio)
                image = pixels.reshape(height, width, 3)
                resize(image, top, top + rows, left, left + columns, destination[row])
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class RandomResizedCropPlanesDecoder(_ResizedCrop, RandomResizedCropRGBImageDecoder):
    """ffcv's RandomResizedCropRGBImageDecoder, with the same arguments."""


class CenterCropPlanesDecoder(_ResizedCrop, CenterCropRGBImageDecoder):
    """ffcv's CenterCropRGBImageDecoder, with the same arguments."""


class PlanesImageField(RGBImageField):
    """Images of which each is a JPEG, which ffcv decodes, or YUV 4:2:0 planes, which are shown as libjpeg shows them.

    Its own decoders take the place of ffcv's in pipelines.
    """

    @staticmethod
    def from_binary(binary: np.ndarray) -> PlanesImageField:
        """Raises BetonError for the image field of another file."""
        arguments = np.asarray(binary, np.uint8).reshape(-1)
        if arguments.any() and (arguments != image_arguments()).any():
            raise BetonError("the image field is not tl_fast's; use the class of the program that wrote it")
        return PlanesImageField()

    def to_binary(self) -> np.ndarray:
        result = np.zeros(1, dtype=ARG_TYPE)[0]
        result[0][:] = image_arguments()
        return result

    def encode(self, destination: np.ndarray, image: np.ndarray, malloc: Callable) -> None:
        """For ffcv's own writer: `image` is uint8 [h, w, 3], or a Pillow image, and becomes planes."""
        pixels = np.asarray(image)
        planes = from_rgb(pixels)
        destination["mode"], destination["height"], destination["width"] = PLANES, *pixels.shape[:2]
        destination["data_ptr"], storage = malloc(planes.size)
        storage[:] = planes

    def get_decoder_class(self) -> type[Operation]:
        return PlanesImageDecoder
