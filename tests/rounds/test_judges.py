"""Judges score what they say they score; an endpoint is asked in both orders and may fail in every way."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from tiny import make_llama, make_tokenizer

from fastdpo import DPOConfig
from fastdpo.rounds.endpoint import EndpointJudge
from fastdpo.rounds.judges import check_judge, judged, make_judge


def numbers(judge, *completions):
    return list(judge(["the cat "] * len(completions), list(completions)))


def test_lengths_and_patterns():
    assert numbers(make_judge("length"), "abc", "", [{"role": "assistant", "content": "ab"}]) == [3.0, 0.0, 2.0]
    assert numbers(make_judge("shortest"), "abc", "a") == [-3.0, -1.0]
    assert numbers(make_judge(r"regex:\bplease\b"), "please, please", "pleased") == [2.0, 0.0]


def own_judge(prompts, completions, **kwargs):
    return [None if said == "skip" else float(said.count("a")) for said in completions]


def test_a_function_of_ones_own():
    assert numbers(make_judge("test_judges:own_judge"), "aab", "skip") == [2.0, None]


def test_log_prob_per_token_of_the_writer():
    model, tokenizer = make_llama().eval(), make_tokenizer()
    args = DPOConfig("out", use_cpu=True, max_length=None)
    (found,) = numbers(make_judge("logp", model=model, tokenizer=tokenizer, args=args), "sees a")
    ids = torch.tensor(
        [[*tokenizer("the cat")["input_ids"], *tokenizer("sees a", add_special_tokens=False)["input_ids"], 2]]
    )
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-3:]
    assert found == pytest.approx(logps.mean().item(), rel=1e-4)


def test_a_classifier_scores_prompt_and_response(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    for name, labels in (("one", 1), ("two", 2)):
        config = LlamaConfig(vocab_size=32, num_labels=labels, pad_token_id=0, **small)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    judge = make_judge(f"classifier:{tmp_path / 'one'}", args=DPOConfig("out", use_cpu=True))
    together = numbers(judge, "sees a dog", "never")
    assert together == pytest.approx([numbers(judge, "sees a dog")[0], numbers(judge, "never")[0]], rel=1e-4, abs=1e-5)
    assert together[0] != together[1]
    with pytest.raises(ValueError, match="must have one output, got 2"):
        make_judge(f"classifier:{tmp_path / 'two'}")


def test_scores_of_numpy_and_torch_are_numbers_and_those_that_are_not_finite_are_none():
    found = [np.float32(1.5), torch.tensor(2.0), None, float("nan"), np.inf, 3]
    assert judged(lambda prompts, completions: found, ["p"] * 6, ["c"] * 6) == [1.5, 2.0, None, None, None, 3.0]
    assert judged(lambda prompts, completions: np.arange(2.0), ["p"] * 2, ["c"] * 2) == [0.0, 1.0]
    with pytest.raises(ValueError, match="judge must return a list of scores, got float"):
        judged(lambda prompts, completions: 1.0, ["p"], ["c"])


@pytest.mark.parametrize("check", [make_judge, lambda name: check_judge(name, None)], ids=["made", "checked"])
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lenght", "judge must be one of"),
        ("regex:(", "regular expression"),
        ("no_such_module:f", "importable"),
        ("math:nothing", "importable"),
        ("math:pi", "callable"),
        ("length:long", "judge must be one of"),
        ("implicit:", "judge must be one of"),
        ("classifier:./no/such", "no/such"),
        ("implicit:./no/such", "no/such"),
    ],
)
def test_a_judge_that_is_none_is_refused(check, name, word):
    with pytest.raises(ValueError, match=word):
        check(name)


@pytest.mark.parametrize("timeout", [0.0, -1.0])
def test_an_endpoint_needs_time_and_the_name_of_a_model(timeout):
    with pytest.raises(ValueError, match=f"judge_timeout must be > 0, got {timeout}"):
        check_judge("http://localhost/v1", "m", timeout)
    with pytest.raises(ValueError, match="judge_model must name the endpoint's model"):
        check_judge("http://localhost/v1", None)


@pytest.fixture
def endpoint():
    """A stand-in server; `answer` makes what it says of the question, or does what servers do."""
    state = {"answer": None, "seen": []}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["seen"].append(asked)
            said = state["answer"](asked["messages"][0]["content"])
            if isinstance(said, int):
                self.send_error(said)
                return
            body = said if isinstance(said, bytes) else answer(said)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()


def answer(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def better(question):
    """The response with more a's."""
    a, b = (question.split(f"[Response {letter}]\n")[1].split("\n")[0].count("a") for letter in "AB")
    return "A" if a > b else "B" if b > a else "C"


