"""A training run: configuration, loop, checkpoints, accuracy."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accuracy": ["evaluate"],
        "config": ["TrainConfig", "parse_config"],
        "loop": ["train"],
        "record": ["read_record"],
        "runlog": ["read_rows"],
        "trained": ["load_model"],
    },
)
