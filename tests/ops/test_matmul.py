"""Products summed in fp32, whatever this device's matmul can do by itself."""

import pytest
import torch

from fastdpo.ops import matmul

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("addmm_works", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.5, 2.0)])
def test_it_is_exact_to_the_operands_rounding(device, addmm_works, dtype, alpha, beta, monkeypatch):
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
