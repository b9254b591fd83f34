"""The self-check on the attention and the precision of the run. What it finds in architectures is in
test_packed_logps.py.
"""

import functools

import pytest
import torch
from test_attention_backends import emulated  # noqa: F401  the fixture
from test_packed_logps import UNPACKABLE, build
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from varlen_emulation import EmulatedVarlen, varlen_attn_2_13

from fastdpo import prepare_model
from fastdpo.modeling import check_packing
from fastdpo.modeling.packed import attention_backend


def test_it_says_what_attention_the_run_will_have_why_and_how_long_it_took():
    model = prepare_model(build("llama"))
    check_packing(model)
    check = check_packing(model)  # imports are paid for
    assert check.ok
    assert check.backends == {"sdpa": "flash3, flash4, flash2, varlen: runs on cuda only"}
    assert 0 < check.seconds < 1
    assert str(check).startswith("sdpa, one SDPA call per branch (flash3, flash4, flash2, varlen: runs on cuda only);")
    assert f"checked in {check.seconds:.2g} s" in str(check)


def test_it_leaves_the_setting_of_the_model_as_it_was():
    model = prepare_model(build("llama"), attention_backend="mask")
    assert check_packing(model).backends == {"mask": "asked for"}
    assert attention_backend(model) == "mask"


def test_a_kernel_that_is_wrong_on_this_machine_is_noticed(emulated):  # noqa: F811
    @functools.wraps(varlen_attn_2_13)
    def sees_one_token_ahead(*args, window_size, **kwargs):
        return varlen_attn_2_13(*args, window_size=(window_size[0], 1), **kwargs)

    assert check_packing(build("llama")).ok
    emulated("varlen", EmulatedVarlen(sees_one_token_ahead))
    check = check_packing(build("llama"))
    assert not check.ok
    assert check.reason.startswith("with attention by varlen in float32, packed log-probs differ from separate ones by")
    assert "attention_backend='sdpa'" in check.reason


def test_a_kernel_that_raises_leaves_padded_batches(emulated):  # noqa: F811
    def broken(*args, window_size, scale, enable_gqa=False):
        raise RuntimeError("no kernel image is available")

    emulated("varlen", EmulatedVarlen(broken))
    check = check_packing(build("llama"))
    assert not check.ok
    assert "no kernel image is available" in check.reason


def test_a_backend_asked_for_by_name_that_cannot_run_raises():
    model = prepare_model(build("llama"), attention_backend="varlen")
    with pytest.raises(ValueError, match="attention_backend 'varlen' cannot run this model here: varlen: runs on cuda"):
        check_packing(model)
    assert attention_backend(model) == "varlen"


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_the_runs_backend_is_checked_in_the_runs_precision(weights, emulated):  # noqa: F811
    dtypes = set()

    def recording(query, *args, scale=None, window_size=(-1, -1), enable_gqa=False):
        dtypes.add(query.dtype)
        return varlen_attn_2_13(query, *args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    emulated("varlen", EmulatedVarlen(recording))
    check = check_packing(build("llama").to(weights), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert check.ok, check.reason
    assert set(check.backends) == {"varlen"}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["stablelm", "lfm2", "mamba"])
def test_a_mask_over_the_row_reaches_layers_that_drop_other_arguments_but_no_other_mixing(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**UNPACKABLE[model_type])).eval()
    assert not check_packing(model).ok
    assert check_packing(prepare_model(model, attention_backend="mask")).ok == (model_type == "stablelm")
