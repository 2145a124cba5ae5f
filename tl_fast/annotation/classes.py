"""Chooses the classes of the label maps: the annotator's own, or those of the data set among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data import ImageNetInfo, infer_imagenet_subset

from tl_fast.annotation.annotator import AnnotateError, Annotator
from tl_fast.models.token_label import backbone_of
from tl_fast.sources.source import Source


def class_indices(classes: str, names: list[str], annotator: Annotator) -> list[int]:
    """The annotator's class for each class of the data set, `names`.

    classes: "auto" or a JSON file {class name: index or wnid}; see AnnotateConfig. Raises AnnotateError naming the
    class or the file at fault.
    """
    if classes == "auto":
        wanted: dict[str, Any] = {name: name for name in names}
    else:
        try:
            wanted = json.loads(Path(classes).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise AnnotateError(
                f"classes {classes!r} is neither auto nor a JSON file {{class name: index or wnid}}: {error}"
            ) from error
        if not isinstance(wanted, dict) or (lacking := [name for name in names if name not in wanted]):
            missing = f"; {lacking} are missing" if isinstance(wanted, dict) else ""
            raise AnnotateError(f"{classes} must map every class{missing}")
    known = named_classes(annotator)
    indices = []
    for name in names:
        value = wanted[name]
        if isinstance(value, str):
            if value not in known:
                why = (
                    "is not a wnid of the annotator's" if annotator.class_names is None else "is no class of its run's"
                )
                if not known:
                    why = "cannot be looked up: the annotator's classes are no ImageNet list"
                raise AnnotateError(
                    f"class {name!r}: {value!r} {why}; give --classes a JSON file {{class name: index}}, or use "
                    "--fit-head"
                )
            value = known[value]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < annotator.num_classes:
            raise AnnotateError(f"class {name!r}: {value!r} is no class index in 0..{annotator.num_classes - 1}")
        if value in indices:
            raise AnnotateError(
                f"classes {names[indices.index(value)]!r} and {name!r} are both mapped to class {value}; "
                "merge them or use --fit-head"
            )
        indices.append(value)
    return indices


def named_classes(annotator: Annotator) -> dict[str, int]:
    """Class name → index: the names that the weights came with, else wnids for a network with one of timm's ImageNet
    class lists, else empty."""
    if annotator.class_names is not None:
        return {name: index for index, name in enumerate(annotator.class_names)}
    subset = infer_imagenet_subset(backbone_of(annotator.network))
    return {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else {}


def name_classes(images: Source, annotator: Annotator, chosen: bool) -> tuple[list[str] | None, bool]:
    """The label maps' class names, and whether label i of the images is class i of the maps.

    Only then an accuracy makes sense. chosen: the maps are of the images' classes, by `classes` or `fit_head`.
    """
    names = list(named_classes(annotator))
    if images.class_names:
        same = names == images.class_names if names else len(images.class_names) == annotator.num_classes
        if chosen or same:
            return images.class_names, True
    return (names if len(names) == annotator.num_classes else None), False
