"""Any setting, any value of its type: refused by name, or the same config again after YAML and the command's parser."""

import dataclasses
import math
import traceback
import types
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from fuzzing import assert_ours, fuzz
from hypothesis import strategies as st
from values import texts

from fastdpo.cli.arguments import TYPES, parse
from fastdpo.data.forms.formats import FORMAT_NAMES
from fastdpo.losses import DIVERGENCES, LOSSES
from fastdpo.training import DPOConfig

# those that reach for a device, a network or a plugin of this process
LEFT_OUT = (
    *("output_dir", "use_cpu", "report_to", "push_to_hub", "full_determinism", "tf32", "torch_compile", "deepspeed"),
    *("torch_compile_backend", "torch_compile_mode", "ddp_backend", "parallelism_config", "accelerator_config"),
    *("fsdp", "fsdp_config", "local_rank", "debug", "activation_offloading", "bf16_full_eval", "fp16_full_eval"),
    *("bf16", "fp16", "hub_token", "trackio_space_id", "project"),
)
FIELDS = {f.name: f for f in dataclasses.fields(DPOConfig) if f.init and f.name not in LEFT_OUT}
HINTS = get_type_hints(DPOConfig)
WORDS = (
    *LOSSES,
    *DIVERGENCES,
    *FORMAT_NAMES,
    *("packed", "padded", "auto", "none", "None", "raise", "drop", "warn", "truncate", "keep_end", "frozen", "cached"),
    *("adapter", "steps", "epoch", "no", "best", "tiled", "linear", "cosine", "adamw_torch", "sgd", "random", "{}"),
    *('{"a": 1}', "[1", "prompt=question", "ignore=a,b", "1.5", "1e3", "true", "null", "~", "- a", "a: b", "#", "0x10"),
)
BY_TYPE = {
    bool: st.booleans(),
    int: st.one_of(st.integers(-2, 9), st.integers()),
    float: st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-7, 3.0]), st.floats()),
    str: st.one_of(st.sampled_from(WORDS), texts),
    type(None): st.none(),
}
json_dicts = st.dictionaries(
    st.text("ab", max_size=2), st.one_of(st.integers(0, 3), st.text("ab", max_size=2)), max_size=2
)


def values_of(hint):
    """Values of a type annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of(*map(values_of, get_args(hint)))
    if get_origin(hint) is list or hint is list:
        return st.lists(values_of((get_args(hint) or (str,))[0]), max_size=3)
    if get_origin(hint) is dict or hint is dict:
        return json_dicts
    if isinstance(hint, type) and issubclass(hint, str) and hint is not str:  # an enumeration
        return st.sampled_from([item.value for item in hint])
    return BY_TYPE.get(hint, st.none())


@st.composite
def settings(draw):
    """Up to four settings."""
    most = draw(st.sampled_from([1, 1, 2, 4]))  # one that is refused hides the others
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=most, unique=True))
    if draw(st.integers(0, 3)) == 0:
        names.append("loss_type")
    found = {name: draw(values_of(HINTS[name])) for name in names}
    if "loss_type" in found and draw(st.booleans()):
        found["loss_type"] = draw(st.lists(st.sampled_from(sorted(LOSSES)), min_size=1, max_size=2))
    return found


def same(a, b):
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def test_any_config_is_refused_by_name_or_the_same_after_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    fixed = {"output_dir": "out", "use_cpu": True, "report_to": "none"}

    def check(given):
        try:
            config = DPOConfig(**fixed, **given)
        except ValueError as error:
            if "transformers" not in traceback.extract_tb(error.__traceback__)[-1].filename:  # whose setting it may be
                assert_ours(error)
            return "refused"
        whole = {"model": "m", "dataset": "d", **fixed, **given}
        try:
            text = yaml.safe_dump(whole, allow_unicode=True)
            path.write_text(text, encoding="utf-8")
        except (UnicodeError, yaml.YAMLError):
            return "not text"
        _, _, read = parse("train", TYPES["train"], ["--config", str(path)])
        for name in FIELDS:
            assert same(getattr(config, name), getattr(read, name)), (name, getattr(config, name), getattr(read, name))
        return "same"

    outcomes = fuzz("configs", settings(), check)
    assert outcomes.get("same", 0) > 20, outcomes
