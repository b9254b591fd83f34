"""`fastdpo merge`: merges an adapter into its base model, and checks the result."""

from __future__ import annotations

from fastdpo.cli.options.early import check_model
from fastdpo.cli.options.parser import RaisingParser


def main(argv: list[str]) -> None:
    """Merges, and prints the error of the merged logits.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    parser = RaisingParser(
        prog="fastdpo merge",
        description="Merges an adapter into its base model. The merged logits are compared with the adapter's.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of the adapter, as `fastdpo train` saved it.")
    parser.add_argument("--output", "-o", metavar="DIR", required=True, help="New folder for the merged model.")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Dtype of the merged weights. Default: float32.",
    )
    parser.add_argument(
        "--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code from the Hub."
    )
    options = parser.parse_args(argv)
    check_model("adapter", options.adapter)
    from fastdpo.cli.console import make_console
    from fastdpo.training.saving.merge import merge_adapter

    console = make_console()
    with console.status("merging"):
        done = merge_adapter(
            options.adapter, options.output, dtype=options.dtype, trust_remote_code=options.trust_remote_code
        )
    console.print(f"wrote {done.folder}, loaded it again and compared it with the adapter on its base model:")
    console.print(f"  logits differ by at most {done.error:.2g}; the adapter changes them by up to {done.effect:.2g}")
    if done.untied:
        console.print("  embedding and head no longer share a weight, because the adapter changes only one of them")
