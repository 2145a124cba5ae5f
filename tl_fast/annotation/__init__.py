"""The machine annotator, and the run that makes the label maps of a data set with it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annotator": ["AnnotateError", "Annotator"],
        "weights": ["build_annotator"],
        "run": ["AnnotateConfig", "annotate"],
    },
)
