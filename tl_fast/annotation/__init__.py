"""The machine annotator, and its run over a data set that makes the label maps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annotator": ["AnnotateError", "Annotator"],
        "weights": ["build_annotator"],
        "run": ["AnnotateConfig", "annotate"],
    },
)
