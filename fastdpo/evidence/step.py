"""The check of `verify --model`: a whole DPO step of a user's model against plain PyTorch, layout by layout.

In: a model, a device, a dtype. Out: one `Line` per check. The exact step runs every response in a forward of its own,
through the stock model in fp64, with full logits. The bound is three times the error of the same plain step in the
precision of a run: fp32, or fp32 weights under autocast to bf16 or fp16. Every attention backend that runs here
computes packed rows, with and without shared prompts; one that cannot gives a line with the reason. Two more checks:
the same step again has equal bits, and no step needs the memory of all logits. A model that fastdpo refuses
gives a failed line with what the self-check said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.evidence.checks import Line, judged
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.evidence.problems import relative_error
from fastdpo.modeling.attention import BACKENDS, UnsupportedAttention
from fastdpo.modeling.backbone import text_ids
from fastdpo.modeling.head import lm_head
from fastdpo.modeling.packed import packed_logps, packed_loss
from fastdpo.modeling.prepared import prepare_model
from fastdpo.modeling.self_check import check_packing, whole_fp32_products
from fastdpo.types import PackedBatch, TokenizedPair

BETA = 0.1
LENGTHS = ((7, 9, 5), (3, 4, 17), (12, 1, 6), (5, 13, 11))  # tokens of prompt, chosen and rejected
TIMES_PLAIN = 3
# errors of this size count as rounding, whatever plain PyTorch's error is: with few numbers it may be small by luck
FLOOR = {"float32": 2e-6, "bfloat16": 1e-3, "float16": 2e-4}
GRADIENT_FLOOR = 10  # times that, for gradients
MANY_ROWS = 256  # response tokens of the memory check
Step = Callable[[], dict[str, Tensor]]


def verify_step(
    model: nn.Module, dtype: str, device: torch.device, each: Callable[[Line], None] | None = None
) -> list[Line]:
    """The lines of one model in one dtype. A check that raises is a failed line.

    Args:
        model: as loaded, in fp32; it stays as it is.
        dtype: name of a torch dtype, to which autocast goes unless it is float32.
        each: called with every finished line.
    """
    lines: list[Line] = []

    def tell(line: Line) -> None:
        lines.append(line)
        if each is not None:
            each(line)

    try:
        for line in _lines(model, dtype, device):
            tell(line)
    except Exception as error:  # whatever the model's code raises is a finding
        tell(Line("step", dtype, "the model's step", "FAILED", note=f"{type(error).__name__}: {error}"))
    return lines


def _lines(model: nn.Module, dtype: str, device: torch.device) -> Iterator[Line]:
    run = copy.deepcopy(model).to(device).eval()  # eval: dropout would make every step another
    pairs = _pairs(run, LENGTHS)
    with whole_fp32_products():
        exact, ref_sums = _exact(run, pairs)
    with _precision(dtype, device):
        usual = _plain_step(run, pairs, ref_sums)
    floors = {name: FLOOR[dtype] * (GRADIENT_FLOOR if name.startswith("grad ") else 1) for name in exact}
    bounds = {name: TIMES_PLAIN * relative_error(usual[name], exact[name]) + floors[name] for name in exact}

    check = check_packing(prepare_model(run), autocast=lambda: _precision(dtype, device))
    layouts: list[tuple[str, str, PackedBatch]] = [("padded rows", "auto", pad_pairs(pairs).to(device))]
    if check.ok:
        shared, separate = pack_pairs(pairs).to(device), pack_pairs(pairs, prefix_sharing=False).to(device)
        for name in BACKENDS:
            layouts += [(f"{name}, shared prompts", name, shared), (f"{name}, packed", name, separate)]
    else:
        yield Line("step", dtype, "packed rows", "skipped", note=check.reason)
    refused: set[str] = set()
    for layout, backend, batch in layouts:
        if backend in refused:
            continue
        prepare_model(run, attention_backend=backend)
        step = _step(run, batch, ref_sums, dtype)
        try:
            found = step()
        except UnsupportedAttention as refusal:
            refused.add(backend)
            yield Line("step", dtype, f"attention by {backend}", "skipped", note=str(refusal))
            continue
        except Exception as error:  # one backend's failure is a line, and the others still run
            yield Line("step", dtype, layout, "FAILED", note=f"{type(error).__name__}: {error}")
            continue
        yield from _compared(found, exact, bounds, dtype, layout)
        with _deterministic():
            first, second = step(), step()
        different = sum(int((first[name] != second[name]).sum()) for name in first)
        yield judged("step", dtype, f"same step again: bits that differ ({layout})", different, 0, "elements")
    prepare_model(run, attention_backend="auto")
    yield _memory(run, dtype, device, is_packed=check.ok)


def _compared(
    found: dict[str, Tensor], exact: dict[str, Tensor], bounds: dict[str, float], dtype: str, layout: str
) -> Iterator[Line]:
    """Loss, log-probs and all gradients together, then the parameter that is worst of its bound."""
    for name in ("loss", "log-probs"):
        yield judged("step", dtype, f"{name} ({layout})", relative_error(found[name], exact[name]), bounds[name])
    names = [name for name in exact if name.startswith("grad ")]
    total = sum(float(exact[name].square().sum()) for name in names) ** 0.5
    size = sum(exact[name].numel() for name in names)
    worst, share = "", 0.0
    for name in names:
        norm = float(exact[name].norm())
        # for gradients that cancel, as that of a key's bias does
        least = GRADIENT_FLOOR * FLOOR[dtype] * total * (exact[name].numel() / size) ** 0.5
        error = float((found[name] - exact[name]).norm()) / (bounds[name] * norm + least)
        if not error <= share:
            worst, share = name, error
    yield judged("step", dtype, f"gradients, worst of {len(names)} ({layout})", share, 1, "of bound", worst)


def _precision(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def _exact(model: nn.Module, pairs: list[TokenizedPair]) -> tuple[dict[str, Tensor], Tensor]:
    """The plain step in fp64, and the log-probs of the reference."""
    doubles = copy.deepcopy(model).double()
    with torch.no_grad():
        ref_sums = _references(_plain_sums(doubles, pairs))
    return _plain_step(doubles, pairs, ref_sums), ref_sums


def _pairs(model: nn.Module, lengths: tuple[tuple[int, int, int], ...]) -> list[TokenizedPair]:
    ids, generator = text_ids(model), torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    return [TokenizedPair(draw(prompt), draw(chosen), draw(rejected)) for prompt, chosen, rejected in lengths]


def _references(sums: Tensor) -> Tensor:
    """Log-probs of a reference that differ from the policy's by up to 3 nats, so that each pair has its own weight."""
    return sums + torch.arange(len(sums), device=sums.device).mul(5).remainder(7).sub(3)


