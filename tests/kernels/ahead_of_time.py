"""Compiles every kernel for one GPU architecture and operand type, on any machine; prints a JSON line for each.

    python tests/kernels/ahead_of_time.py 90 bf16

Not a test module: it runs in a process of its own, because kernels defined under TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdpo.kernels.backward import logit_grads_kernel
from fastdpo.kernels.finish import FINISH_ROWS, finish_grads_kernel
from fastdpo.kernels.forward import partials_kernel
from fastdpo.kernels.launch import blocks_for
from fastdpo.kernels.merge import MERGE_ROWS, MERGE_TILES, merge_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTER_TYPES = {"labels": "*i64", "is_top1": "*i8"}  # all else is an operand or fp32
OPERANDS = ("hidden", "weight", "bias", "out")
MATRIX_INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA")


class Variant(NamedTuple):
    name: str
    kernel: Any
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def variants(capability: tuple[int, int], operand: str) -> list[Variant]:
    """Every kernel twice: plain, and with every option on."""
    block_t, block_v, block_h, num_warps, num_stages = blocks_for(capability, 2 if operand == "bf16" else 4)
    blocks = {"BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_H": block_h, "GROUP_T": 8}
    found = []
    for option, on in (("plain", False), ("every option", True)):
        head = {"HAS_BIAS": on, "HAS_SOFTCAP": on}
        statistics = {"WITH_ENTROPY": on, "WITH_SQUARES": on, "WITH_MEAN": on}
        merge = {"WITH_TOP1": on, "WITH_LSE": on, "ROWS": MERGE_ROWS, "TILES": MERGE_TILES}
        sums = head | statistics | blocks
        finish = {"HAS_SOFTCAP": on, "ROWS": FINISH_ROWS, "BLOCK_V": block_v}
        found += [
            Variant(f"partials, {option}", partials_kernel, sums | {"WITH_GRADS": False}, num_warps, num_stages),
            Variant(
                f"partials with grads, {option}", partials_kernel, sums | {"WITH_GRADS": True}, num_warps, num_stages
            ),
            Variant(f"finish_grads, {option}", finish_grads_kernel, finish, 4, 3),
            Variant(f"logit_grads, {option}", logit_grads_kernel, head | blocks, num_warps, num_stages),
            Variant(f"merge, {option}", merge_kernel, statistics | merge, 4, 3),
        ]
    return found


def argument_type(name: str, operand: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name in ("logit_scale", "softcap") else "i32"
    stem = name.removesuffix("_ptr")
    return POINTER_TYPES.get(stem, f"*{operand}" if stem in OPERANDS else "*fp32")


def compile_variant(variant: Variant, operand: str, capability: int) -> Any:
    """Compiled as a launch on contiguous, aligned inputs would be: strides of 1 are constants, H divides by 16."""
    names = variant.kernel.arg_names
    constants = variant.constexprs | {name: 1 for name in ("stride_hh", "stride_wh") if name in names}
    signature = {name: "constexpr" if name in constants else argument_type(name, operand) for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in ("H", "stride_ht", "stride_wv")]
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(compiled: Any) -> dict[str, Any]:
    """Registers, stack and spills from the machine code, and which matrix instructions it has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix": {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX_INSTRUCTIONS},
    }


def main(capability: int, operand: str) -> None:
    for variant in variants((capability // 10, capability % 10), operand):
        compiled = compile_variant(variant, operand, capability)
        about = {"kernel": variant.name, "sm": capability, "operand": operand, "triton": triton.__version__}
        print(json.dumps(about | facts(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
