"""`fastdpo env`: the facts for a bug report, as lines to paste or, with --json, one JSON object.

Out: versions, the machine, GPUs and driver, the available kernels and attention backends and those that a run would
use, the head op's implementations, and the self-check's verdict on a tiny model. A fact that cannot be determined is
reported with the reason; nothing is refused.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import fastdpo
from fastdpo.cli.options.parser import RaisingParser

PACKAGES = (
    *("torch", "triton", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "trl", "flash-attn"),
    *("kernels", "liger-kernel", "deepspeed", "huggingface-hub", "tokenizers", "safetensors", "numpy", "pyarrow"),
)
# keys of /proc/cpuinfo that determine which kernels of MKL, oneDNN and torch run
VECTOR_UNITS = ("sse4_2", "avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "asimd", "sve")
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "TRITON_INTERPRET"),
    *("ONEDNN_MAX_CPU_ISA", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "HF_HUB_OFFLINE", "NCCL_P2P_DISABLE"),
)


def main(argv: list[str]) -> int:
    """Prints the facts; 0 also where something is missing, which is one of the facts."""
    parser = RaisingParser(prog="fastdpo env", description="Prints what a bug report needs.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(argv)
    facts = environment()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines_of(facts)))
    return 0


def environment() -> dict[str, Any]:
    """All facts, by section."""
    return {
        "fastdpo": {"version": fastdpo.__version__, "folder": str(Path(fastdpo.__file__).parent)},
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": _machine(),
        "torch": _found(_torch),
        "gpus": _found(_gpus),
        "head op": _found(_head_op),
        "attention": _found(_attention),
        "self-check": _found(_self_check),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def lines_of(facts: dict[str, Any]) -> list[str]:
    """The facts as text that can be pasted into an issue."""
    lines = []
    for section, values in facts.items():
        if isinstance(values, dict):
            shown = [f"  {name}: {_shown(value)}" for name, value in values.items() if value is not None]
        else:
            shown = [f"  {_shown(value)}" for value in values]
        lines += [f"{section}:", *shown] if shown else [f"{section}: none"]
    missing = [name for name, version in facts["packages"].items() if version is None]
    return [*lines, f"not installed: {', '.join(missing) or 'none of the above'}"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _found(what: Callable[[], Any]) -> Any:
    """A section, or the error that prevented it: a broken install must not hide the other facts."""
    try:
        return what()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    facts = _cpu()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "os": platform.platform(),
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vector units": [
            unit for unit in VECTOR_UNITS if unit in facts.get("flags", facts.get("Features", "")).split()
        ],
        "memory": _memory(),
    }


def _cpu() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty without that file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> str | None:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return None


def _torch() -> dict[str, Any]:
    import torch

    return {
        "cuda (built for)": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bf16 on the GPU": torch.cuda.is_bf16_supported() if torch.cuda.is_available() else None,
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    driver = _driver()
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        found.append({"name": properties.name, "capability": capability, "memory": memory, "driver": driver})
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _head_op() -> dict[str, Any]:
    """The implementations that run here, and the one that "auto" takes."""
    import torch

    from fastdpo.ops.engine import NAMES, resolve_impl

    device, facts = _device(), {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for impl in NAMES:
        try:
            resolve_impl(impl, device, dtype)
            facts[impl] = "can run"
        except ValueError as error:
            facts[impl] = f"cannot: {error}"
    return {"auto": f"{resolve_impl('auto', device, dtype)} on {device.type}", **facts}


def _attention() -> dict[str, Any]:
    """Every backend and whether it can run; the self-check shows which one runs a model."""
    from fastdpo.modeling.attention import BACKENDS

    call = _plain_call()
    return {name: backend.refusal(call) or f"can run ({backend.title})" for name, backend in BACKENDS.items()}


def _plain_call() -> Any:
    """An attention call without a window, sinks or a softcap, in the dtype of a run on this device."""
    import torch

    from fastdpo.modeling.attention.call import AttentionCall, PackedLayout

    device = _device()
    heads = torch.zeros(1, 4, 8, 64, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    layout: PackedLayout = None  # type: ignore[assignment]  # does not affect what a backend supports
    return AttentionCall(heads, heads, heads, layout, 0.0, 0.125, None, None, None)


def _self_check() -> dict[str, Any]:
    """Compares packed and separate log-probs of a tiny Llama on this device, as every run does with its own model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastdpo.modeling import check_packing, prepare_model

    device = _device()
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(device)
    on_gpu = device.type == "cuda"
    check = check_packing(
        prepare_model(model), autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    )
    return {
        "verdict": "packed rows are exact" if check.ok else f"packed rows are wrong: {check.reason}",
        "relative error": f"{check.error:.1e}",
        "precision": "bfloat16" if on_gpu else "float32",
        "attention taken": [f"{name} ({why})" for name, why in check.backends.items()],
        "seconds": round(check.seconds, 2),
    }
