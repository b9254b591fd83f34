"""Compiles every kernel for one GPU architecture and operand type, on any machine; prints a JSON line for each.

    python tests/kernels/ahead_of_time.py 90 bf16
    python tests/kernels/ahead_of_time.py 90 bf16 plain         # without the variants that have every option on
    python tests/kernels/ahead_of_time.py 90 bf16 candidates    # not the table's shapes but those that a tuner tries

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
from fastdpo.kernels.choices import LABELS, choice_grads_kernel, choice_labels_kernel, choice_logits_kernel
from fastdpo.kernels.finish import FINISH_ROWS, finish_grads_kernel
from fastdpo.kernels.forward import partials_kernel
from fastdpo.kernels.launch import FLATTENS_FROM, LIBRARY, Blocks, blocks_for, candidates_for
from fastdpo.kernels.library import fold_grads_kernel, fold_kernel
from fastdpo.kernels.merge import MERGE_ROWS, MERGE_TILES, merge_kernel
from fastdpo.kernels.products import ProductBlocks, column_sums_kernel, product_table, products_kernel
from fastdpo.kernels.sparse import kept_logit_grads_kernel
from fastdpo.kernels.token_sums import (
    GRAD_ROWS,
    GRAD_SPAN,
    GRAD_TOKENS,
    SUM_TOKENS,
    row_grads_kernel,
    token_sums_kernel,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INDICES = ("starts", "visits", "slots", "blocks", "bounds", "spans")
PLACES = ("labels", "lengths", "rows", "ends")
POINTER_TYPES = {**dict.fromkeys(PLACES, "*i64"), "is_top1": "*i8", "value_3": "*u8", **dict.fromkeys(INDICES, "*i32")}
OPERANDS = ("hidden", "weight", "bias", "out", "extra", "adapter", "tiles", "other")  # what is in neither is fp32
INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG")  # the matrix units', and the copy engine's load
NO_STATISTICS = {"WITH_ENTROPY": False, "WITH_SQUARES": False, "WITH_MEAN": False}


class Variant(NamedTuple):
    name: str
    kernel: Any
    constexprs: dict[str, Any]
    blocks: Blocks | ProductBlocks | None  # of kernels that multiply
    boxes: dict[str, tuple[int, int]] = {}  # noqa: RUF012  # what one load takes of the arguments that are descriptors
    fp32: tuple[str, ...] = ()  # arguments that point to fp32 whatever the operands are

    def launch_options(self) -> dict[str, int]:
        if self.blocks is None:
            return {"num_warps": 4}
        return {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages}


def tile_variant(
    name: str, kernel: Any, blocks: Blocks, options: bool, *, flatten: bool = False, **switches: bool
) -> Variant:
    """A kernel that makes tiles of logits, with these blocks."""
    constexprs = {"HAS_BIAS": options, "HAS_SOFTCAP": options, "TMA": blocks.tma, "GROUP_T": 8, **switches}
    if kernel is partials_kernel:
        constexprs |= dict.fromkeys(NO_STATISTICS, options) | {"PERSISTENT": blocks.persistent > 0, "FLATTEN": flatten}
        constexprs.setdefault("HAS_ADAPTER", False)
    constexprs |= {name: value for name, value in blocks.options().items() if name.startswith("BLOCK_")}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    boxes = {"hidden_ptr": (blocks.block_t, blocks.block_h), "weight_ptr": (blocks.block_v, blocks.block_h)}
    if switches.get("HAS_ADAPTER"):
        boxes |= {"extra_ptr": boxes["hidden_ptr"], "adapter_ptr": boxes["weight_ptr"]}
    name = f"{name}, {'every option' if options else 'plain'}"
    return Variant(name, kernel, constexprs, blocks, boxes if blocks.tma else {})


def product_variants(tile: Blocks, blocks: ProductBlocks) -> list[Variant]:
    """The products of the sparse backward, over tiles of this size."""
    found = []
    sizes = {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k}
    for name, transposed, finish in (("dW", True, True), ("dH", False, True), ("dH of one round", False, False)):
        switches = {"TRANSPOSED": transposed, "FINISH": finish, "TMA": blocks.tma, "GROUP": 8}
        tile_box = (blocks.block_k, tile.block_v) if transposed else (tile.block_t, blocks.block_k)
        boxes = {"tiles_ptr": tile_box, "other_ptr": (blocks.block_k, blocks.block_n)}
        fp32 = () if finish else ("out_ptr",)
        found.append(
            Variant(f"products, {name}", products_kernel, sizes | switches, blocks, boxes if blocks.tma else {}, fp32)
        )
    return found


def variants(capability: tuple[int, int], operand: str) -> list[Variant]:
    """Every kernel twice with the table's blocks: plain, and with every option on."""

    def blocks(kernel: str) -> Blocks:
        return blocks_for(capability, itemsize(operand), kernel)

    found = []
    for on in (False, True):
        option, kernel = ("every option", "_options") if on else ("plain", "")
        statistics = dict.fromkeys(NO_STATISTICS, on)
        merge = {"WITH_TOP1": on, "WITH_LSE": on, "WITH_MAX": on, "ROWS": MERGE_ROWS, "TILES": MERGE_TILES}
        eager = blocks(f"eager{kernel}")
        finish = {"HAS_SOFTCAP": on, "ROWS": FINISH_ROWS, "BLOCK_V": eager.block_v}
        found += [
            tile_variant("partials", partials_kernel, blocks(f"forward{kernel}"), on, WITH_GRADS=False),
            tile_variant("partials with grads", partials_kernel, eager, on, WITH_GRADS=True),
            tile_variant("partials with grads, adapter", partials_kernel, eager, on, WITH_GRADS=True, HAS_ADAPTER=True),
            tile_variant("partials to skip by", partials_kernel, blocks("skipping"), on, WITH_GRADS=False),
            tile_variant("logit_grads", logit_grads_kernel, blocks(f"logit_grads{kernel}"), on),
            tile_variant("kept logit_grads", kept_logit_grads_kernel, blocks("skipping"), on),
            Variant(f"merge, {option}", merge_kernel, statistics | merge, None),
            Variant(f"finish_grads, {option}", finish_grads_kernel, finish, None),
        ]
    tile = blocks("skipping")
    found += product_variants(tile, ProductBlocks(*product_table(capability, itemsize(operand))[0]))
    sums = {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v}
    found.append(Variant("column_sums", column_sums_kernel, sums, None))
    return [*found, *token_variants(), *choice_variants(LIBRARY[0])]


