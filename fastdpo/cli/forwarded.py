"""What `iterate` and `sweep` share: options handed on to `fastdpo train`, and runs that go on where they stopped.

In: words of a command line. Out: the settings of the run that they start, and how its models are loaded for sampling
and judging. Refuses every value that `fastdpo train` would refuse, before the first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.rounds.loading import Loader


def check_forwarded(options: Sequence[str], own: Sequence[str], reason: str) -> None:
    """Raises ValueError if the options for `fastdpo train` hold one that the command sets itself."""
    for option in options:
        name = option.partition("=")[0]
        if name in own:
            raise ValueError(f"{name} must not be given, because {reason}")


def resuming(folder: Path) -> list[str]:
    """The options with which `fastdpo train` resumes the run in a folder, or starts it if it has no checkpoint."""
    is_begun = any(folder.glob("checkpoint-*/trainer_state.json"))
    return ["--resume_from_checkpoint", "true"] if is_begun else ["--overwrite_output_dir"]


@dataclass(frozen=True)
class TrainRun:
    """The settings of a run of `fastdpo train`."""

    run: Any  # RunArguments
    adapter: Any  # AdapterArguments
    args: Any  # DPOConfig
    given: Any  # the options as they were written; None for a setting that was not given

    def loader(self, judge: str, **settings: Any) -> Loader:
        """Loads models for sampling and judging with the dtype, device, tokenizer and chat template of the run."""
        from fastdpo.rounds.loading import Loader
        from fastdpo.training import DPOConfig

        args = DPOConfig(
            "not_used",
            max_length=None,
            model_init_kwargs=self.args.model_init_kwargs,
            chat_template=self.args.chat_template,
            chat_template_kwargs=self.args.chat_template_kwargs,
            pad_token=self.args.pad_token,
            trust_remote_code=self.args.trust_remote_code,
            use_cpu=self.args.use_cpu,
        )
        return Loader(judge, args, tokenizer_name=self.run.tokenizer, **settings)


def train_run(words: Sequence[str]) -> TrainRun:
    """The settings of the run that the words start.

    Raises:
        ValueError: `fastdpo train` would refuse them.
    """
    from fastdpo.cli.options.early import look

    given = look("train", words)
    from fastdpo.cli.arguments import TYPES, parse
    from fastdpo.cli.looks import merge_load_settings

    run, adapter, args = parse("train", TYPES["train"], words)
    merge_load_settings(args, run.load_settings())
    return TrainRun(run, adapter, args, given)
