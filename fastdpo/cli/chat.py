"""`fastdpo chat`: talk to a model, or to two at once, and save which answer is better.

In: lines from the terminal. Out: answers, printed while they are generated. With --against, both models answer,
numbered in random order. With --save, the user's choice becomes a row of preference data. The conversation continues
with the preferred answer.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdpo.cli.options.early import check_model
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.data.visible import visible

_BETWEEN_SEEDS = 100_000  # more than the answers of a conversation
COMMANDS = "/new starts over, /quit (or end of input) stops"


def main(argv: list[str]) -> None:
    """Talks until the input ends.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options = _parser().parse_args(argv)
    check_model("model", options.model)
    check_model("against", options.against)
    if options.save and not options.against:
        raise ValueError("save must not be given without --against MODEL: a pair needs the answers of two models")
    if options.save and Path(options.save).is_dir():
        raise ValueError(f"save must be a file, got the folder {options.save}")
    if options.temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {options.temperature}")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    names = [name for name in (options.model, options.against) if name]
    talkers = [_talker(name, options, number) for number, name in enumerate(names)]
    print(f"{' against '.join(names)}; {COMMANDS}")
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages: list[dict[str, str]] = list(start)
    order, num_saved = random.Random(options.seed), 0
    while (line := _read("you: ")) not in (None, "/quit"):
        if line == "/new":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        if len(talkers) == 1:
            answer = _say("model", talkers[0], messages)
        else:
            answer, is_saved = _compare(talkers, messages, options, order)
            num_saved += is_saved
        messages.append({"role": "assistant", "content": answer})
    if num_saved:
        print(f"saved {num_saved} pair{'s' if num_saved > 1 else ''}: {options.save}")


def _parser() -> RaisingParser:
    parser = RaisingParser(prog="fastdpo chat", description="Talk to a model, or compare two.")
    add = parser.add_argument
    add("--model", required=True, help="Model: a folder (also of an adapter) or a name on the Hub.")
    add("--against", metavar="MODEL", help="A second model that answers too.")
    add("--save", metavar="FILE", help="Append each preferred answer as a row of preference data (JSON Lines).")
    add("--system", help="System message at the start.")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=512, help="Maximum answer tokens. Default: 512.")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token. Default: 0.7.")
    add("--seed", type=int, default=0, help="Seed of sampling and of the order of two answers. Default: 0.")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="Dtype of the weights. Default: float32.")
    add("--use_cpu", "--use-cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    add("--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code from the Hub.")
    return parser


def _talker(name: str, options: Any, number: int) -> Any:
    """The model with this number. Its samples are its own, also if both models are the same."""
    from fastdpo.alignment.chat import Talker
    from fastdpo.training import DPOConfig
    from fastdpo.training.setup.models import load_model, load_tokenizer

    args = DPOConfig(
        "not_used",
        model_init_kwargs=None if options.dtype is None else {"dtype": options.dtype},
        trust_remote_code=options.trust_remote_code,
        use_cpu=options.use_cpu,
    )
    model: Any = load_model(name, args.init_kwargs())
    model.to(args.device).eval()
    tokenizer = load_tokenizer(name, args.init_kwargs())
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    return Talker(model, tokenizer, **settings, seed=options.seed + _BETWEEN_SEEDS * number)


def _read(question: str) -> str | None:
    """The next line without surrounding spaces; None at the end of the input."""
    try:
        line = input(question).strip()
    except EOFError:
        print()
        return None
    if not sys.stdin.isatty():  # a terminal has shown it
        print(line)
    return line


def _say(name: str, talker: Any, messages: Sequence[dict[str, str]]) -> str:
    print(f"{name}: ", end="", flush=True)
    answer: str = talker.reply(messages, lambda text: print(visible(text, keeps="\n\t"), end="", flush=True))
    print()
    return answer


def _compare(
    talkers: Sequence[Any], messages: list[dict[str, str]], options: Any, order: random.Random
) -> tuple[str, bool]:
    """Shows both answers in random order.

    Returns:
        The answer to continue with (the preferred one, or the first), and whether a pair was saved.
    """
    places = [0, 1]
    order.shuffle(places)
    answers = [_say(f"answer {number}", talkers[place], messages) for number, place in enumerate(places, 1)]
    choice = _read("which is better? 1, 2, or enter for neither: ")
    if choice not in ("1", "2"):
        return answers[0], False
    better = int(choice) - 1
    if options.save and answers[0] == answers[1]:
        print("not saved: both answers are the same")
    elif options.save:
        names = [(options.model, options.against)[place] for place in places]
        _append(Path(options.save), messages, answers[better], answers[1 - better], names[better], names[1 - better])
        return answers[better], True
    return answers[better], False


def _append(path: Path, messages: list[dict[str, str]], chosen: str, rejected: str, *models: str) -> None:
    from fastdpo.training.callbacks.json_lines import append_lines

    said = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    append_lines(path, [{"prompt": messages, **said, "chosen_model": models[0], "rejected_model": models[1]}])