def _plain_sums(model: nn.Module, pairs: list[TokenizedPair]) -> Tensor:
    """(S,) log-probs of the responses, each from a forward of its own and full logits, in fp32 at least."""
    device, sums = next(model.parameters()).device, []
    for pair in pairs:
        for response in pair.responses:
            ids = torch.tensor([[*pair.prompt_ids, *response]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            sums.append(logps.gather(-1, ids[0, len(pair.prompt_ids) :, None]).sum())
    return torch.stack(sums)


def _plain_step(model: nn.Module, pairs: list[TokenizedPair], ref_sums: Tensor) -> dict[str, Tensor]:
    sums = _plain_sums(model, pairs)
    logratios = (sums - ref_sums.to(sums.dtype)).unflatten(0, (-1, 2))
    return _answer(model, -F.logsigmoid(BETA * (logratios[:, 0] - logratios[:, 1])).sum(), sums)


def _step(model: nn.Module, batch: PackedBatch, ref_sums: Tensor, dtype: str) -> Step:
    """fastdpo's step: the gradient of the LM head in forward, as in a run."""

    def loss_of(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice) -> Tensor:
        logratios = sums - ref_sums[sequences].to(sums.dtype)
        chosen, rejected = (batch.pairs[pairs] - sequences.start).unbind(1)
        return -F.logsigmoid(BETA * (logratios[chosen] - logratios[rejected])).sum()

    def step() -> dict[str, Tensor]:
        with _precision(dtype, batch.input_ids.device):
            loss, logps = packed_loss(model, batch, loss_of)
        return _answer(model, loss, logps.sequences.sums)

    return step


def _answer(model: nn.Module, loss: Tensor, sums: Tensor) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    values = {"loss": loss, "log-probs": sums} | {f"grad {n}": g for (n, _), g in zip(named, grads, strict=True)}
    return {name: value.detach().double() for name, value in values.items()}


@contextmanager
def _deterministic() -> Iterator[None]:
    """What --full_determinism asks of PyTorch; kernels that have no deterministic version run as they are."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _memory(model: nn.Module, dtype: str, device: torch.device, *, is_packed: bool) -> Line:
    """Peak bytes of a step in which only the backbone's last parameter is trained, against the fp32 logits' bytes.

    Nothing else of the step is then large: no gradient of the LM head, and activations of one layer at a time.
    """
    check = "peak memory beside all logits"
    vocab, workspace = lm_head(model).weight.shape[0], 4 * MANY_ROWS * lm_head(model).weight.shape[0]
    pairs = _pairs(model, ((4, MANY_ROWS // 2, MANY_ROWS // 2),))
    batch: Any = (pack_pairs(pairs) if is_packed else pad_pairs(pairs)).to(device)
    prepare_model(model, workspace_bytes=workspace // 8)
    last: Any = [p for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name][-1]
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in before:
            p.requires_grad_(p is last)
        ref_sums = torch.zeros(2, device=device)

        def backbone() -> None:
            with torch.no_grad(), _precision(dtype, device):
                packed_logps(model, batch)

        def step() -> None:
            _step(model, batch, ref_sums, dtype)()

        if peak_live_bytes(backbone, device) > workspace // 2:
            return Line("step", dtype, check, "skipped", note="the layers of so small a vocabulary need more")
        note = f"{MANY_ROWS} x {vocab} logits in fp32 alone"
        return judged("step", dtype, check, peak_live_bytes(step, device), workspace, "bytes", note)
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)
