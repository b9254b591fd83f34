"""Every attention backend against separate unpadded forwards of the stock model, and what each of them refuses.

Kernels that run on GPUs only are emulated in torch here; what the installed torch itself accepts is asked on fake
tensors; tests marked gpu run the kernel.
"""

import inspect

import pytest
import torch
from covering import every_pair
from test_packed_logps import GROUPS, SMALL, build, gradients, separate_sums
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from varlen_emulation import (
    EMULATIONS,
    EmulatedFlash,
    EmulatedVarlen,
    varlen_attn_2_10,
    varlen_attn_2_11,
    varlen_attn_2_13,
)

from fastdpo import pack_pairs, packed_logps, prepare_model
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import attention
from fastdpo.modeling.attention import BACKENDS, Observed, observed, sdpa
from fastdpo.modeling.attention.call import AttentionCall, PackedLayout
from fastdpo.modeling.attention.gather import gather_keys

MODELS = ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"]
NEEDS = {"gemma2": "softcap", "gpt_oss": "attention sinks"}  # beyond windows and grouped heads
REFUSED = {("varlen", "gemma2"), *((kernel, "gpt_oss") for kernel in EMULATIONS)}
CASES = [(b, m) for b in ("sdpa", "mask", *EMULATIONS) for m in MODELS if (b, m) not in REFUSED]


@pytest.fixture
def emulated(monkeypatch):
    """Puts an emulation in the place of a kernel and returns it."""

    def put(name, backend=None):
        backend = backend or EMULATIONS[name]()
        monkeypatch.setitem(BACKENDS, name, backend)
        return backend

    return put


