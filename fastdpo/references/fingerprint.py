"""A short digest of a model: two models share a digest only if they give the same log-probs.

In: a causal LM, bare, with an adapter, quantized, or with weights offloaded by accelerate to memory or disk. Out: facts
in words (class, config, weights, adapter, dtype, versions) and their key. Every byte of every weight counts, so a
single training step changes the key. Names of wrappers do not count, so a LoRA that is switched off does not change the
key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.head import resident
from fastdpo.modeling.vocab_rows import is_dtensor

CACHE_VERSION = 1  # of the meaning of keys and the format of stored log-probs
_PIECE_BYTES = 2**24  # of a weight, hashed by one thread
_NUM_THREADS = 8
# fields of a config about a model's origin or generation, which change no log-prob
_WITHOUT_EFFECT = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "id2label", "label2id"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "return_dict", "output_hidden_states", "output_attentions"),
    *("attn_implementation", "gradient_checkpointing"),
    *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),  # off: eval mode
    *("base_model_name_or_path", "inference_mode", "lora_dropout"),  # of an adapter
}


def digest(*parts: bytes) -> str:
    """A digest of 32 hexadecimal digits over the parts and their lengths."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def reference_facts(model: Any, *, adapter: str | None, computed_in: str) -> dict[str, str]:
    """Everything that the log-probs of a sequence depend on besides its tokens.

    Args:
        model: the reference, or a policy before training.
        adapter: name of the active PEFT adapter; None if there is none or it is off.
        computed_in: the dtype of autocast, or "no autocast".
    """
    bare = bare_model(model)
    facts = {
        "cache_version": str(CACHE_VERSION),
        "transformers": transformers.__version__,
        "model": type(bare).__name__,
        "config": digest(_json(_with_effect(bare.config.to_dict()))),
        "weights": _weights_digest(model, adapter),
        "computed_in": computed_in,
    }
    if adapter is not None:
        facts["adapter"] = digest(_json(_with_effect(model.peft_config[adapter].to_dict())))
    return facts


def reference_key(facts: Mapping[str, str]) -> str:
    """The name of the cache folder for log-probs with these facts."""
    return digest(_json(dict(facts)))


def _json(value: Any) -> bytes:
    def as_json(other: Any) -> Any:  # PEFT's configs hold sets, whose order differs from process to process
        return sorted(map(str, other)) if isinstance(other, set | frozenset) else str(other)

    return json.dumps(value, sort_keys=True, default=as_json).encode()


def _with_effect(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        str(name): _with_effect(value)
        for name, value in config.items()
        if name not in _WITHOUT_EFFECT and not str(name).startswith("_")
    }


def _weights_digest(model: nn.Module, adapter: str | None) -> str:
    whole = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for name, tensor in _weights(model, adapter):
            about = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
            whole.update(about.encode() + _tensor_digest(tensor, threads))
    return whole.hexdigest()


def _weights(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """Weights and saved buffers of the bare model, by their names without PEFT; each is on a device while it is read.

    Inactive adapters are skipped.
    """
    bare = bare_model(model)
    adapters = {f".{name}." for name in getattr(model, "peft_config", {})}
    for path, module in bare.named_modules():
        with resident(module):
            for name, tensor in _saved_tensors(module):
                full = f"{path}.{name}."
                if not any(part in full and part != f".{adapter}." for part in adapters):
                    yield full.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the module itself saves: weights, buffers, and the scales of quantized weights."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    for name, value in saved.items():
        if isinstance(value, Tensor):
            yield from _plain_tensors(name, value)


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the tensors inside a wrapper such as torchao's quantized weights."""
    if is_dtensor(tensor):  # cut over processes: the digest is that of the whole weight
        tensor = tensor.full_tensor()
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _tensor_digest(tensor: Tensor, threads: Executor) -> bytes:
    flat = tensor.detach().as_subclass(Tensor).contiguous().flatten()
    step = max(_PIECE_BYTES // max(flat.element_size(), 1), 1)
    pieces = list(flat.split(step)) if flat.numel() else []
    return b"".join(threads.map(_piece_digest, pieces))


def _piece_digest(piece: Tensor) -> bytes:
    return hashlib.blake2b(piece.cpu().view(torch.uint8).numpy().data, digest_size=16).digest()
