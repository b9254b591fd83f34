"""What processes that compute packed rows together do: train with DDP or FSDP2 over all of them, run models of several
kinds, count what they send and keep.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from hybrids import WholeDoubles, build_any
from sharded_runs import FSDP2, resume, shards_on_cpus, train
from tiny import make_llama, make_rows
from tiny_runs import losses, tiny_trainer

from fastdpo import TokenizedPair
from fastdpo.data.batches.layout import lay_out
from fastdpo.data.batches.packing import pack_layouts
from fastdpo.data.batches.shares import with_shares
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import PackingCheck, check_packing, packed_loss, prepare_model
from fastdpo.modeling.sequence_check import check_sequence_parallel
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.training.callbacks.samples import SAMPLES_FILE
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only


def run(folder, what, **case):
    """One case of a list that is run by the same processes."""
    if what != "trains" and not dist.is_initialized():
        dist.init_process_group("gloo")
    return {
        "trains": train_in_parts,
        "resumes": resume_in_parts,
        "samples": sample,
        "evaluates": evaluate,
        "is right for": gradient_error,
        "refuses": refusal,
        "finds a leak": find_leak,
        "sends": bytes_sent,
        "keeps": bytes_kept,
    }[what](folder, **case)


def train_in_parts(folder, mode, steps=1, size=2, num_processes=2, shards=False):
    """As `sharded_runs.train`, in groups of `size` processes."""
    num_rows = 4 if mode in ("accumulation", "uneven pairs") else 12
    more = {"sequence_parallel_size": size, "per_device_train_batch_size": num_rows // (num_processes // size)}
    if shards:
        shards_on_cpus()
        more |= FSDP2
    return train(folder, mode, steps, **more)


def resume_in_parts(folder, mode, size=2, kind=None):
    return resume(folder, mode, kind, sequence_parallel_size=size)


def sample(folder, size=2):
    """Losses and samples of a run whose reference moves."""
    trainer = tiny_trainer(
        folder,
        sequence_parallel_size=size,
        eval_dataset=Dataset.from_list(make_rows(4, seed=1)),
        eval_strategy="steps",
        eval_steps=2,
        num_eval_samples=2,
        eval_sample_tokens=4,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        optim="sgd",
        learning_rate=0.1,
    )
    found = losses(trainer)
    return {"losses": found, "samples": Path(folder, SAMPLES_FILE).read_text().splitlines()}


def evaluate(folder, size=2):
    """Of 5 rows in batches of 2; then the logs of a training stream and of two epochs."""
    predictions = []

    def compute_metrics(prediction):
        predictions.append(prediction.predictions["chosen_logps"].tolist())
        return {"first_length": int(prediction.label_ids[0, 0])}

    trainer = tiny_trainer(
        folder,
        sequence_parallel_size=size,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_dataset=Dataset.from_list(make_rows(5, seed=1)),
        train_dataset=Dataset.from_list(make_rows(16)).to_iterable_dataset(),
        compute_metrics=compute_metrics,
        include_num_input_tokens_seen="all",
    )
    evaluated = trainer.evaluate()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "eval": evaluated,
        "predictions": predictions[-1],
        "logs": logs,
        "seen": trainer.state.num_input_tokens_seen,
    }


def group_of(size):
    return SequenceGroup(dist.new_subgroups(group_size=size)[0])


def batch_of(lengths, num_processes, *, prefix_sharing=True):
    """Pairs of random tokens, with these lengths of prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(3)

    def draw(length):
        return torch.randint(32, (length,), generator=generator).tolist()

    pairs = [TokenizedPair(*map(draw, some)) for some in lengths]
    layouts = [lay_out(pair, (i, i), prefix_sharing=prefix_sharing) for i, pair in enumerate(pairs)]
    return with_shares(pack_layouts(layouts, multiple_of=num_processes), num_processes)


def loss_of(sums, lengths, sequences, pairs, **statistics):
    return -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2]).sum()


LENGTHS = ((9, 14, 3), (2, 5, 21), (1, 1, 1))


def gradients(model, batch, **settings):
    """Loss and gradients of a batch, those of its experts' load too; fp64."""
    loss, logps = packed_loss(model, batch, loss_of, **settings)
    if logps.aux_loss is not None:
        loss = loss + 0.1 * logps.aux_loss
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([grad.double().flatten() for grad in grads])


