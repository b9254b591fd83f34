"""Direct Preference Optimization in NumPy, all of it: a policy, its gradient by hand, the loss, training, and a check.

The policy is a table: the logits of the next token by prompt and by the tokens before it. It can represent every
distribution over responses, so DPO with enough pairs should find the optimum of theory (arXiv 2305.18290, eq. 4).
"""

import itertools

import numpy as np

PROMPTS, TOKENS, LENGTH, BETA = 2, 3, 3, 0.5  # numbers of prompts, of tokens, and of tokens in a response
RESPONSES = np.array(list(itertools.product(range(TOKENS), repeat=LENGTH)))  # all of them, (27, LENGTH)


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def contexts(y):
    """The table's row for each token of responses (N, LENGTH): the tokens before it, read as a number."""
    digits = (y + 1) * (TOKENS + 1) ** np.arange(LENGTH)
    return digits.cumsum(1) - digits


def logps(table, x, y):
    """log pi(y | x): (N,) for prompts (N,) and responses (N, LENGTH)."""
    return log_softmax(table)[x[:, None], contexts(y), y].sum(1)


def grad_logps(table, x, y, weights):
    """The gradient of (weights * logps).sum(). By the logits of one token it is one-hot minus probabilities."""
    per_token = np.eye(TOKENS)[y] - np.exp(log_softmax(table))[x[:, None], contexts(y)]  # (N, LENGTH, TOKENS)
    grad = np.zeros_like(table)
    np.add.at(grad, (x[:, None], contexts(y)), weights[:, None, None] * per_token)
    return grad


def dpo(table, reference, x, chosen, rejected):
    """The mean loss, eq. 7, and its gradient, in which a pair weighs beta * sigmoid(-beta * margin)."""
    margins = (logps(table, x, chosen) - logps(reference, x, chosen)) - (
        logps(table, x, rejected) - logps(reference, x, rejected)
    )
    weights = BETA * np.exp(-np.logaddexp(0, BETA * margins)) / len(x)
    grad = grad_logps(table, x, rejected, weights) - grad_logps(table, x, chosen, weights)
    return np.logaddexp(0, -BETA * margins).mean(), grad


def main(num_pairs=20000, num_steps=300, learning_rate=20.0):
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(PROMPTS, (TOKENS + 1) ** (LENGTH - 1), TOKENS))
    start = np.stack([logps(reference, np.full(27, prompt), RESPONSES) for prompt in range(PROMPTS)])  # (PROMPTS, 27)
    rewards = np.stack([np.equal(RESPONSES, prompt).sum(1) for prompt in range(PROMPTS)])  # how often y has it
    # pairs: two samples of the reference each, labelled by Bradley-Terry
    x = rng.integers(PROMPTS, size=num_pairs)
    a, b = (np.exp(start).cumsum(1)[x] < rng.random((2, num_pairs, 1))).sum(-1).clip(max=26)
    a_wins = rng.random(num_pairs) < 1 / (1 + np.exp(rewards[x, b] - rewards[x, a]))
    pairs = x, RESPONSES[np.where(a_wins, a, b)], RESPONSES[np.where(a_wins, b, a)]
    table = reference.copy()
    for step in range(num_steps + 1):
        loss, grad = dpo(table, reference, *pairs)
        if step % 100 == 0:
            i, nudge = (1, 0, 1), np.zeros_like(table)  # one of the logits of a first token
            nudge[i] = 1e-5
            up, down = (dpo(table + sign * nudge, reference, *pairs)[0] for sign in (1, -1))
            print(f"step {step:3}  loss {loss:.4f}  gradient {grad[i]:+.8f}  by differences {(up - down) / 2e-5:+.8f}")
        table -= learning_rate * grad
    trained = np.stack([logps(table, np.full(27, prompt), RESPONSES) for prompt in range(PROMPTS)])
    for name, logp in ("reference", start), ("DPO", trained), ("optimum", log_softmax(start + rewards / BETA)):
        p = np.exp(logp) / PROMPTS
        print(f"{name:9}  true reward {(p * rewards).sum():.3f}  KL to the reference {(p * (logp - start)).sum():.3f}")


if __name__ == "__main__":
    main()
