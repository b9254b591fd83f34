"""The private names of other packages that fastdpo reaches for: each is where the installed releases have it, and a new
one in the code has to be written down here, with the release in which it was last seen.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from tiny import make_llama

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("fastdpo/**/*.py"), *ROOT.glob("kernels/**/*.py")]
OF_NAMEDTUPLES = {"_asdict", "_fields", "_replace"}  # public, in spite of their look


def trainer_has(name):
    from transformers import Trainer

    return hasattr(Trainer, name)


def source_has(where, name):
    return name in inspect.getsource(where)


def accelerator():
    import accelerate

    return accelerate.Accelerator


def adapter_layer():
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def whole_layer():
    from peft.utils.other import AuxiliaryTrainingWrapper

    return AuxiliaryTrainingWrapper


def parser():
    import argparse

    made = argparse.ArgumentParser()
    made.add_argument("--known")
    return made


def small_dataset():
    from datasets import Dataset

    return Dataset.from_list([{"a": 1}])


def has_meshes():
    """The releases that train models which are cut when they are loaded."""
    import transformers

    return hasattr(transformers.PreTrainedModel, "_mesh_manager") or not trainer_has(
        "_sync_replicated_trainable_parameters"
    )


# name -> (package and release in which it was last seen, whether it is there)
TRAINER = {
    name: ("transformers 5.23", lambda name=name: trainer_has(name))
    for name in (
        "_get_num_items_in_batch",
        "_get_output_dir",
        "_get_train_sampler",
        "_clip_grad_norm",
        "_evaluate",
        "_get_grad_norm",
        "_init_training_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_maybe_log_save_evaluate",
        "_prepare_input",
        "_prepare_inputs",
        "_push_from_checkpoint",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "_track_num_input_tokens",
    )
}
PRIVATE = {
    **TRAINER,
    "_reset_state": (
        "accelerate 1.15",
        lambda: hasattr(__import__("accelerate.state").state.AcceleratorState, "_reset_state"),
    ),
    "_pack_args": (
        "triton 3.7.1",
        lambda: hasattr(__import__("triton.runtime.jit").runtime.jit.JITFunction, "_pack_args"),
    ),
    "_step_supports_amp_scaling": (
        "torch 2.13",
        lambda: torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)._step_supports_amp_scaling,
    ),
    "_n_gpu": ("transformers 5.23", lambda: source_has(__import__("transformers").TrainingArguments, "_n_gpu")),
    "_attn_implementation": ("transformers 5.23", lambda: hasattr(make_llama().config, "_attn_implementation")),
    "_attn_implementation_internal": (
        "transformers 5.23",
        lambda: hasattr(make_llama().config, "_attn_implementation_internal"),
    ),
    "_name_or_path": ("transformers 5.23", lambda: hasattr(make_llama().config, "_name_or_path")),
    "_gradient_checkpointing_func": (
        "transformers 5.23",
        lambda: has_after_checkpointing("_gradient_checkpointing_func"),
    ),
    "_model_mapping": (
        "transformers 5.23",
        lambda: hasattr(__import__("transformers").AutoModelForCausalLM, "_model_mapping"),
    ),
    "_ddp_params_and_buffers_to_ignore": (
        "torch 2.13",
        lambda: source_has(torch.nn.parallel.DistributedDataParallel, "_ddp_params_and_buffers_to_ignore"),
    ),
    "_mesh_manager": ("transformers 5.23", has_meshes),
    "_post_accumulate_grad_hooks": ("torch 2.13", lambda: hasattr(torch.zeros(1), "_post_accumulate_grad_hooks")),
    "_models": ("accelerate 1.15", lambda: source_has(accelerator().__init__, "self._models")),
    "_is_accelerate_prepared": ("accelerate 1.15", lambda: source_has(accelerator(), "_is_accelerate_prepared")),
    "_original_forward": ("accelerate 1.15", lambda: source_has(accelerator().prepare_model, "_original_forward")),
    "_hf_hook": ("accelerate 1.15", lambda: source_has(__import__("accelerate.hooks").hooks, "_hf_hook")),
    "_active_adapter": ("peft 0.21", lambda: "_active_adapter" in vars(adapter_layer())),
    "_disable_adapters": ("peft 0.21", lambda: "_disable_adapters" in vars(adapter_layer())),
    "_adapters": ("peft 0.21", lambda: source_has(whole_layer().__init__, "self._adapters")),
    "_ex_iterable": ("datasets 5.2", lambda: hasattr(small_dataset().to_iterable_dataset(), "_ex_iterable")),
    "_exit": ("Python 3.13", lambda: hasattr(__import__("os"), "_exit")),
    "_fingerprint": ("datasets 5.2", lambda: hasattr(small_dataset(), "_fingerprint")),
    "_indices": ("datasets 5.2", lambda: hasattr(small_dataset(), "_indices")),
    "_orig_mod": ("torch 2.13", lambda: hasattr(torch.compile(torch.nn.Linear(1, 1)), "_orig_mod")),
    "_cdata": ("torch 2.13", lambda: hasattr(torch.zeros(1).untyped_storage(), "_cdata")),
    "_parameters": ("torch 2.13", lambda: "_parameters" in vars(torch.nn.Linear(1, 1))),
    "_save_to_state_dict": ("torch 2.13", lambda: hasattr(torch.nn.Module, "_save_to_state_dict")),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "torch 2.13",
        lambda: hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "torch 2.13",
        lambda: hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    ),
    "_grouped_mm": ("torch 2.13", lambda: hasattr(torch.ops.aten, "_grouped_mm")),
    "_to_copy": ("torch 2.13", lambda: hasattr(torch.ops.aten, "_to_copy")),
    "torch._subclasses.fake_tensor": ("torch 2.13", lambda: can_import("torch._subclasses.fake_tensor")),
    "torch.utils._python_dispatch": ("torch 2.13", lambda: can_import("torch.utils._python_dispatch")),
    "torch.utils._pytree": ("torch 2.13", lambda: can_import("torch.utils._pytree")),
    "_actions": ("Python 3.13", lambda: hasattr(parser(), "_actions")),
    "_action_groups": ("Python 3.13", lambda: hasattr(parser(), "_action_groups")),
    "_group_actions": ("Python 3.13", lambda: hasattr(parser()._action_groups[0], "_group_actions")),
    "_option_string_actions": ("Python 3.13", lambda: hasattr(parser(), "_option_string_actions")),
    "_StoreFalseAction": ("Python 3.13", lambda: hasattr(__import__("argparse"), "_StoreFalseAction")),
    "_get_values": ("Python 3.13", lambda: hasattr(parser(), "_get_values")),
}


def has_after_checkpointing(name):
    model = make_llama()
    model.gradient_checkpointing_enable()
    return any(hasattr(module, name) for module in model.modules())


def can_import(name):
    from importlib import import_module

    return import_module(name) is not None


def trees():
    return [ast.parse(path.read_text()) for path in FILES]


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMEDTUPLES


def own_names(nodes):
    """What fastdpo's own code defines or assigns."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        targets = [part for target in targets for part in getattr(target, "elts", [target])]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id
            elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                yield target.attr


def used_names():
    """Private attributes of objects, private methods that a Trainer of ours overrides, private modules."""
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    own = set(own_names(nodes))
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.FunctionDef) and is_private(node.name) and trainer_has(node.name):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and any(map(is_private, (node.module or "").split("."))):
            yield node.module


def test_every_private_name_in_use_is_written_down():
    assert set(used_names()) - PRIVATE.keys() == set()


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_where_the_installed_release_has_it(name):
    last_seen, is_there = PRIVATE[name]
    assert is_there(), f"{name} is not there any more; it was last seen in {last_seen}"


def test_names_that_are_not_in_use_any_more_are_not_kept():
    text = "\n".join(path.read_text() for path in FILES)
    assert [name for name in PRIVATE if name.split(".")[-1] not in text] == []
