"""`verify`: compares every implementation of the head op that runs on this machine with fp64, and checks its
guarantees.

In: a device, dtypes, a shape. Out: one `Line` per check; a check that cannot run here gives a line with the reason.
Refuses devices other than the CPU and CUDA, and dtypes that the op does not support.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

import fastdpo
from fastdpo.evidence.checks import CHECKS, Line, Subject
from fastdpo.evidence.problems import Shape
from fastdpo.ops.engine import NAMES

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32", "float16")}  # by default, per device
ALL_DTYPES = DTYPES["cuda"]
MIN_ROWS = 32  # with fewer, one lucky rounding of plain PyTorch's decides


def verify(
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    shape: Shape | None = None,
    each: Callable[[Line], None] | None = None,
) -> list[Line]:
    """All checks, for every implementation and dtype.

    Args:
        device: cpu or cuda, with an index if wanted.
        dtypes: names of torch dtypes out of ALL_DTYPES; by default DTYPES of the device.
        shape: shape of the comparisons; by default ragged and small enough to take seconds. The memory check uses its
            own shapes.
        each: called with every finished line.
    Raises:
        ValueError: the device cannot be used, a dtype is not one of ALL_DTYPES, or there are too few rows.
    """
    place = torch.device(device)
    if place.type not in DTYPES:
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that PyTorch can use, got {device!r} on a machine without a GPU")
    dtypes = DTYPES[place.type] if dtypes is None else dtypes
    for name in dtypes:
        if name not in ALL_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(ALL_DTYPES)}, got {name!r}")
    if shape is not None and shape.rows < MIN_ROWS:
        raise ValueError(f"rows must be at least {MIN_ROWS} (with fewer, single roundings decide), got {shape.rows}")
    lines = []
    for impl in NAMES:
        for dtype in dtypes:
            lines += verify_one(Subject(impl, dtype, place, shape or default_shape(impl, place)), each)
    return lines


def verify_one(subject: Subject, each: Callable[[Line], None] | None = None) -> list[Line]:
    """The lines of one implementation in one dtype. A check that raises is a failed line; the others still run."""
    if subject.impl == "triton":  # the others run everywhere
        try:
            subject.problem(Shape(2, 16, 16)).call(subject.op)
        except ValueError as refusal:
            return list(_told([subject.skipped("all", str(refusal))], each))
    lines: list[Line] = []
    for check in CHECKS:
        try:
            for line in _told(check(subject), each):
                lines.append(line)  # one by one: a check that raises half-way has said something
        except Exception as error:  # any exception of an op is a finding
            what = (check.__doc__ or "").splitlines()[0]
            note = f"{type(error).__name__}: {error}"
            lines += _told([Line(subject.impl, subject.dtype, what, "FAILED", note=note)], each)
    return lines


def _told(lines: Iterable[Line], each: Callable[[Line], None] | None) -> Iterator[Line]:
    for line in lines:
        if each is not None:
            each(line)
        yield line


def default_shape(impl: str, device: torch.device | str) -> Shape:
    """A ragged shape in every dimension. It is small for Triton's interpreter, where one tile takes milliseconds."""
    if torch.device(device).type == "cuda":
        return Shape(1021, 1000, 32003)
    return Shape(67, 40, 521) if impl == "triton" else Shape(389, 200, 4099)


def machine(device: str) -> dict[str, str | None]:
    """The facts about the machine that a table of errors needs."""
    on_gpu = torch.device(device).type == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "fastdpo": fastdpo.__version__,
    }
