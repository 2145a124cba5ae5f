"""The `label_map` field for stock ffcv: `ffcv.Loader(file, ..., custom_fields={"label_map": LabelMapField})`.

Only this module imports ffcv; tl_fast's own writer and reader do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
from ffcv.fields.base import ARG_TYPE, Field
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from tl_fast.beton_layout import LABEL_MAP, spec_from_arguments, spec_to_arguments
from tl_fast.kernels import maps
from tl_fast.labelmap import LEVELS, MapSpec, encode, encoded_sizes

# A copy of its own: where the reader has compiled the shared one for other types in the same process, numba's type inference of
# ffcv's pipeline, in which `sizes` is a tuple of literals, does not come to an end.
expand = numba.njit(nogil=True)(maps.expand.py_func)


class LabelMapDecoder(Operation):
    """Decodes to float32 `[B, 2, k, H, W]`, laid out as the published maps are: `[:, 0]` the dequantised scores, `[:, 1]` the classes."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (2, *self.field.spec.shape)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("<f4")), AllocationQuery(shape, np.dtype("<f4"))

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
    """One packed label map per sample (`tl_fast.labelmap`); all maps of a file share one MapSpec, kept in the field's arguments."""

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
        """For ffcv's own writer: `record` is one of `labelmap.pack` with this field's spec."""
        data = np.frombuffer(encode(record, self.spec), np.uint8)
        destination["ptr"], storage = malloc(data.size)
        storage[:] = data
        destination["score_min"], destination["score_step"] = record["score_min"], record["score_step"]

    def get_decoder_class(self) -> type[Operation]:
        return LabelMapDecoder
