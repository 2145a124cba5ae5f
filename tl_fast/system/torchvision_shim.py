"""Makes torchvision, and so timm, importable where its wheel is a CUDA build and torch is a CPU build.

Import this module before timm.

The torchvision wheels on PyPI are linked against CUDA. Beside a CPU-only torch their operator library cannot be loaded,
nobody declares `torchvision::nms`, and `import torchvision` dies with "operator torchvision::nms does not exist" in its
meta registrations. Declaring the schemas those registrations ask for is enough: transforms and `roi_align`'s Python
fallback then work, while `torchvision.ops.nms` says that its C++ operators are missing. Wherever torchvision's own
library loads, that library is used and nothing is declared.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}


def _missing() -> list[str]:
    """Names of the operators torchvision registers against that nobody has declared yet."""
    return [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]


def _load_own_operators() -> bool:
    """Load torchvision's operator library without importing torchvision; False when there is none that loads."""
    spec = importlib.util.find_spec("torchvision")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))  # torchvision loads the same file again later: that is a no-op
            except OSError:  # a CUDA build: its libcudart, libc10_cuda, ... are absent
                continue
            return True
    return False


def _declare() -> torch.library.Library | None:
    """Declare the missing schemas if torch is a CPU build and torchvision's library does not load.

    Returns the library that owns them, or None.
    """
    if torch.version.cuda or torch.version.hip or not _missing() or _load_own_operators():
        # A GPU build of torch with a torchvision that does not match should fail loudly, in torchvision's words.
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _missing():
        library.define(_SCHEMAS[name])
    return library


_library = _declare()  # the schemas vanish when their Library is collected, so the module keeps it