def token_variants() -> list[Variant]:
    """The masked sum: log-probs alone, each token its own row, and four numbers of shared rows with weights."""
    found = []
    for on in (False, True):
        option, places = "every option" if on else "plain", {"HAS_ROWS": on, "HAS_WEIGHTS": on}
        sums = {"NUM_VALUES": 4 if on else 1, "WITH_LENGTHS": on, "BLOCK": SUM_TOKENS}
        blocks = {"ROWS": GRAD_ROWS, "TOKENS": GRAD_TOKENS, "SPAN": GRAD_SPAN}
        fp32 = ("out_ptr",)
        found.append(Variant(f"token_sums, {option}", token_sums_kernel, places | sums, None, fp32=fp32))
        found.append(Variant(f"row_grads, {option}", row_grads_kernel, places | blocks, None, fp32=fp32))
    return found


def choice_variants(blocks: Blocks) -> list[Variant]:
    """What reads logits that the library has made, for several labels per row."""
    found = []
    for on in (False, True):
        option, switches = "every option" if on else "plain", {"HAS_BIAS": on, "HAS_SOFTCAP": on}
        sizes = {"BLOCK_T": blocks.block_t, "BLOCK_V": blocks.block_v}
        fold = sizes | switches | dict.fromkeys(NO_STATISTICS, on) | {"WITH_GRADS": False}
        found += [
            Variant(f"choice sums, {option}", fold_kernel, fold, None),
            Variant(f"choice_logits, {option}", choice_logits_kernel, switches | {"BLOCK": LABELS}, None),
            Variant(f"choice_grads, {option}", choice_grads_kernel, switches | sizes, None),
            Variant(f"choice_labels, {option}", choice_labels_kernel, switches | {"BLOCK": LABELS}, None),
        ]
    return found


