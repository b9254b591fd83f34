"""Products summed in fp32, whatever this device's matmul can do by itself."""

import pytest
import torch
from covering import every_pair
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.ops import matmul

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    *every_pair(
        addmm_works=[True, False],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
        factors=[(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.5, 2.0)],
    ),
    ids=str,
)
def test_it_is_exact_to_the_operands_rounding(device, addmm_works, dtype, factors, monkeypatch):
    alpha, beta = factors
    if not addmm_works:
        monkeypatch.setattr(matmul, "_addmm_takes_wider_sums", lambda *_: False)
        monkeypatch.setattr(matmul, "MAX_PRODUCT_ELEMENTS", 1000)
    torch.manual_seed(0)
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((70, 130), (130, 40)))
    out = torch.randn(70, 80, device=device)
    before = out[:, :40].clone()
    if beta == 0:
        out[:, :40] = torch.nan
    view = out[:, :40]  # a strided result, as a block of a larger one is
    matmul.matmul_into(view, matmul.operand(a), matmul.operand(b), alpha=alpha, beta=beta)
    exact = alpha * a.double() @ b.double() + (beta * before.double() if beta else 0)
    assert float((view - exact).norm() / exact.norm()) < 1e-6


def test_a_product_is_added_to_sums_in_one_pass_over_them(monkeypatch):
    """Where the library cannot add to wider sums: mul_(1.0) would read and write all of dW once more."""

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(matmul, "_addmm_takes_wider_sums", lambda *_: False)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    a, b, out = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(4, 5)
    for beta, expected, passes in ((1.0, 4.0, ["add_"]), (2.0, 5.0, ["mul_", "add_"])):
        seen, sums = [], out.clone()
        with Passes():
            matmul.matmul_into(sums, a, b, beta=beta)
        assert [name for name in seen if name in ("mul_", "mul", "add_", "add")] == passes
        assert (sums == expected).all()


def test_what_such_a_product_takes_is_known_to_those_who_count(monkeypatch):
    monkeypatch.setattr(matmul, "_addmm_takes_wider_sums", lambda *_: False)
    cuda = torch.device("cuda")
    assert matmul.product_bytes(cuda, torch.bfloat16) == 16 * 2**20
    assert matmul.product_bytes(cuda, torch.float32) == 0
    assert matmul.product_bytes(torch.device("cpu"), torch.bfloat16) == 0
    monkeypatch.setattr(matmul, "_addmm_takes_wider_sums", lambda *_: True)
    assert matmul.product_bytes(cuda, torch.bfloat16) == 0
