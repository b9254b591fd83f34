"""A reference that is larger than the memory it may take: its weights come from disk, its log-probs stay the same."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import make_llama, make_tokenizer
from tiny_runs import losses, tiny_config, tiny_trainer

from fastdpo import TokenizedPair, pack_pairs, packed_logps
from fastdpo.modeling import check_packing
from fastdpo.references.fingerprint import reference_facts
from fastdpo.training.setup import reference as reference_module
from fastdpo.training.setup.reference import asked_once, too_large_to_hold, weight_bytes


@pytest.fixture
def large(tmp_path):
    """A reference of five layers on disk, and its size."""
    model = make_llama(seed=9, num_hidden_layers=5).eval()
    model.save_pretrained(tmp_path / "large")
    return model, str(tmp_path / "large"), weight_bytes(model)


def config(tmp_path, **settings):
    return tiny_config(tmp_path / "out", ref_cache_dir=str(tmp_path / "cache"), **settings)


def trainer(tmp_path, ref_model, **settings):
    return tiny_trainer(tmp_path / "out", ref_model=ref_model, ref_cache_dir=str(tmp_path / "cache"), **settings)


def resident_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_losses_with_a_reference_on_disk_are_those_of_one_in_memory(tmp_path, large, share, monkeypatch):
    model, path, size = large
    held = []
    facts = reference_module.reference_facts
    monkeypatch.setattr(
        reference_module,
        "reference_facts",
        lambda model, **kw: (held.append(resident_bytes(model)), facts(model, **kw))[1],
    )
    offloaded = trainer(tmp_path, path, ref_max_memory={"cpu": int(share * size)})
    assert offloaded.reference.mode == "cached"
    assert "exceed ref_max_memory" in offloaded.reference_reason
    assert len(held) == 1
    assert held[0] <= share * size
    live = trainer(tmp_path, copy.deepcopy(model))
    assert live.reference.mode == "frozen"
    assert losses(offloaded) == pytest.approx(losses(live), abs=1e-5)


def test_a_given_model_beyond_the_limit_is_streamed_and_comes_back_as_it_was(tmp_path, large):
    model, _, size = large
    given = copy.deepcopy(model)
    args = config(tmp_path, ref_max_memory={"cpu": size // 2})
    with asked_once(args, make_llama(), given, make_tokenizer()) as asked:
        assert asked.is_offloaded
        assert all(p.is_meta for p in given.parameters())
        batch = pack_pairs([TokenizedPair([1, 2], [3, 4], [5])])
        sums = asked.reference.sums(given, batch)
    torch.testing.assert_close(sums, packed_logps(model, batch).sequences.sums.detach())
    for before, after in zip(model.parameters(), given.parameters(), strict=True):
        assert torch.equal(before, after)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(given(input_ids=ids).logits, model(input_ids=ids).logits)
    torch.testing.assert_close(packed_logps(given, batch).sequences.sums, packed_logps(model, batch).sequences.sums)
    assert losses(trainer(tmp_path, given, ref_max_memory={"cpu": size // 2})) == pytest.approx(
        losses(trainer(tmp_path, model)), abs=1e-5
    )


def test_a_reference_within_the_limit_is_held(tmp_path, large):
    _, path, size = large
    assert trainer(tmp_path, path, ref_max_memory={"cpu": size}).reference.mode == "frozen"


def test_a_copy_of_the_policy_that_exceeds_the_limit_is_cached_from_the_policy(tmp_path):
    fast = trainer(tmp_path, None, ref_max_memory={"cpu": "1KB"})
    assert fast.reference.mode == "cached"
    assert losses(fast)[0] == pytest.approx(0.693147, abs=1e-5)


def test_asking_for_a_live_reference_beyond_the_limit_is_an_error(tmp_path, large):
    with pytest.raises(ValueError, match=r"reference must be 'cached' or 'auto' here, got 'frozen'.*exceed"):
        trainer(tmp_path, large[1], ref_max_memory={"cpu": "1KB"}, reference="frozen")


def test_the_size_of_a_named_model_is_known_without_loading_it(large):
    model, path, size = large
    assert weight_bytes(path) == size
    assert weight_bytes(path, {"dtype": torch.bfloat16}) == size / 2
    assert weight_bytes(model) == size


def test_a_limit_on_another_device_limits_nothing_here(tmp_path, large):
    assert too_large_to_hold(config(tmp_path, ref_max_memory={0: "1KB"}), make_llama(), large[1]) == ""


@pytest.mark.parametrize(
    ("index", "num_processes", "expected"),
    [
        (0, 1, {0: 100, "cpu": 9}),
        (1, 1, {1: 50, "cpu": 9}),
        (2, 1, {"cpu": 9}),
        (0, 4, {0: 50, "cpu": 9}),
        (3, 4, {3: 50, "cpu": 9}),
    ],
)
def test_every_process_has_the_same_limit_for_its_own_gpu(index, num_processes, expected):
    limits = {0: 100, 1: 50, "cpu": 9}
    args = SimpleNamespace(ref_max_memory=limits, device=torch.device("cuda", index), world_size=num_processes)
    assert reference_module._own_limits(args) == expected
    on_cpu = SimpleNamespace(ref_max_memory=limits, device=torch.device("cpu"), world_size=num_processes)
    assert reference_module._own_limits(on_cpu) == {"cpu": 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_model_has_the_key_of_the_same_model_in_memory_and_passes_the_self_check(tmp_path, large, dtype):
    _, path, size = large
    args = config(tmp_path, ref_max_memory={"cpu": size // 10}, model_init_kwargs={"dtype": dtype})
    in_memory = make_llama(seed=9, num_hidden_layers=5).to(dtype)
    with asked_once(args, None, path, make_tokenizer()) as asked:
        assert asked.is_offloaded
        assert all(p.is_meta for p in asked.model.parameters())
        assert check_packing(asked.model).ok
        facts = reference_facts(asked.model, adapter=None, computed_in="no autocast")
    assert facts == reference_facts(in_memory, adapter=None, computed_in="no autocast")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"disk": "1GB"}, "must name GPUs by number, or 'cpu'"),
        ({"cpu": "much"}, "amounts like '20GiB'"),
        ("[]", "JSON object"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path, limits, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, ref_max_memory=limits)
