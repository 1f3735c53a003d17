"""Compiles the Triton kernels for a GPU that need not be there, and prints one line for each.

Triton's interpreter lets pass what its compiler does not. A line ends with the number of reads and writes of 16 bytes,
of which an aligned row has at least one for each of its logits' tensors.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_distill.functional.kernels.triton_kernels import KINDS, STRIDES, backward, forward, in_place

TYPES = {"values": "*fp32", "task_values": "*fp32", "statistics": "*fp32", "weights": "*i1", "labels": "*i64"}
TYPES |= {"upstream": "*fp32", "task_upstream": "*fp32"}
TYPES |= dict.fromkeys([*STRIDES, "out_outer", "out_inner"], "i64") | {"inner_rows": "i32"}
EXTRAS = {"weighted": ("weights",), "labelled": ("labels", "task_values", "task_upstream")}


def compiled(kernel: Any, kind: str, dtype: str = "bf16", *extras: str, classes: int = 50304, word: int = 8) -> str:
    """The kernel's code for one H100."""
    settings = {"classes": classes, "kind": KINDS[kind], "lanes": 512, "word": word, "aligned": classes % word == 0}
    settings |= {name: name in extras for name in ("weighted", "labelled", "whole_sum")}
    constants = {name: value for name, value in settings.items() if name in kernel.arg_names}
    for extra, pointers in EXTRAS.items():
        if extra not in extras:
            constants |= {name: None for name in pointers if name in kernel.arg_names}
    types = TYPES | dict.fromkeys(("x", "y", "out"), f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "fp32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if signature[name][0] == "*"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["ptx"]


def main() -> None:
    everything = ("weighted", "labelled", "whole_sum")
    variants = [(in_place, kind, "bf16") for kind in KINDS]
    for kind in ("forward_kl", "jensen_shannon"):
        variants += [(kernel, kind, "fp16", *everything) for kernel in (forward, backward)]
    for kernel, kind, dtype, *extras in variants:
        wide = compiled(kernel, kind, dtype, *extras).count(".v4.b32")
        print(f"{kernel.__name__} {kind} {dtype}: {wide}", flush=True)
    for dtype, classes, word in (("bf16", 50257, 8), ("fp32", 50304, 4)):
        wide = compiled(backward, "forward_kl", dtype, classes=classes, word=word).count(".v4.b32")
        print(f"backward forward_kl {dtype} {classes}: {wide}", flush=True)


if __name__ == "__main__":
    main()
