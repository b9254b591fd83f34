"""`fastdpo debug-batch`: replays the batch that a run saved when its loss was not finite."""

from __future__ import annotations

import math
from typing import Any

from fastdpo.cli.options.parser import RaisingParser

SHOWN_CHARACTERS = 240  # of a prompt or a response: its start and its end


def main(argv: list[str]) -> int:
    """Replays, and prints where the first number went wrong. Exit code 1 if a number is not finite again.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    parser = RaisingParser(
        prog="fastdpo debug-batch",
        description="Replays the batch that a run saved when its loss was not finite (nonfinite_batch_rank0.pt): the"
        " log-probs of the run, of the model now and in fp64, the first module with a number that is not finite, and"
        " the text of each row.",
    )
    parser.add_argument("file", metavar="FILE", help="The file that the run named in its error.")
    parser.add_argument("--model", required=True, help="The model of the run, or its last checkpoint.")
    parser.add_argument(
        "--all_modules", "--all-modules", action="store_true", help="Show every module, not only layers."
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code that comes with the model."
    )
    options = parser.parse_args(argv)
    import torch

    from fastdpo.cli.console import make_console
    from fastdpo.evidence.bad_batch import load_bad_batch, replay
    from fastdpo.modeling import prepare_model
    from fastdpo.training.setup.models import load_config, load_model, load_tokenizer

    bad = load_bad_batch(options.file)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    init_kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    load_config(options.model, init_kwargs)
    console = make_console()
    with console.status("replaying"):
        model: Any = load_model(options.model, init_kwargs)
        if not getattr(model, "is_quantized", False):
            model.to(device)
        prepare_model(model, attention_backend=bad.settings.get("attention_backend", "auto"))
        found = replay(model, bad, load_tokenizer(options.model, init_kwargs), device=device)
    _print(console, bad, found, all_modules=options.all_modules)
    is_finite = found.first_bad is None and all(math.isfinite(one.replayed) for one in found.sequences)
    return 0 if is_finite and not found.bad_weights else 1


def _print(console: Any, bad: Any, found: Any, *, all_modules: bool) -> None:
    from rich.text import Text

    precision = "fp16 autocast" if bad.settings.get("fp16") else "bf16 autocast" if bad.settings.get("bf16") else "fp32"
    console.print(f"the loss was {bad.loss} at step {bad.step}; replayed in {precision}", highlight=False)
    for name in found.bad_weights[:8]:
        console.print(Text(f"weight with a number that is not finite: {name}"))
    first = found.first_bad
    if first is None:
        console.print("every module's output is finite with this model" + _of_head(found.sequences))
    else:
        where = f", first at positions {', '.join(map(str, first.rows))} of the batch" if first.rows else ""
        said = f"the first number that is not finite is in the output of {first.name}: "
        said += f"{first.num_bad} of {first.size}{where}"
        console.print(Text(said, style="bold red"))
    console.print(_modules_table(found.modules, all_modules=all_modules))
    console.print(_sequences_table(found.sequences))


def _of_head(sequences: Any) -> str:
    is_bad = not all(math.isfinite(one.replayed) for one in sequences)
    return ", but the log-probs that the LM head computes from them are not" if is_bad else ""


def _modules_table(modules: Any, *, all_modules: bool) -> Any:
    """Every module, or those that a list of layers holds."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="outputs in the order of the forward")
    for column in ("module", "not finite", "of", "largest finite"):
        table.add_column(column, justify="left" if column == "module" else "right")
    first = next((module for module in modules if module.num_bad), None)
    for module in modules:
        if all_modules or module is first or module.name.rpartition(".")[2].isdecimal():
            style = "red" if module.num_bad else ""
            numbers = (str(module.num_bad), str(module.size), f"{module.largest:.3g}")
            table.add_row(Text(module.name), *numbers, style=style)
    return table


def _sequences_table(sequences: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="log-probs of the sequences, nats", show_lines=True)
    for column in ("sequence", "tokens", "run", "reference in run", "now", "fp64", "prompt", "response"):
        table.add_column(column, overflow="fold")
    for one in sequences:
        numbers = (one.of_run, one.reference_of_run, one.replayed, one.exact)
        texts = (Text(_short(one.prompt)), Text(_short(one.response)))
        table.add_row(one.side, str(one.num_tokens), *("" if n is None else f"{n:.6g}" for n in numbers), *texts)
    return table


def _short(text: str) -> str:
    from fastdpo.data.visible import visible

    half = SHOWN_CHARACTERS // 2
    return visible(text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}")