def library_variants(blocks: Blocks) -> list[Variant]:
    """What folds logits that the library has made, plain and with every option."""
    found = []
    for on in (False, True):
        option, sizes = "every option" if on else "plain", {"BLOCK_T": blocks.block_t, "BLOCK_V": blocks.block_v}
        switches = {"HAS_BIAS": on, "HAS_SOFTCAP": on}
        fold = sizes | switches | dict.fromkeys(NO_STATISTICS, on) | {"WITH_GRADS": True}
        found.append(Variant(f"fold, {option}", fold_kernel, fold, None))
        found.append(Variant(f"fold_grads, {option}", fold_grads_kernel, sizes | switches, None))
    return found


def candidate_variants(capability: tuple[int, int], operand: str) -> list[Variant]:
    """What a tuner may try: the kernels that make tiles, plain; persistent programs only make sums."""
    found = []
    for blocks in candidates_for(capability, itemsize(operand)):
        if blocks.library:
            found += library_variants(blocks)
            continue
        flatten = blocks.persistent > 0 and capability >= FLATTENS_FROM
        found.append(tile_variant("partials", partials_kernel, blocks, False, flatten=flatten, WITH_GRADS=False))
        if not blocks.persistent:
            found.append(tile_variant("partials with grads", partials_kernel, blocks, False, WITH_GRADS=True))
            found.append(tile_variant("logit_grads", logit_grads_kernel, blocks, False))
    tile = blocks_for(capability, itemsize(operand), "skipping")
    for blocks in product_table(capability, itemsize(operand))[1:]:
        found += product_variants(tile, ProductBlocks(*blocks))
    return found


def itemsize(operand: str) -> int:
    return 4 if operand == "fp32" else 2


def argument_type(name: str, operand: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name in ("logit_scale", "softcap") else "i32"
    stem = name.removesuffix("_ptr")
    return POINTER_TYPES.get(stem, f"*{operand}" if stem in OPERANDS else "*fp32")


def compile_variant(variant: Variant, operand: str, capability: int) -> Any:
    """Compiled as a launch on aligned inputs would be: strides of 1 are constants, H and row strides divide by 16."""
    kernel, names = variant.kernel, variant.kernel.arg_names
    constants = variant.constexprs | {name: 1 for name in ("stride_hh", "stride_wh", "stride_oh") if name in names}
    signature = {name: "constexpr" if name in constants else argument_type(name, operand) for name in names}
    signature |= {name: f"tensordesc<{operand}[{rows}, {columns}]>" for name, (rows, columns) in variant.boxes.items()}
    signature |= dict.fromkeys(variant.fp32, "*fp32")
    anywhere = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    aligned = [name for name in names if signature[name].startswith("*") and name not in anywhere]
    aligned += [name for name in ("H", "stride_ht", "stride_wv", "stride_ob", "stride_out") if name in names]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.launch_options())


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
        "matrix": {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS},
    }


def main(capability: int, operand: str, *words: str) -> None:
    found = (candidate_variants if "candidates" in words else variants)((capability // 10, capability % 10), operand)
    for variant in found:
        if "plain" in words and variant.name.endswith("every option"):
            continue
        compiled = compile_variant(variant, operand, capability)
        about = {"kernel": variant.name, "sm": capability, "operand": operand, "triton": triton.__version__}
        about["blocks"] = [] if variant.blocks is None else [int(x) for x in variant.blocks]
        about["tma"] = bool(variant.boxes)
        print(json.dumps(about | facts(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
