"""From decoded crops to training pixels and token targets: one folder an operation, CPU and CUDA side by side.

`tl_fast.kernels.cpu` and `tl_fast.kernels.cuda` are the two faces, `augment` and `token_targets` in both.
"""

__all__: list[str] = []
