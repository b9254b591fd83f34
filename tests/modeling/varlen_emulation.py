"""Plain torch in the place of kernels that run on GPUs only: the same arguments, the same meaning, on any device.

Every function checks what the kernels demand (int32 lengths that cover the rows, the true maxima, head dims in eights)
and computes in at least fp32, one sequence at a time.
"""

import torch

from fastdpo.modeling.attention.varlen import FlashAttn, TorchVarlen


def attend_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window, softcap=0.0, sinks=None):
    """query (T, heads, D), key and value (K, kv_heads, D); `window` is (left, right), -1 or None for no limit."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(query), len(key)) == (len(query), len(value))
    assert query.shape[-1] % 8 == 0
    assert query.dtype == key.dtype == value.dtype
    left, right = (None if side in (None, -1) else side for side in window)
    wide = torch.promote_types(query.dtype, torch.float32)
    outputs = []
    for q, k, v in zip(
        query.split(cu_q.diff().tolist()),
        key.split(cu_k.diff().tolist()),
        value.split(cu_k.diff().tolist()),
        strict=True,
    ):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(wide) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        # the last query stands where the last key does
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= distance < -right if right is not None else hidden
        hidden |= distance > left if left is not None else hidden
        logits = logits.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)], dim=-1)
        weights = logits.softmax(-1)[..., : len(k)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype))
    return torch.cat(outputs)


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """Takes fewer heads of keys and values without saying so, as flash-attn itself does."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1]
    window = (-1, 0) if is_causal else (-1, -1)
    scale = query.shape[-1] ** -0.5
    return attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window)


def _flash(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size, softcap, sinks=None):
    window = (window_size[0], 0 if causal else window_size[1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attend_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=window, softcap=softcap, sinks=sinks)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _flash(q, k, v, *lengths, softmax_scale, causal, window_size, softcap)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _flash(q, k, v, *lengths, softmax_scale, causal, window_size, softcap)


def flash_attn_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    deterministic=False,
):
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _flash(q, k, v, *lengths, softmax_scale, causal, window_size, softcap, learnable_sink), None


class _OnAnything:
    """Lifts the limits of a GPU kernel, and keeps the arguments of its calls."""

    device_types = ("cpu",)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)

    def _run(self, query, key, value, call):
        self.num_calls += 1
        return super()._run(query, key, value, call)


class EmulatedVarlen(_OnAnything, TorchVarlen):
    def __init__(self, function=varlen_attn_2_13):
        self.load = lambda: function
        self.num_calls = 0


class EmulatedFlash(_OnAnything, FlashAttn):
    def __init__(self, generation, function=None):
        super().__init__(generation, capabilities=(8, 99))
        self.load = lambda: function or {2: flash_attn_2, 3: flash_attn_3, 4: flash_attn_4}[generation]
        self.num_calls = 0


EMULATIONS = {
    "varlen": EmulatedVarlen,
    "flash2": lambda: EmulatedFlash(2),
    "flash3": lambda: EmulatedFlash(3),
    "flash4": lambda: EmulatedFlash(4),
}
