"""The head op: log-probs of labels under an LM head, per row and summed per sequence, without the (T, V) logits."""

from fastdpo.ops.linear_cross_entropy import linear_cross_entropy
from fastdpo.ops.linear_logps import linear_logps
from fastdpo.ops.sequence_logps import sequence_logps

__all__ = ["linear_cross_entropy", "linear_logps", "sequence_logps"]
