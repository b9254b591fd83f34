"""The comparison that the head op's tests use rejects each plausible mistake, and accepts what is right."""

import pytest
import wrong_heads
from head_cases import BF16, CASES, FP32, Case, assert_at_most_twice_plain, plain_logps

PLAIN_FP32 = Case(67, 150, 257, FP32)
CAUGHT_BY = {
    wrong_heads.off_by_one_shift: PLAIN_FP32,
    wrong_heads.ignored_row_counted: PLAIN_FP32,
    wrong_heads.missing_last_tile: PLAIN_FP32,
    wrong_heads.unmasked_vocab_tail: PLAIN_FP32,
    wrong_heads.wrong_merge: PLAIN_FP32,
    wrong_heads.bf16_accumulation: Case(130, 200, 131, BF16, has_bias=True),
    wrong_heads.weight_grad_summed_in_bf16: Case(600, 40, 19, BF16),
    wrong_heads.softcap_slope_forgotten: Case(67, 40, 257, FP32, softcap=5.0),
    wrong_heads.bias_after_scale: Case(67, 40, 257, FP32, has_bias=True, logit_scale=1.5, softcap=4.0),
}


def test_every_mistake_has_a_case():
    defined = {f for name, f in vars(wrong_heads).items() if callable(f) and f.__module__ == "wrong_heads"}
    assert {f for f in defined if not f.__name__.startswith("_")} == set(CAUGHT_BY)
    assert set(CAUGHT_BY.values()) <= set(CASES)  # the cases that the right implementations are held to


@pytest.mark.parametrize("mistake", CAUGHT_BY, ids=lambda mistake: mistake.__name__)
def test_the_comparison_rejects(mistake):
    with pytest.raises(AssertionError, match="is off by"):
        assert_at_most_twice_plain(mistake, CAUGHT_BY[mistake])


@pytest.mark.parametrize("case", sorted(set(CAUGHT_BY.values()), key=lambda case: case.id), ids=lambda case: case.id)
def test_the_comparison_accepts_plain_pytorch(case):
    assert_at_most_twice_plain(plain_logps, case)