def test_shares_of_won_comparisons(endpoint):
    endpoint["answer"] = better
    judge = EndpointJudge(endpoint["url"], "m")
    assert judge.scores("?", ["a", "aaa", "aa"]) == [0.0, 1.0, 0.5]
    assert (judge.counts.comparisons, judge.counts.agreement) == (3, 1.0)
    assert len(endpoint["seen"]) == 6  # both orders
    assert endpoint["seen"][0]["model"] == "m"


def test_a_judge_that_favours_a_place_makes_ties(endpoint):
    endpoint["answer"] = lambda question: "Response A is better: A"
    judge = EndpointJudge(endpoint["url"], "m")
    assert judge.scores("?", ["a", "aaa"]) == [0.5, 0.5]
    assert judge.counts.agreement == 0.0


@pytest.mark.parametrize("said", [b"no json", b"{}", 500, "neither of these"])
def test_nonsense_and_failures_are_ties_and_counted(endpoint, said):
    endpoint["answer"] = lambda question: said
    judge = EndpointJudge(endpoint["url"], "m", attempts=1)
    assert judge.scores("?", ["a", "aaa"]) == [0.5, 0.5]
    assert judge.counts.unread == 2


def test_an_endpoint_that_hangs_is_given_up(endpoint):
    endpoint["answer"] = lambda question: time.sleep(1) or "A"
    judge = EndpointJudge(endpoint["url"], "m", timeout=0.1, attempts=1)
    assert judge.scores("?", ["a", "b"]) == [0.5, 0.5]
    assert judge.counts.unread == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [(b"no json", "JSONDecodeError"), (500, "HTTP Error 500"), ("I cannot say", "the answer was 'I cannot say'")],
)
def test_an_endpoint_that_never_answers_is_an_error_with_the_last_reason(endpoint, said, reason):
    endpoint["answer"] = lambda question: said
    judge = EndpointJudge(endpoint["url"], "m", attempts=1)
    assert judge.scores("?", ["a", "b", "c"]) == [0.5, 0.5, 0.5]  # 6 requests: ties so far
    assert judge.scores("?", ["a", "b", "c"]) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=f"must answer A, B or C, got no readable answer to the last 18.*{reason}"):
        judge.scores("?", ["a", "b", "c"])


def test_one_answer_is_enough_to_go_on(endpoint):
    numbers = iter(range(1000))
    endpoint["answer"] = lambda question: "C" if next(numbers) % 15 == 14 else "no"
    judge = EndpointJudge(endpoint["url"], "m", num_parallel=1)
    for _ in range(4):
        judge.scores("?", ["a", "b", "c", "d"])
    assert judge.counts.unread == 45


def test_a_request_that_takes_too_long_is_not_repeated(endpoint):
    endpoint["answer"] = lambda question: time.sleep(0.5) or "A"
    judge = EndpointJudge(endpoint["url"], "m", timeout=0.1, attempts=3)
    judge.scores("?", ["a", "b"])
    assert len(endpoint["seen"]) == 2
    with pytest.raises(ValueError, match=r"no answer within 0\.1 seconds \(--judge_timeout\)"):
        judge.scores("?", ["a", "b", "c", "d", "e"])


def test_an_endpoint_that_refuses_is_an_error(endpoint):
    endpoint["answer"] = lambda question: 401
    with pytest.raises(ValueError, match=r"refused the request.*401"):
        EndpointJudge(endpoint["url"], "m").scores("?", ["a", "b"])


def test_a_failure_that_passes_is_asked_again(endpoint):
    failures = iter([500])
    endpoint["answer"] = lambda question: next(failures, "C")
    judge = EndpointJudge(endpoint["url"], "m", attempts=2, num_parallel=1)
    assert judge.scores("?", ["a", "b"]) == [0.5, 0.5]
    assert (judge.counts.unread, judge.counts.agreement) == (0, 1.0)