def gradient_error(folder, model_type="llama", size=2, **overrides):
    """Relative errors of loss and gradient against the whole row on one process; in fp64, so that no rounding hides."""
    model = (make_llama(**overrides) if model_type == "llama" else build_any(model_type)).double()
    group, check = group_of(size), check_packing(model)
    check_sequence_parallel(model, group, check)
    whole = batch_of(LENGTHS, 1)
    has_router = hasattr(model, "num_experts")
    settings = {"router_aux_loss": has_router}
    with nullcontext() if has_router else WholeDoubles():  # norms would compute in fp32; so does the router's loss
        expected_loss, expected = gradients(model, whole, **settings)
        loss, found = gradients(model, batch_of(LENGTHS, size), **settings)
    found = group.gathered(found).sum(0) / group.size  # each process is a loss of its own
    return [float(abs(loss / expected_loss - 1)), float((found - expected).norm() / expected.norm())]


def refusal(folder, model_type=None, size=2, **overrides):
    """The message of what is refused: a model, or a run of the tiny llama with overrides of its config."""
    try:
        if model_type is None:
            tiny_trainer(folder, make_llama(**overrides), sequence_parallel_size=size)
        else:
            model = build_any(model_type)
            check_sequence_parallel(model, group_of(size), check_packing(model))
    except ValueError as error:
        return str(error)
    return "went on"


def find_leak(folder, size=2):
    """The message for a model that mixes neighbouring rows since packing was checked."""
    model = prepare_model(make_llama())
    check_packing(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    try:
        check_sequence_parallel(model, group_of(size), PackingCheck(True, 0.0, ""))
    except ValueError as error:
        return str(error)
    return "went on"


def bytes_sent(folder, heads, lengths, size=2, autocast=False, checkpoints=False, outputs=()):
    """By collective, the bytes that this process sends to others in forward, and in backward."""
    model = prepare_model(make_llama(num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=64))
    group, sent = group_of(size), {}
    prepare_model(model, sequence_group=group)
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable()
    originals = dist.all_to_all_single, dist.all_gather_into_tensor

    def exchange(received, blocks, group=None, **more):
        sent["exchanged"] = sent.get("exchanged", 0) + blocks.numel() * blocks.element_size() * (size - 1) // size
        return originals[0](received, blocks, group=group, **more)

    def gather(received, values, group=None, **more):
        sent["gathered"] = sent.get("gathered", 0) + values.numel() * values.element_size() * (size - 1)
        return originals[1](received, values, group=group, **more)

    batch, found = batch_of(lengths, size), []
    dist.all_to_all_single, dist.all_gather_into_tensor = exchange, gather
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _ = packed_loss(model, batch, loss_of, outputs=outputs)
        found.append(dict(sent))
        sent.clear()
        loss.backward()
        found.append(dict(sent))
    finally:
        dist.all_to_all_single, dist.all_gather_into_tensor = originals
    return {"forward": found[0], "backward": found[1], "tokens": batch.input_ids.numel(), "rows": batch.shares.longest}


def bytes_kept(folder, size=2):
    """Bytes that autograd keeps for backward, beside weights: of a pair in parts, and whole."""
    model = prepare_model(make_llama(max_position_embeddings=2048))
    prepare_model(model, sequence_group=group_of(size))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(batch):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            packed_loss(model, batch, loss_of, grad_in_forward=False)
        return sum(nbytes for nbytes, _ in storages.values())

    def step(batch):
        packed_loss(model, batch, loss_of)[0].backward()
        model.zero_grad(set_to_none=True)

    def pair(num_processes):  # without branches, which need a mask on a CPU
        return batch_of([(200, 300, 324)], num_processes, prefix_sharing=False)

    parts, mode = pair(size), fake_mode()
    shape = RowShape(parts.segments, parts.shares.longest, None, size)
    estimate = dry_step(shape_only(model, mode), shape, mode, impl="tiled", varlen=False).total
    peak = peak_live_bytes(lambda: step(parts))
    return {"parts": kept(parts), "whole": kept(pair(1)), "peak": peak, "estimate": estimate}
