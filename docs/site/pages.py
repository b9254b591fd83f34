"""The pages of the site that are not files of docs/: a hook of MkDocs, named in mkdocs.yml.

In: the repository, and the help of every command. Out: one page per command, the API reference, and the pages that lie
elsewhere (recipes, kernels, benchmarks, CONTRIBUTING, CHANGELOG) with their pictures. Links between files of the
repository become links between pages; a file that is no page becomes plain text, or a link if `repo_url` is set.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:  # tests read this module without MkDocs
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
PICTURES = (".png", ".svg")
COMMANDS = "Command line"  # the section of the navigation that gets one page per command

# page of the site -> its title and the objects that it documents
API = {
    "api/training.md": (
        "Trainers and settings",
        ("fastdpo.DPOConfig", "fastdpo.DPOTrainer", "fastdpo.SFTConfig", "fastdpo.SFTTrainer", "fastdpo.StopOnSignal"),
    ),
    "api/ops.md": (
        "Head op and losses",
        (
            "fastdpo.linear_logps",
            "fastdpo.sequence_logps",
            "fastdpo.linear_cross_entropy",
            "fastdpo.preference_loss",
            "fastdpo.LinearDPOLoss",
            "fastdpo.LinearCPOLoss",
            "fastdpo.LinearSimPOLoss",
            "fastdpo.LinearORPOLoss",
            "fastdpo.LinearKTOLoss",
            "fastdpo.TokenLogps",
            "fastdpo.SequenceLogps",
        ),
    ),
    "api/packing.md": (
        "Packed log-probs",
        (
            "fastdpo.prepare_model",
            "fastdpo.pack_pairs",
            "fastdpo.pad_pairs",
            "fastdpo.packed_logps",
            "fastdpo.TokenizedPair",
            "fastdpo.TokenizedGroup",
            "fastdpo.PackedBatch",
            "fastdpo.PairLogps",
        ),
    ),
}


@cache
def elsewhere() -> dict[str, str]:
    """File of the repository -> page of the site."""
    pages = {
        "kernels/README.md": "kernels.md",
        "benchmarks/README.md": "benchmarks.md",
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "README.md": "index.md",
        "recipes/README.md": "recipes/index.md",
    }
    for readme in sorted(ROOT.glob("recipes/*/README.md")):
        pages[readme.relative_to(ROOT).as_posix()] = f"recipes/{readme.parent.name}.md"
    return pages


def _source(page: str) -> str:
    """The file of the repository that a page is made of: the one in docs/, also where another leads to its page."""
    own = f"docs/{page}"
    return own if (ROOT / own).is_file() else next((file for file, name in elsewhere().items() if name == page), own)


def _target(file: str) -> str | None:
    """The page or picture of the site for a file of the repository, None if it has none."""
    if file in elsewhere():
        return elsewhere()[file]
    if file.endswith((".md", *PICTURES)) and file.startswith("docs/"):
        return file.removeprefix("docs/")
    return file if file.endswith(PICTURES) else None


def relinked(markdown: str, page: str, repo_url: str | None = None) -> str:
    """The text of a page, its links to files of the repository turned into links of the site."""
    folder, source_folder = posixpath.dirname(page), posixpath.dirname(_source(page))

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        parts = urlsplit(target)
        if parts.scheme or not parts.path or page in API or page.startswith("commands/"):
            return match[0]
        file = posixpath.normpath(posixpath.join(source_folder, parts.path))
        to = _target(file)
        if to is not None:
            anchor = f"#{parts.fragment}" if parts.fragment else ""
            return f"{mark}[{text}]({posixpath.relpath(to, folder or '.')}{anchor})"
        if not (ROOT / file).exists():
            return match[0]  # MkDocs reports it
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{file})" if repo_url else text

    inside_code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    pieces, end = [], 0
    for block in inside_code.finditer(markdown):
        pieces += [_LINK.sub(link, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*pieces, _LINK.sub(link, markdown[end:])])


_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def commands() -> Iterator[tuple[str, str]]:
    """The command and the text of its page, for every command."""
    from fastdpo.cli.main import COMMANDS as known
    from fastdpo.cli.main import main

    for name, (_, what) in known.items():
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([name, "--help"])
        yield name, f"# fastdpo {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{output.getvalue().rstrip()}\n```\n"


def api_page(title: str, names: tuple[str, ...]) -> str:
    import fastdpo

    objects = [getattr(fastdpo, name.removeprefix("fastdpo.")) for name in names]
    return f"# {title}\n\n" + "\n".join(f"::: {thing.__module__}.{thing.__qualname__}\n" for thing in objects)


def on_config(config: Any) -> Any:
    from fastdpo.cli.main import COMMANDS as known

    section = next(entry[COMMANDS] for entry in config.nav if COMMANDS in entry)
    section.extend({f"fastdpo {name}": f"commands/{name}.md"} for name in known)
    recipes = next(entry for entry in config.nav if "Recipes" in entry)
    recipes["Recipes"] = [page for page in elsewhere().values() if page.startswith("recipes/")]
    return config


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    for file, page in elsewhere().items():
        if page != "index.md":  # docs/index.md stands for the README
            files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    for pattern in ("recipes/*/expected/*", "benchmarks/results/*"):
        for picture in sorted(ROOT.glob(pattern)):
            if picture.suffix in PICTURES:
                name = picture.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(picture)))
    for command, text in commands():
        files.append(File.generated(config, f"commands/{command}.md", content=text))
    for page, (title, names) in API.items():
        files.append(File.generated(config, page, content=api_page(title, names)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return relinked(markdown, page.file.src_uri, config.repo_url)
