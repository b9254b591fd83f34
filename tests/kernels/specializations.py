"""Prints, as a JSON line for each launch, what decides whether Triton compiles a kernel anew; launches nothing.

    python tests/kernels/specializations.py

Not a test module: it runs in a process of its own, because kernels defined under TRITON_INTERPRET=1 have no such key.
The launchers run as they are, on CPU tensors, with every JITFunction's launch replaced by Triton's own reading of its
arguments for sm_90. Hidden sizes 64 (numbers of rows 1 to 4096, and rows that start anywhere in their tensors) and 72.
"""

from __future__ import annotations

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastdpo.kernels import backward, choices, forward
from fastdpo.kernels.launch import Blocks
from fastdpo.types import TOKEN_OUTPUTS

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
ROWS = (1, 2, 15, 16, 17, 300, 4096)
V = 272


def record_launches(about: dict) -> None:
    def run(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialization, options = bind(*args, **kwargs, debug=False)
        name = kernel.__name__ + (" with grads" if kwargs.get("WITH_GRADS") else "")
        print(json.dumps({**about, "kernel": name, "key": f"{specialization} {options}"}), flush=True)

    JITFunction.run = run


def launch_everything(T: int, H: int, first_row: int, tma: bool) -> None:
    """Every launcher, on rows from `first_row` on."""
    blocks = Blocks(128, 128, 64, 8, 3, tma=tma)
    hidden_states = torch.zeros(first_row + T, H, dtype=torch.bfloat16)[first_row:]
    weight = torch.zeros(V, H, dtype=torch.bfloat16)
    labels = torch.zeros(first_row + T, dtype=torch.int64)[first_row:]
    head = (hidden_states, weight, None, labels, 1, 30)  # ints for floats: 1 would be compiled in
    forward.fused_forward(*head, TOKEN_OUTPUTS, blocks, keep_partials=True)
    out = torch.zeros(T, V, dtype=torch.bfloat16)
    forward.fused_forward_with_grads(out, *head, TOKEN_OUTPUTS, blocks)
    lse = torch.zeros(2, first_row + T)[:, first_row:]
    backward.fill_logit_grads(out, hidden_states, weight, None, labels, *lse, lse[0], first_row, 10**6, 1, 30, blocks)
    several = labels[:, None].repeat(1, 1 + first_row)
    choices.choice_forward(hidden_states, weight, None, several, labels, 1, 30, TOKEN_OUTPUTS)
    rows = (several, several.float(), *lse, *lse)
    choices.fill_choice_grads(out, hidden_states, weight, None, *rows, first_row, 1, 30)


if __name__ == "__main__":
    for way in ("tma", "pointers"):
        for T, H, first_row in [*((T, 64, 0) for T in ROWS), (300, 64, 3), (1, 64, 7), (300, 72, 0)]:
            record_launches({"way": way, "T": T, "H": H, "first_row": first_row})
            launch_everything(T, H, first_row, way == "tma")
