"""How far apart two computations of the same numbers may be.

Equal bits (torch.equal, ==) are asked of one computation run twice. Whatever else should be the same number, packed or
padded, in chunks or whole, with a graph or without, from one model or from its copy, is summed in an order of its own,
and which order that is differs between CPUs, their numbers of threads and releases of torch. `make test-portable`
runs the suite under several.
"""

import torch


def without_ties(entry):
    """A log's entry without accuracies of margins that are rounding: which of those are above 0 says nothing."""
    margins = {key: value for key, value in entry.items() if key.endswith("rewards/margins")}
    ties = {key.replace("margins", "accuracies") for key, value in margins.items() if abs(value) < 1e-6}
    return {key: value for key, value in entry.items() if key not in ties}


def distance(a, b):
    """The norm of the difference, in fp64."""
    return float((a.detach().double().cpu() - b.detach().double().cpu()).norm())


def relative_error(found, exact):
    return distance(found, exact) / float(exact.detach().double().norm())


def assert_as_exact(found, plain, exact, floor=1e-7):
    """Each of `found` is off from `exact` by at most twice what plain PyTorch in the same dtype is off by.

    The floor, relative to what is found, is for the number that plain PyTorch gets right by luck.
    """
    for i, (a, b, e) in enumerate(zip(found, plain, exact, strict=True)):
        error, allowed = distance(a, e), 2 * distance(b, e) + floor * float(e.detach().double().norm())
        assert error <= allowed, f"number {i} is off by {error:.2e}, plain PyTorch by {distance(b, e):.2e}"


def assert_same_to_rounding(found, expected):
    """Each of `found` is the tensor of `expected`, its sums made in another order and rounded once to its dtype.

    In norm: 16 units in the last place of what sums of some hundred terms are made in, fp32 or fp64, and one of the
    dtype. What is no number must be none in both, at the same places.
    """
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert torch.equal(a, b), f"tensor {i} differs"
            continue
        is_number = b.isfinite()
        assert torch.equal(a.isfinite(), is_number), f"tensor {i} is no number at other places"
        a, b = a[is_number], b[is_number]
        summed = torch.finfo(torch.promote_types(b.dtype, torch.float32)).eps
        allowed = (16 * summed + torch.finfo(b.dtype).eps) * float(b.detach().double().norm())
        assert distance(a, b) <= allowed, f"tensor {i} is off by {distance(a, b):.2e}, {allowed:.2e} is rounding"


def assert_gradients_as_exact(found, plain, exact):
    """By parameter: off from `exact` by at most twice what plain PyTorch is off by in the worst of them, relative to
    their norms, and 2e-6.

    A gradient that is zero in exact arithmetic (a key bias without rotary positions) has the others' size for its norm.
    """
    assert found.keys() == plain.keys() == exact.keys()
    floor = 0.05 * float(torch.stack([grad.double().norm() for grad in exact.values()]).median())
    norms = {name: max(float(grad.double().norm()), floor) for name, grad in exact.items()}
    worst = max(distance(plain[name], grad) / norms[name] for name, grad in exact.items())
    for name, grad in exact.items():
        error = distance(found[name], grad) / norms[name]
        assert error <= 2 * worst + 2e-6, f"{name} is off by {error:.1e}, the worst of plain PyTorch by {worst:.1e}"
