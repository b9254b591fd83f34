"""The estimate of peak memory against what a step on the CPU allocates; optimizers against the state they make."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from releases import needs_activation_checkpointing
from tiny import make_llama, make_rows, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo import DPOConfig, DPOTrainer, TokenizedPair, pack_pairs
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_loss, prepare_model
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.tiles import use_tiles
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.memory import estimate as memory
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only
from fastdpo.training.memory.estimate import estimate_peak_memory, model_bytes, optimizer_state_bytes
from fastdpo.training.setup.models import disable_dropout

TOLERANCE = 0.15  # what the summary promises; packed steps were within 4%, in fp32 and under bf16 autocast within 2%
MODELS = {
    "small": {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3},
    "wide": {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2},
    "large-head": {"vocab_size": 20011, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
}


def make_model(name, lora, checkpointing, **overrides):
    model = make_llama(**{"num_attention_heads": 4, "num_key_value_heads": 2, **MODELS[name], **overrides})
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    if checkpointing:
        bare = bare_model(model)
        getattr(bare, "activation_checkpointing_enable", bare.gradient_checkpointing_enable)()
    return prepare_model(model).train()


def make_batch(num_pairs, prompt, response, vocab_size):
    draw = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(vocab_size, (length,), generator=draw).tolist()

    return pack_pairs([TokenizedPair(ids(prompt), ids(response), ids(response)) for _ in range(num_pairs)])


def measured_and_estimated(model, batch, autocast=None, accumulates=False):
    """Bytes beyond the weights of forward and backward on one batch."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def backward():
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            loss, _ = packed_loss(model, batch, lambda sums, *_: sums.sum())
        loss.backward()

    def step():
        for parameter in trained:
            parameter.grad = None
        for _ in range(2 if accumulates else 1):
            backward()
        grads = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        return grads

    measured = peak_live_bytes(step)
    mode = fake_mode()
    row = RowShape(batch.segments, len(batch.labels))
    settings = {"impl": "tiled", "varlen": False, "autocast": autocast, "accumulates": accumulates}
    return measured, dry_step(shape_only(model, mode), row, mode, **settings)


CASES = [
    pytest.param(name, lora, checkpointing, lengths, marks=[pytest.mark.slow] if name == "wide" else [])
    for name in MODELS
    for lora in (False, True)
    for checkpointing in (False, True)
    for lengths in ((4, 30, 20), (2, 300, 150))
]


@pytest.mark.parametrize(("name", "lora", "checkpointing", "lengths"), CASES)
def test_a_step_takes_what_was_estimated(name, lora, checkpointing, lengths):
    model = make_model(name, lora, checkpointing)
    measured, estimated = measured_and_estimated(model, make_batch(*lengths, MODELS[name]["vocab_size"]))
    assert estimated.total == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "modules_to_save"])
def test_an_adapter_on_the_head_takes_what_was_estimated(whole, autocast):
    """LoRA a copy of the head's weight, a head that is trained whole its gradient."""
    settings = {"modules_to_save": ["lm_head"]} if whole else {}
    targets = ["q_proj"] if whole else ["lm_head", "q_proj"]
    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = prepare_model(get_peft_model(make_model("large-head", lora=False, checkpointing=False), config)).train()
    batch = make_batch(2, 100, 50, MODELS["large-head"]["vocab_size"])
    measured, estimated = measured_and_estimated(model, batch, autocast)
    assert estimated.total == pytest.approx(measured, rel=0.1)


