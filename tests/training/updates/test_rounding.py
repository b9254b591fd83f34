"""Updates of bf16 weights arrive on average or with their remainder, and a wrapped optimizer is the optimizer."""

import pytest
import torch
from closeness import relative_error
from releases import bitsandbytes_on_a_cpu

from fastdpo.training.updates.one_by_one import OneByOne
from fastdpo.training.updates.rounding import generator_of, round_stochastically, split_in_two


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_number_is_rounded_to_a_neighbour_with_the_probability_of_its_distance():
    # from 1 to 2, bf16 numbers are 1/128 apart
    exact = torch.full((100_000,), 1 + 0.25 / 128)
    found = round_stochastically(exact, make_generator())
    assert set(found.tolist()) == {1.0, 1 + 1 / 128}
    assert (found > 1).double().mean().item() == pytest.approx(0.25, abs=0.006)  # four standard errors
    negative = round_stochastically(torch.full((100_000,), -1 - 0.25 / 128), make_generator(1))
    assert (negative < -1).double().mean().item() == pytest.approx(0.25, abs=0.006)


def test_numbers_that_bf16_has_stay_and_so_do_those_that_are_not_finite():
    kept = torch.tensor([0.0, -0.0, 1.5, -3e-39, float("inf"), -float("inf")])
    assert torch.equal(round_stochastically(kept.bfloat16().float(), make_generator()).float(), kept.bfloat16().float())
    quiet_and_odd = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(quiet_and_odd.clone(), make_generator()).isnan().all()


def test_two_bf16_numbers_hold_sixteen_bits():
    exact = torch.randn(1000, generator=make_generator())
    nearest, missing = split_in_two(exact)
    assert torch.equal(nearest, exact.bfloat16())
    assert relative_error(nearest.float() + missing.float(), exact) < 2**-16
    infinite = split_in_two(torch.tensor([3.4e38, float("nan")]))
    assert infinite[1].tolist() == [0.0, 0.0]


def test_every_update_of_every_weight_has_its_own_random_numbers():
    cpu = torch.device("cpu")
    seen = {
        tuple(torch.rand(3, generator=generator_of(cpu, seed, weight, update)).tolist())
        for seed in range(3)
        for weight in range(4)
        for update in range(5)
    }
    assert len(seen) == 60


def weights(dtype=torch.bfloat16):
    generator = make_generator()
    shapes = [(8, 16), (16,), (3, 5)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def with_gradients(parameters, seed):
    generator = make_generator(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("fused", [False, True])
def test_without_rounding_the_optimizer_is_the_wrapped_one(fused):
    ours, theirs = weights(torch.float32), weights(torch.float32)
    wrapped = OneByOne(torch.optim.AdamW(ours, lr=0.1, fused=fused))
    plain = torch.optim.AdamW(theirs, lr=0.1, fused=fused)
    for step in range(3):
        for optimizer, parameters in ((wrapped, ours), (plain, theirs)):
            with_gradients(parameters, step)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "bitsandbytes"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_small_updates_arrive(optimizer, rounding):
    """A hundred updates of 1e-4 of a weight of 1, whose bf16 neighbours are 0.004 and 0.008 away."""

    def ran(rounding):
        parameter = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        if optimizer == "bitsandbytes":
            bnb = bitsandbytes_on_a_cpu()
            inner = bnb.optim.AdamW8bit([parameter], lr=1e-4, weight_decay=0.0)
        elif optimizer == "adamw":
            inner = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
        else:
            inner = torch.optim.SGD([parameter], lr=1e-4)
        wrapped = OneByOne(inner, rounding)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            wrapped.step()
        assert parameter.dtype == torch.bfloat16
        state = inner.state[parameter]
        return parameter.double() + state.get("rounded_off", 0.0), state

    lost, _ = ran("nearest")
    assert (lost == 1).all()
    found, state = ran(rounding)
    assert found.mean().item() == pytest.approx(0.99, abs=2e-4)
    assert all(v.dtype != torch.bfloat16 for k, v in state.items() if torch.is_tensor(v) and k != "rounded_off")


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("optimizer", ["adamw", "bitsandbytes"])
def test_a_state_dict_restores_every_bit(rounding, optimizer):
    def made():
        parameters = weights()
        if optimizer == "adamw":
            return parameters, OneByOne(torch.optim.AdamW(parameters, lr=1e-3), rounding, seed=3)
        bnb = bitsandbytes_on_a_cpu()
        return parameters, OneByOne(bnb.optim.AdamW8bit(parameters, lr=1e-3, min_8bit_size=16), rounding, seed=3)

    def run(parameters, wrapped, steps):
        for step in steps:
            with_gradients(parameters, step)
            wrapped.step()
        return parameters

    whole = run(*made(), range(4))
    first, wrapped = made()
    run(first, wrapped, range(2))
    second, again = made()
    with torch.no_grad():
        for p, own in zip(second, first, strict=True):
            p.copy_(own)
    again.load_state_dict(torch.load(_saved(wrapped.state_dict()), weights_only=False))
    run(second, again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_two_processes_with_one_seed_round_alike_and_other_seeds_do_not():
    def ran(seed):
        parameters = weights()
        wrapped = OneByOne(torch.optim.AdamW(parameters, lr=1e-3), "stochastic", seed)
        with_gradients(parameters, 0)
        torch.manual_seed(seed + 10)
        wrapped.step()
        return parameters[0]

    assert torch.equal(ran(1), ran(1))
    assert not torch.equal(ran(1), ran(2))