def assert_same(model, batch, expected, expected_grads):
    actual = packed_logps(model, batch).sequences.sums
    actual_grads = gradients(model, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert actual_grads.keys() == expected_grads.keys()
    floor = 0.05 * torch.stack([grad.norm() for grad in expected_grads.values()]).median()
    for name, grad in expected_grads.items():
        error = (actual_grads[name] - grad).norm() / grad.norm().clamp(min=floor)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize(("backend", "model_type"), CASES)
def test_every_backend_gives_the_log_probs_and_gradients_of_separate_forwards(
    backend, model_type, prefix_sharing, emulated
):
    """Windows, softcaps, sinks, grouped heads. Checkpointing, adapters, grouping: test_every_combination.py."""
    kernel = emulated(backend) if backend in EMULATIONS else None
    model = build(model_type)
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    prepare_model(model, attention_backend=backend)
    assert_same(model, pack_pairs(GROUPS, prefix_sharing=prefix_sharing), expected.detach(), expected_grads)
    if kernel is not None:
        assert kernel.num_calls == model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral"])
def test_the_varlen_attn_of_torch_2_10_serves_what_it_can(model_type, emulated):
    """No scale, no windows, no grouped heads: the first and the last are made up for, windows are refused."""
    emulated("varlen", EmulatedVarlen(varlen_attn_2_10))
    model = prepare_model(build(model_type), attention_backend="varlen")
    if model_type != "llama":
        with pytest.raises(ValueError, match=r"varlen: has no (sliding window|softcap)"):
            packed_logps(model, pack_pairs(GROUPS))
        return
    model.model.layers[0].self_attn.scaling = 0.3
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    assert_same(model, pack_pairs(GROUPS), expected.detach(), expected_grads)


def fewer_gradients(query, key, value, *lengths, scale=None, window_size=(-1, -1)):
    """Right forward, and in backward the gradient of a group's first query head alone."""
    groups = query.shape[1] // key.shape[1]
    copies = [x.detach().repeat_interleave(groups, 1) for x in (key, value)]
    if groups > 1:
        for copy, x in zip(copies, (key, value), strict=True):
            copy[:, ::groups] = x
    else:
        copies = [key, value]
    return varlen_attn_2_11(query, *copies, *lengths, scale=scale, window_size=window_size)


def refuses_fewer(query, key, value, *lengths, scale=None, window_size=(-1, -1)):
    if query.shape[1] != key.shape[1]:
        raise RuntimeError("number of heads in key must match query")
    return varlen_attn_2_11(query, key, value, *lengths, scale=scale, window_size=window_size)


@pytest.mark.parametrize(
    ("function", "heads"), [(varlen_attn_2_11, 2), (fewer_gradients, 4), (refuses_fewer, 4)], ids=lambda x: str(x)[:30]
)
def test_keys_are_copied_for_every_query_head_only_where_their_gradients_come_out_wrong_without(
    function, heads, emulated
):
    """Of 2.11's function, which has windows and a scale, and says nothing of grouped heads."""
    calls = []
    emulated("varlen", EmulatedVarlen(record(function, calls)))
    model = build("mistral")
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    prepare_model(model, attention_backend="varlen")
    assert_same(model, pack_pairs(GROUPS), expected.detach(), expected_grads)
    of_model = [call["key"].shape[1] for call in calls if len(call["query"]) == pack_pairs(GROUPS).input_ids.shape[1]]
    assert of_model == [heads] * model.config.num_hidden_layers
    before = len(calls)
    packed_logps(model, pack_pairs(GROUPS))
    assert len(calls) == before + model.config.num_hidden_layers  # the question is asked once


def test_grouped_keys_are_copied_where_a_mask_meets_them_on_a_gpu_and_nowhere_else():
    """scaled_dot_product_attention has no fused kernel for both there."""
    from torch._subclasses import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    seen = []

    class Recorded(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                masked = kwargs["attn_mask"] is not None
                seen.append((args[0].device.type, masked, args[1].shape[1], kwargs["enable_gqa"]))
                return args[0]
            return func(*args, **(kwargs or {}))

    for device in ("cpu", "cuda"):
        with FakeTensorMode(), Recorded():
            q, k, v = (torch.empty(1, heads, 9, 64, device=device) for heads in (4, 2, 2))
            layout = PackedLayout((), pack_pairs(GROUPS).varlen)
            call = AttentionCall(q, k, v, layout, dropout=0.0, scale=1.0, window=None, softcap=None, sinks=None)
            for mask in (None, torch.ones(9, 9, dtype=torch.bool, device=device)):
                sdpa._sdpa(q, k, v, mask, call)
    assert seen == [("cpu", False, 2, True), ("cpu", True, 2, True), ("cuda", False, 2, True), ("cuda", True, 4, False)]


@pytest.mark.parametrize("head_dim", [4, 12])
def test_head_dims_that_are_no_multiple_of_eight_are_padded(head_dim, emulated):
    kernel = emulated("varlen")
    model = build("llama", head_dim=head_dim)
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    prepare_model(model, attention_backend="varlen")
    assert_same(model, pack_pairs(GROUPS), expected.detach(), expected_grads)
    assert kernel.num_calls == 3


@pytest.mark.parametrize(("backend", "model_type"), sorted(REFUSED))
def test_a_named_backend_refuses_what_it_cannot_do_and_auto_takes_another(backend, model_type, emulated):
    emulated(backend)
    model, batch = build(model_type), pack_pairs(GROUPS)
    prepare_model(model, attention_backend=backend)
    with pytest.raises(ValueError, match=rf"attention_backend '{backend}'.*{backend}: has no .*{NEEDS[model_type]}"):
        packed_logps(model, batch)
    prepare_model(model, attention_backend="auto")
    seen = Observed()
    token = observed.set(seen)
    sums = packed_logps(model, batch).sequences.sums
    observed.reset(token)
    torch.testing.assert_close(sums, separate_sums(model), rtol=1e-5, atol=1e-6)
    assert set(seen.backends) == {"sdpa"}
    assert f"{backend}: has no" in seen.backends["sdpa"]


def test_flash_attn_4_runs_sinks_whose_gradient_nobody_wants(emulated):
    """As in LoRA: its kernel has no gradient of the sinks, and the sinks are frozen."""
    kernel = emulated("flash4")
    model = prepare_model(build("gpt_oss"), attention_backend="flash4")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sinks" not in name)
    sums = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
    torch.testing.assert_close(sums, separate_sums(model), rtol=1e-5, atol=1e-6)
    assert kernel.num_calls == 3


@pytest.mark.parametrize(
    ("installed", "expected"), [((2, 3), "flash3"), ((2, 4), "flash4"), ((2,), "flash2"), ((), "varlen")]
)
def test_auto_prefers_flash_attn_then_varlen_attn(installed, expected, emulated):
    for generation in installed:
        emulated(f"flash{generation}")
    emulated("varlen")
    seen = Observed()
    token = observed.set(seen)
    packed_logps(build("llama"), pack_pairs(GROUPS))
    observed.reset(token)
    assert set(seen.backends) == {expected}


def test_on_a_cpu_auto_takes_sdpa_and_says_why():
    seen = Observed()
    token = observed.set(seen)
    packed_logps(build("llama"), pack_pairs(GROUPS))
    observed.reset(token)
    assert seen.backends == {"sdpa": "flash3, flash4, flash2, varlen: runs on cuda only"}


@pytest.mark.parametrize("backend", ["flash", "flash2", "varlen"])
def test_a_named_backend_that_is_not_there_raises_and_says_why(backend):
    model = prepare_model(build("llama"), attention_backend=backend)
    with pytest.raises(ValueError, match=rf"attention_backend '{backend}' .*cuda only"):
        packed_logps(model, pack_pairs(GROUPS))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"attention_backend must be one of .*'varlen'.*, got 'flex'"):
        prepare_model(build("llama"), attention_backend="flex")


# What reaches the kernels


def record(function, calls):
    """The same function, signature included, that keeps the arguments of its calls by name."""

    def recording(*args, **kwargs):
        calls.append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    recording.__signature__ = inspect.signature(function)
    return recording


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_flash_attn_is_called_with_half_precision_rows_and_the_batchs_lengths(generation, emulated):
    calls = []
    emulated("flash2", EmulatedFlash(2, record(EmulatedFlash(generation).function, calls)))
    model = prepare_model(build("gemma2", head_dim=16), attention_backend="flash2")
    batch = pack_pairs(GROUPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed_logps(model, batch).chosen.sum().backward()
    num_rows, num_keys = batch.input_ids.shape[1], len(batch.varlen.key_rows)
    assert num_keys > num_rows
    assert len(calls) == 4
    for layer, call in enumerate(calls):
        assert {call[x].dtype for x in "qkv"} == {torch.bfloat16}
        assert call["q"].shape == (num_rows, 4, 16)
        assert call["k"].shape == call["v"].shape == (num_keys, 2, 16)
        assert call["q"].stride(-1) == call["k"].stride(-1) == call["v"].stride(-1) == 1
        assert call["cu_seqlens_q"] is batch.varlen.cu_queries
        assert call["cu_seqlens_k"] is batch.varlen.cu_keys
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (batch.varlen.max_queries, batch.varlen.max_keys)
        assert call["causal"] is True
        assert call["softmax_scale"] == 8**-0.5
        assert call["softcap"] == 5.0
        is_local = model.config.layer_types[layer] == "sliding_attention"
        assert call.get("window_size") == ((3, 0) if is_local else None)  # 4 tokens, the query included
        assert call["deterministic"] is False


@pytest.mark.parametrize(
    ("generation", "module"), [(2, "flash_attn"), (3, "flash_attn_interface"), (4, "flash_attn.cute")]
)
def test_flash_attn_comes_from_transformers_loader(generation, module, monkeypatch):
    import sys
    from types import ModuleType

    from transformers import modeling_flash_attention_utils as loader
    from transformers import utils

    for name in {"flash_attn", "flash_attn.bert_padding", "flash_attn.cute", module}:
        package = ModuleType(name)
        package.pad_input = package.unpad_input = package.flash_attn_func = package.flash_attn_with_kvcache = print
        package.flash_attn_varlen_func = EmulatedFlash(generation).function if name == module else None
        monkeypatch.setitem(sys.modules, name, package)
    for place in (loader, utils):
        for other in (2, 3, 4):
            monkeypatch.setattr(place, f"is_flash_attn_{other}_available", lambda is_it=other == generation: is_it)
    for name in vars(loader):
        if name.startswith("_loaded_") or name.endswith(("_fn",)):
            monkeypatch.setattr(loader, name, getattr(loader, name))  # put back afterwards
    monkeypatch.setattr(loader, "_loaded_implementation", None)
    from fastdpo.modeling.attention.varlen import FlashAttn

    for asked in (2, 3, 4):
        expected = EmulatedFlash(generation).function if asked == generation else None
        assert FlashAttn(asked, (8, 99)).function is expected


def test_the_emulation_has_the_signature_of_the_installed_varlen_attn():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    real, ours = (inspect.signature(f).parameters.values() for f in (varlen.varlen_attn, varlen_attn_2_13))
    if "scale" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("an older torch")
    assert [(p.name, p.kind, p.default) for p in real] == [(p.name, p.kind, p.default) for p in ours]


@pytest.mark.parametrize("window", [None, 5])
def test_the_installed_varlen_attn_takes_our_arguments_and_no_layer_reads_the_device(window, emulated):
    """On fake tensors, forward and backward: shapes and dtypes are checked, and reading a value back would raise."""
    from torch._subclasses import FakeTensorMode

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    kernel = emulated("varlen", EmulatedVarlen(varlen.varlen_attn))
    batch = pack_pairs(GROUPS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        num_rows = batch.input_ids.shape[1]
        q, k, v = (torch.empty(1, heads, num_rows, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        tensors = {
            name: torch.empty(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
            for name, value in batch.asdict()["varlen"].items()
        }
        layout = PackedLayout(batch.segments, type(batch.varlen)(**tensors), "varlen")
        call = {"sliding_window": window, "packed_layout": layout}
        output, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, **call)
        assert output.shape == (1, num_rows, 4, 64)
        output.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
        mask = layout.row_mask(window)
        assert mask.shape == (num_rows, num_rows)
    assert kernel.num_calls == 1


def branch_gradients(most, monkeypatch):
    """Of queries, keys and values of a row with a prompt of 400 tokens, and the bytes beyond them at the peak."""
    monkeypatch.setattr(sdpa, "MAX_GRADIENT_BYTES", most)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator, segments = torch.Generator().manual_seed(0), [(0, 1400, 0, 0), (1400, 2000, 0, 400)]
    leaves = [torch.randn(1, heads, 2000, 16, generator=generator).requires_grad_() for heads in (8, 4, 4)]
    output = sdpa._Branches.apply(*leaves, segments, None)
    weights = torch.randn(output.shape, generator=generator)

    def backward():
        return torch.autograd.grad(output, leaves, weights, retain_graph=True)

    return backward(), peak_live_bytes(backward) - sum(x.numel() * x.element_size() for x in leaves)


def test_large_gradients_of_heads_are_made_a_few_heads_at_once_in_fewer_bytes(monkeypatch):
    of_one = 1400 * 16 * 4 * (2 + 1 + 1)  # a head of keys and the two of queries that share it, of the longest branch
    expected, plain = branch_gradients(2**22, monkeypatch)
    assert plain >= 4 * of_one
    for most, at_once in ((2 * of_one, 2), (1, 1)):
        found, peak = branch_gradients(most, monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        copied = at_once * of_one / 2  # what reaches the output of these heads, which the kernel wants in one piece
        assert plain - peak == pytest.approx((4 - at_once) * of_one - copied, rel=0.02)


@pytest.mark.parametrize(
    ("group", "threads", "at_once"),
    [(2, 1, 1), (2, 2, 1), (2, 3, 3), (2, 5, 2), (2, 64, 4), (3, 2, 2), (3, 16, 4), (1, 2, 2), (1, 4, 4)],
)
def test_heads_are_only_split_where_the_threads_take_no_longer(group, threads, at_once, monkeypatch):
    """Of 4 heads of keys: 3 heads of queries that share one would leave one of two threads idle half of the time."""
    monkeypatch.setattr(sdpa, "MAX_GRADIENT_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key = torch.empty(1, 4 * group, 1, 16), torch.empty(1, 4, 1, 16)
    found = list(sdpa._heads_at_once(query, key, [(0, 1, 0, 0)]))
    assert [shared.start for _, shared in found] == list(range(0, 4, at_once))
    assert [(heads.start, heads.stop) for heads, _ in found] == [(group * s.start, group * s.stop) for _, s in found]


# Layouts


def test_gradients_of_copied_rows_are_summed_in_fp32():
    """256 + 1 is 256 in bf16; five times one more must not get lost."""
    from fastdpo import TokenizedGroup

    group = TokenizedGroup([1], [[2], [3], [4], [5], [6]], preferences=[(0, 1)])
    varlen = pack_pairs([group]).varlen
    rows = torch.zeros(6, 1, dtype=torch.bfloat16, requires_grad=True)
    keys = gather_keys(rows, varlen)
    grad = torch.ones_like(keys)
    grad[0] = 256
    keys.backward(grad)
    assert rows.grad[:, 0].tolist() == [260, 1, 1, 1, 1, 1]


def test_rows_are_not_copied_where_no_prefix_is_shared():
    batch = pack_pairs(GROUPS, prefix_sharing=False)
    rows = torch.zeros(batch.input_ids.shape[1], 1)
    assert gather_keys(rows, batch.varlen) is rows


def test_the_mask_of_a_row_lets_every_branch_see_its_prefix_and_itself():
    from fastdpo import TokenizedPair

    batch = pack_pairs([TokenizedPair([1, 2], [3, 4], [5, 6]), TokenizedPair([7], [8], [9])])
    layout = PackedLayout(batch.segments, batch.varlen)
    rows = ["".join("x" if seen else "." for seen in row) for row in layout.row_mask(None).tolist()]
    assert rows == [
        "x........",
        "xx.......",
        "xxx......",
        "xxxx.....",
        "xx..x....",
        "xx..xx...",
        "......x..",
        "......xx.",
        "......x.x",
    ]
    windowed = ["".join("x" if seen else "." for seen in row) for row in layout.row_mask(2).tolist()]
    assert windowed[3:6] == ["..xx.....", ".x..x....", "....xx..."]


def test_layers_that_only_a_mask_reaches_can_be_packed_when_asked():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["stablelm"](**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    prepare_model(model, attention_backend="mask")
    assert_same(model, pack_pairs(GROUPS), expected.detach(), expected_grads)


# On a GPU

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_call(dtype, backend, window, head_dim=64):
    batch = pack_pairs(GROUPS * 8).to("cuda")
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, batch.input_ids.shape[1], head_dim) for heads in (8, 2, 2, 8)]
    *inputs, weight = (torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).to(dtype) for shape in shapes)
    layout = PackedLayout(batch.segments, batch.varlen, backend)
    leaves = [x.requires_grad_() for x in inputs]
    call = AttentionCall(*leaves, layout, dropout=0.0, scale=0.2, window=window, softcap=None, sinks=None)
    return call, leaves, weight.transpose(1, 2)


def output_and_gradients(dtype, backend, window, head_dim=64):
    call, leaves, weight = random_call(dtype, backend, window, head_dim)
    output = BACKENDS[backend].attend(call)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    *every_pair(backend=["varlen", "flash2", "flash3", "flash4"], window=[None, 3], head_dim=[64, 20, 128])
)
def test_a_kernels_error_is_at_most_twice_that_of_plain_attention(backend, window, head_dim):
    refusal = BACKENDS[backend].refusal(random_call(torch.bfloat16, backend, window, head_dim)[0])
    if refusal is not None:
        assert backend != "varlen", refusal
        pytest.skip(refusal)
    exact = output_and_gradients(torch.float64, "mask", window, head_dim)
    plain = output_and_gradients(torch.bfloat16, "mask", window, head_dim)
    ours = output_and_gradients(torch.bfloat16, backend, window, head_dim)
    for name, x, p, o in zip(("output", "dq", "dk", "dv"), exact, plain, ours, strict=True):
        error, plain_error = ((y.double() - x).norm() / x.norm() for y in (o, p))
        assert error <= 2 * plain_error + 1e-7, f"{name}: {error:.1e}, plain {plain_error:.1e}"


@pytest.mark.gpu
@no_gpu
def test_varlen_attention_never_waits_for_the_device():
    call, leaves, weight = random_call(torch.bfloat16, "varlen", None)
    BACKENDS["varlen"].attend(call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad((BACKENDS["varlen"].attend(call) * weight).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