TILES = [
    pytest.param(False, None, id="full, fp32"),
    pytest.param(True, torch.bfloat16, id="LoRA, bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("lora", "autocast"), TILES)
def test_layers_in_tiles_take_what_was_estimated(lora, autocast):
    """A group of more rows than the head's workspace holds, as in a long pair: its log-probs come first."""
    model = make_model("small", lora, checkpointing=True, vocab_size=8000)
    if lora:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    precision = nullcontext if autocast is None else lambda: torch.autocast("cpu", dtype=autocast)
    batch = make_batch(1, 1500, 1000, 8000)
    measured, _ = measured_and_estimated(model, batch, autocast)
    use_tiles(model, 256, autocast=precision)
    in_tiles, estimated = measured_and_estimated(model, batch, autocast)
    assert estimated.total == pytest.approx(in_tiles, rel=0.05)
    assert in_tiles < measured  # with LoRA, the head is then the largest part


@pytest.mark.parametrize("name", ["wide", "large-head"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_of_weights_in_the_dtype_of_autocast_are_counted(name, lora, checkpointing):
    model, vocab_size = make_model(name, lora, checkpointing), MODELS[name]["vocab_size"]
    measured, estimated = measured_and_estimated(model, make_batch(2, 100, 50, vocab_size), autocast=torch.bfloat16)
    assert estimated.total == pytest.approx(measured, rel=0.05)
    assert estimated.casts > 0


@pytest.mark.parametrize("lora", [False, True])
def test_a_base_in_bf16_takes_what_was_estimated(lora):
    model = make_model("large-head", lora, checkpointing=True)
    for parameter in model.parameters():
        if not (lora and parameter.requires_grad):  # adapters stay in fp32
            parameter.data = parameter.data.bfloat16()
    measured, estimated = measured_and_estimated(model, make_batch(2, 100, 50, 20011), autocast=torch.bfloat16)
    assert estimated.total == pytest.approx(measured, rel=0.05)


def test_gradients_of_earlier_micro_batches_are_counted():
    model = make_model("wide", lora=False, checkpointing=False)
    batch = make_batch(2, 100, 50, 2000)
    measured, estimated = measured_and_estimated(model, batch, accumulates=True)
    assert estimated.total == pytest.approx(measured, rel=TOLERANCE)
    assert estimated.total > measured_and_estimated(model, batch)[1].total * 1.1


_SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "qwen3": _SHAPE,
    "gemma2": _SHAPE,  # softcap and sliding window
    "gpt_oss": {**_SHAPE, **_EXPERTS},  # sinks
    "mixtral": {**_SHAPE, **_EXPERTS},
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_layers_of_any_kind_take_what_was_estimated(model_type):
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config).train()
    disable_dropout(model)
    measured, estimated = measured_and_estimated(prepare_model(model), make_batch(3, 60, 40, 256))
    assert estimated.total == pytest.approx(measured, rel=TOLERANCE)


def test_tied_embeddings_have_one_gradient():
    model = make_model("large-head", lora=False, checkpointing=False, tie_word_embeddings=True)
    measured, estimated = measured_and_estimated(model, make_batch(2, 60, 40, 20011))
    assert estimated.total == pytest.approx(measured, rel=TOLERANCE)


def test_a_dry_run_changes_nothing_about_the_model():
    model = make_model("small", lora=True, checkpointing=True)
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    batch = make_batch(2, 5, 4, 1000)
    packed_loss(model, batch, lambda sums, *_: sums.sum())
    attention, mode = model.config._attn_implementation, fake_mode()
    dry = shape_only(model, mode)
    dry_step(dry, RowShape(batch.segments, len(batch.labels)), mode, impl="tiled", varlen=False)
    assert model.config._attn_implementation == attention
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad) == before[name][:2], name
        assert torch.equal(p, before[name][2]), name


def make_trainer(tmp_path, **settings):
    model = make_llama(vocab_size=32, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 8, **settings}
    args = DPOConfig(str(tmp_path), max_steps=2, save_strategy="no", **settings)
    return DPOTrainer(model, args=args, train_dataset=make_rows(40), processing_class=make_tokenizer())


@pytest.mark.parametrize("packing", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainers_step_takes_what_its_summary_says(tmp_path, packing, checkpointing):
    trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, packing=packing)
    estimate = estimate_peak_memory(trainer)
    assert dict(summary_lines(trainer))["peak memory"] == str(estimate)
    assert estimate.weights == estimate.reference == model_bytes(trainer.model)
    trainer.train()
    state = [x for s in trainer.optimizer.state.values() for x in s.values() if torch.is_tensor(x) and x.dim() > 0]
    assert estimate.optimizer == sum(x.numel() * x.element_size() for x in state)
    peak = 0
    for inputs in trainer.get_train_dataloader():
        trainer.model.zero_grad()
        peak = max(peak, peak_live_bytes(lambda inputs=inputs: _step(trainer, inputs)))
    within_step = estimate.total - estimate.weights - estimate.reference - estimate.optimizer
    assert within_step == pytest.approx(peak, rel=TOLERANCE)


def test_a_run_starts_also_where_nothing_can_be_estimated(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no shape for it\nand more")

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(memory, "dry_step", fails)
    assert dict(summary_lines(trainer))["peak memory"] == "not estimated: RuntimeError: no shape for it"


def _step(trainer, inputs):
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, inputs, 8)
    grads = [p.grad for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    return grads


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad"])
def test_the_optimizers_state_is_what_was_estimated(tmp_path, optim):
    trainer = make_trainer(tmp_path, optim=optim, reference_free=True)
    estimate = estimate_peak_memory(trainer)
    trainer.train()
    state = [x for s in trainer.optimizer.state.values() for x in s.values() if torch.is_tensor(x) and x.dim() > 0]
    made = sum(x.numel() * x.element_size() for x in state)
    trained = [(p, False) for p in trainer.model.parameters()]
    assert optimizer_state_bytes(optim, trained) == pytest.approx(made, rel=0.02, abs=1024)
    assert estimate.reference == 0


def test_8_bit_optimizers_keep_embeddings_and_small_tensors_in_fp32():
    weight, embedding, bias = (torch.nn.Parameter(torch.empty(shape)) for shape in ((256, 256), (1000, 64), (64,)))
    found = optimizer_state_bytes("adamw_bnb_8bit", [(weight, False), (embedding, True), (bias, False)])
    assert found == 65536 * 2 + 65536 * 8 // 256 + 8 * 64000 + 8 * 64
    assert optimizer_state_bytes("paged_adamw_8bit", [(weight, False), (embedding, True)]) == 0
    assert memory.optimizer_step_bytes("adamw_torch_fused", [weight], on_gpu=True) == 0
    assert memory.optimizer_step_bytes("adamw_torch", [weight, bias], on_gpu=True) == 4 * (65536 + 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        pytest.param({"activation_checkpointing": True}, marks=needs_activation_checkpointing),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            marks=needs_activation_checkpointing,
        ),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_checkpointing_by_either_name_lowers_the_estimate_and_reaches_the_model(tmp_path, settings):
    plain = estimate_peak_memory(make_trainer(tmp_path))
    trainer = make_trainer(tmp_path, **settings)
    estimate = estimate_peak_memory(trainer)
    assert estimate.activations < 0.8 * plain.activations
    trainer.train()
    layers = trainer.model.model.layers
    every = settings.get("activation_checkpointing_kwargs", {}).get("every_n_layers", 1)
    assert sum(layer.gradient_checkpointing for layer in layers) == 4 // every


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_bnb_8bit", "bitsandbytes"), ("paged_adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")],
)
def test_an_optimizer_without_its_package_is_refused_before_anything_else(tmp_path, monkeypatch, optim, package):
    find_spec = memory.importlib.util.find_spec
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError, match=f"optim='{optim}' needs {package}"):
        make_trainer(tmp_path, optim=optim)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: object())
    make_trainer(tmp_path, optim=optim)


