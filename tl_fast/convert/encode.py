"""One sample of a source, read, checked and encoded for a beton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from tl_fast.beton.layout import BetonError
from tl_fast.convert.data_file import Encoded
from tl_fast.convert.options import EncodeOptions
from tl_fast.labelmaps.format import MapSpec
from tl_fast.labelmaps.format import encode as encode_map
from tl_fast.sources.rejects import FATAL
from tl_fast.sources.source import SourceChanged
from tl_fast.system.crc import crc32


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One input of `write_beton`. `image()` returns the image file's bytes, `label_map()` the label map's packed
    record; workers call both.

    source_id: unique in the data set, kept in the file. label: -1 for an unlabelled sample, which counts as bad.
    origin: what error messages call the sample (a path, an archive member), by default the id. stamp: changes when the
    input does (file size and time), so that a resumed run can tell.
    """

    source_id: str
    label: int
    image: Callable[[], bytes]
    label_map: Callable[[], np.void] | None = None
    origin: str = ""
    stamp: str = ""

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


def encode(sample: Sample, spec: MapSpec | None, options: EncodeOptions) -> Encoded | Exception:
    """Read, check and encode one sample. A bad sample's exception is returned; what is no fault of the sample is
    raised.
    """
    from tl_fast.convert.image import prepare  # here, since reading a beton needs no image library
    from tl_fast.convert.lossless import TurboJpegMissing

    try:
        sample.source_id.encode("utf-8")  # file names may be any bytes
        image = prepare(
            sample.image(),
            max_resolution=options.max_resolution,
            quality=options.quality,
            decode_check=options.decode_check,
            row_index=options.row_index,
            exif=options.exif,
        )
        crc, data, score_min, score_step = image.crc, b"", 0.0, 0.0
        if sample.label < 0:
            raise ValueError("has no label")
        if spec is not None:
            if sample.label_map is None:
                raise ValueError("has no label map")
            record = sample.label_map()
            data = encode_map(record, spec)
            score_min, score_step = float(record["score_min"]), float(record["score_step"])
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
    return Encoded(image, data, score_min, score_step, crc)


def compile_kernels(spec: MapSpec | None) -> None:
    """`tl_fast.convert.image.compile_kernels`, and those for label maps."""
    from tl_fast.convert.image import compile_kernels

    compile_kernels()
    if spec is not None:
        encode_map(np.zeros((), spec.dtype)[()], spec)
