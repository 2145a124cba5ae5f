"""One sample of a source, read, checked and encoded for a beton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tl_fast.beton.layout import BetonError
from tl_fast.convert.data_file import Encoded
from tl_fast.convert.options import EncodeOptions
from tl_fast.labelmaps.format import MapSpec
from tl_fast.labelmaps.format import encode as encode_map
from tl_fast.masks.format import MaskSpec, compile_loops
from tl_fast.masks.format import encode as encode_mask
from tl_fast.sources.rejects import FATAL
from tl_fast.sources.source import SourceChanged
from tl_fast.system.crc import crc32

if TYPE_CHECKING:
    from tl_fast.convert.image import Prepared


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One input of `write_beton`. `image()` returns the image file's bytes, `label_map()` the label map's packed
    record, `mask()` the mask, uint8 [H, W]; workers call them.

    source_id: unique in the data set, kept in the file. label: -1 for an unlabelled sample, which counts as bad.
    origin: what error messages call the sample (a path, an archive member), by default the id. stamp: changes when the
    input does (file size and time), so that a resumed run can tell. as_planes: store YUV 4:2:0 planes, or a JPEG; None:
    as the options say.
    """

    source_id: str
    label: int
    image: Callable[[], bytes]
    label_map: Callable[[], np.void] | None = None
    origin: str = ""
    stamp: str = ""
    mask: Callable[[], np.ndarray] | None = None
    as_planes: bool | None = None

    @property
    def name(self) -> str:
        """What error messages call it."""
        return self.origin or self.source_id


class SampleSource(Protocol):
    """What `write_beton` reads from: a list of Samples, or anything with a length that is iterated once.

    A true attribute `decodes_groups` says that reading one image decodes others too (`tl_fast.sources.Source`); such
    samples are read by threads.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


def encode(sample: Sample, spec: MapSpec | None, masks: MaskSpec | None, options: EncodeOptions) -> Encoded | Exception:
    """Read, check and encode one sample. A bad sample's exception is returned; what is no fault of the sample is
    raised.

    spec, masks: of the label maps and the masks; None: the file has none.
    """
    from tl_fast.convert.image import prepare  # here, since reading a beton needs no image library
    from tl_fast.convert.lossless import TurboJpegMissing
    from tl_fast.convert.planes import prepare_planes

    try:
        sample.source_id.encode("utf-8")  # file names may be any bytes
        data = sample.image()
        as_planes = stored_as_planes(sample.as_planes, options)
        image = prepare_planes(data, options) if as_planes else prepare(data, options)
        payloads: list[tuple[bytes, tuple]] = []
        if sample.label < 0:
            raise ValueError("has no label")
        if spec is not None:
            if sample.label_map is None:
                raise ValueError("has no label map")
            record = sample.label_map()
            payloads.append((encode_map(record, spec), (float(record["score_min"]), float(record["score_step"]))))
        if masks is not None:
            if sample.mask is None:
                raise ValueError("has no mask")
            data = encode_mask(fit_mask(sample.mask(), image), masks)
            payloads.append((data, (len(data),)))
        crc = image.crc
        for data, _ in payloads:
            crc = crc32(data, crc)
    except UnicodeEncodeError:
        return ValueError("its name is not UTF-8; rename it")
    except TurboJpegMissing as error:
        raise BetonError(f"{sample.name}: {error}") from error
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, SourceChanged) or isinstance(error, OSError) and error.errno in FATAL:
            raise BetonError(f"{sample.name}: {error}; the sample is not to blame") from error
        return error
    return Encoded(image, tuple(payloads), crc)


def stored_as_planes(as_planes: bool | None, options: EncodeOptions) -> bool:
    """How a sample that says `as_planes` is stored. Raises BetonError where neither it nor the options say how."""
    if as_planes is None and options.store == "auto":
        raise BetonError("store auto needs samples that say `as_planes`; give jpeg or yuv420")
    return options.store == "yuv420" if as_planes is None else as_planes


def fit_mask(mask: np.ndarray, image: Prepared) -> np.ndarray:
    """The mask, uint8 [H, W], of the image that is stored: where that was shrunk, the mask's nearest pixels.

    Raises ValueError for a mask that is not as large as the image was before.
    """
    height, width = image.shrunk_from or (image.height, image.width)
    if mask.shape != (height, width):
        size = "×".join(map(str, mask.shape[::-1]))
        raise ValueError(f"its mask is {size} pixels, the image {width}×{height}; they must be of one size")
    if image.shrunk_from is None:
        return mask
    rows, columns = (
        (2 * np.arange(stored) + 1) * source // (2 * stored)
        for stored, source in ((image.height, height), (image.width, width))
    )
    return mask[rows[:, None], columns]


def compile_kernels(spec: MapSpec | None, masks: MaskSpec | None, options: EncodeOptions) -> None:
    """`tl_fast.convert.image.compile_kernels`, and those for label maps and masks."""
    from tl_fast.convert.image import compile_kernels
    from tl_fast.jpeg.planes_loops import compile_loops as compile_planes

    compile_kernels(row_index=options.row_index, bit_index=options.bit_index)
    compile_planes()
    if spec is not None:
        encode_map(np.zeros((), spec.dtype)[()], spec)
    if masks is not None:
        compile_loops()