def test_an_optimizer_that_is_given_needs_no_package_of_another(tmp_path):
    model = make_llama(vocab_size=32)
    args = DPOConfig(str(tmp_path), use_cpu=True, report_to=[], optim="adamw_bnb_8bit")
    given = (torch.optim.SGD(model.parameters()), None)
    rows = {"train_dataset": make_rows(8), "processing_class": make_tokenizer()}
    assert DPOTrainer(model, args=args, optimizers=given, **rows).optimizer is given[0]


@needs_activation_checkpointing
def test_offloaded_checkpoints_are_refused_where_they_cannot_be(tmp_path):
    offload = {"activation_checkpointing_kwargs": {"offload": True}}
    with pytest.raises(ValueError, match="must not hold offload on a CPU"):
        make_trainer(tmp_path, gradient_checkpointing=True, **offload)


class Linear4bit(torch.nn.Linear):
    """Stands in for bitsandbytes' layer, which is known by its name: two weights in a byte, in one column, and scales
    that belong to the weight and are no tensors of the module."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.quant_state = self.weight.quant_state = SimpleNamespace(absmax=torch.zeros(layer.weight.numel() // 64))

    def forward(self, x):
        raise AssertionError("a dry run must not reach bitsandbytes")


def as_peft_wraps_it(layer):
    """PEFT's layer around bitsandbytes' has the same name."""

    class Linear4bit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features
            self.lora_A = torch.nn.Linear(layer.in_features, 4, bias=False)
            self.lora_B = torch.nn.Linear(4, layer.out_features, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x.float())).to(x.dtype)

    return Linear4bit()


def test_4_bit_layers_are_stored_packed_and_run_in_bf16():
    model = make_llama(**MODELS["wide"]).to(torch.bfloat16).requires_grad_(False)
    in_bf16, before = shape_only(model, fake_mode()), model_bytes(model)
    num_packed = 0
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, torch.nn.Linear):
                num_packed += linear.weight.numel()
                setattr(layer.mlp, name, Linear4bit(linear))
    assert model_bytes(model) == before - num_packed * 2 + num_packed // 2 + num_packed // 64 * 4
    mode = fake_mode()
    dry = shape_only(model, mode)
    assert [(n, p.shape, p.dtype) for n, p in dry.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in in_bf16.named_parameters()
    ]
    dry.get_input_embeddings().requires_grad_(True)
    row = RowShape(((0, 100, 0, 0),), 50)
    assert dry_step(dry, row, mode, impl="tiled", varlen=False, autocast=torch.bfloat16).activations > 0


def test_adapters_around_4_bit_layers_stay_in_a_dry_run():
    model = make_llama(**MODELS["wide"]).to(torch.bfloat16).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = as_peft_wraps_it(Linear4bit(layer.mlp.down_proj))
    mode = fake_mode()
    dry = shape_only(model, mode)
    assert [n for n, p in dry.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    found = dry_step(dry, RowShape(((0, 100, 0, 0),), 50), mode, impl="tiled", varlen=False, autocast=torch.bfloat16)
    assert found.casts > 0  # of the adapters alone
