"""From texts to token ids, many at a time.

In: the texts of rows, each a prompt and the texts that begin with it. Out: the ids of each text by itself, without
added tokens.

A prompt is tokenized once instead of once per response: if all texts of a row share a special token that the tokenizer
matches before anything else, such as the <|im_start|> of the answer's turn, each text is cut there and the ids of both
parts are joined. Such tokens split a text before it is normalized, so the ids are the same. The first rows are
tokenized both ways to check this; if the ids differ, every text is tokenized as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdpo.data.tokens.control import ControlTokens, MarkedTokens, added_tokens, encode_marked

Ids = list[int]
_PROVED_ROWS = 16  # tokenized both ways
_EXPLORED_ROWS = 256  # rows searched for special tokens if no row is known to have one
_TEXTS_AT_ONCE = 1024


class TextEncoder:
    """A tokenizer's `__call__` on batches of plain texts, with the offsets and special tokens that fastdpo needs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        self._has_added = bool(added_tokens(tokenizer))
        self._cutting = _cutting_tokens(tokenizer)
        self._used: dict[str, int] = {}  # those that rows have shown, with their ids
        self._num_to_prove, self._num_to_explore = _PROVED_ROWS, _EXPLORED_ROWS
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._is_plain = self._backend is not None and _is_transformers_own(tokenizer)
        self._around: Ids | None = None
        self._offset_backend: Any = None
        self._is_blank: dict[int, bool] = {}
        self._is_control: dict[int, bool] = {}

    # One text, or several independent ones

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without added tokens."""
        if not texts:
            return []
        is_direct = self._is_plain and len(texts) > 1
        options = {"add_special_tokens": False, "verbose": False}
        encoded = self.tokenizer(list(texts[:1] if is_direct else texts), **options)
        ids = [list(some) for some in encoded["input_ids"]]
        if is_direct:  # the call has set the backend's options; only ids are needed
            ids += [encoding.ids for encoding in self._backend.encode_batch_fast(texts[1:], add_special_tokens=False)]
        return ids

    def encode_with_offsets(self, text: str) -> tuple[Ids, list[tuple[int, int]]]:
        """The ids and the character span of each token, including its white space.

        GPT-NeoX's and other byte-level tokenizers leave white space out of their offsets (trim_offsets). This happens
        in a post-processing step, so a copy of the tokenizer without this step gives the full spans.
        """
        if self._offset_backend is None:
            from tokenizers import Tokenizer

            self._offset_backend = Tokenizer.from_str(self._backend.to_str())
            self._offset_backend.post_processor = None
            self._offset_backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
            self._offset_backend.no_truncation()
            self._offset_backend.no_padding()
        encoding = self._offset_backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def encode_as_text(self, text: str) -> Ids:
        """The ids of a text without recognising added tokens."""
        backend = self._backend
        if backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = [text]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in backend.model.tokenize(part)]

    def encode_marked(self, text: str, *, with_offsets: bool = False) -> MarkedTokens:
        """The tokens of text with the marks of `control`."""

        def encode(piece: str) -> tuple[Ids, list[tuple[int, int]]]:
            if with_offsets:
                return self.encode_with_offsets(piece)
            return self.encode([piece])[0], []

        token_id = self.tokenizer.convert_tokens_to_ids
        return encode_marked(self.control, text, encode, self.encode_as_text, token_id)

    def decode(self, ids: Ids) -> str:
        """The text of tokens, without special tokens for a tokenizer that does not recognise them in text, such as
        mistral-common's: it would write them as vocabulary pieces."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not self._has_added)
        return text

    # Rows: a prompt and the texts that begin with it

    def encode_rows(self, rows: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """The ids of every text of every row; repeated texts are tokenized once."""
        cuts = [self._cut(texts) for texts in rows]
        parts = [_parts(texts, start, token) for texts, (start, token) in zip(rows, cuts, strict=True)]
        strings = list(dict.fromkeys(part for some_parts in parts for part in some_parts))
        wanted: dict[str, Ids] = {}
        for first in range(0, len(strings), _TEXTS_AT_ONCE):
            some = strings[first : first + _TEXTS_AT_ONCE]
            wanted.update(zip(some, self.encode(some), strict=True))
        return [
            self._joined(texts, [wanted[part] for part in some_parts], token)
            for texts, some_parts, (_, token) in zip(rows, parts, cuts, strict=True)
        ]

    def _cut(self, texts: Sequence[str]) -> tuple[int, str]:
        """Position and text of the last special token that all texts of a row share; (-1, "") if there is none."""
        if not self._cutting or len(texts) < 2:
            return -1, ""
        shared = common_start(texts)
        best, token = -1, ""
        for name in self._used:
            found = shared.rfind(name)
            if found + len(name) > best + len(token):
                best, token = found, name
        if best < 0 and self._num_to_explore > 0:
            self._num_to_explore -= 1
            for name, token_id in self._cutting.items():
                if name in shared:
                    self._used[name] = token_id
                    found = shared.rfind(name)
                    if found > best:
                        best, token = found, name
        return best, token

    def _joined(self, texts: Sequence[str], ids: list[Ids], token: str) -> list[Ids]:
        """The ids of the texts from those of their parts."""
        if not token:
            return ids
        head, *tails = ids
        token_id = self._cutting.get(token)
        is_sound = head[-1:] == [token_id] and all(tail[:1] == [token_id] for tail in tails)
        joined = [head + tail[1:] for tail in tails]
        if is_sound and self._num_to_prove > 0:
            self._num_to_prove -= 1
            is_sound = joined == self.encode(texts)
        if not is_sound:
            self._cutting, self._used = {}, {}
            return self.encode(texts)
        return joined

    # Properties of single tokens

    def leading_ids(self, example: str = "a") -> Ids:
        """The ids that the tokenizer adds before a text, such as [BOS]. Found by an example, because classes and files
        disagree on the flags."""
        if self._around is None:
            bare = self.encode([example])[0]
            full = list(self.tokenizer(example, verbose=False)["input_ids"])
            starts = range(len(full) - len(bare) + 1)
            self._around = next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])
        return self._around

    def is_blank(self, token: int) -> bool:
        """Whether a token is white space or empty."""
        if token not in self._is_blank:
            self._is_blank[token] = not self.tokenizer.decode([token]).strip()
        return self._is_blank[token]

    def is_control(self, token: int) -> bool:
        """Whether a token is a special token and not text."""
        if token not in self._is_control:
            self._is_control[token] = not self.tokenizer.decode([token], skip_special_tokens=True).strip()
        return self._is_control[token]


def _is_transformers_own(tokenizer: Any) -> bool:
    """Whether a tokenizer's `__call__` is transformers' own and not code that came with a model."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names
    )


def common_start(texts: Sequence[str]) -> str:
    """The common start of all texts."""
    shared = min(texts, key=len)
    if all(text.startswith(shared) for text in texts):
        return shared
    low, high = 0, len(shared)  # the first `low` characters are shared, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if all(text.startswith(shared[:middle]) for text in texts):
            low = middle
        else:
            high = middle
    return shared[:low]


def _parts(texts: Sequence[str], start: int, token: str) -> list[str]:
    """The texts of a row to tokenize: whole, or split at the cutting token into shared part and rest."""
    if start < 0:
        return list(texts)
    return [texts[0][: start + len(token)], *(text[start:] for text in texts)]


def _cutting_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens at which a text can be cut without changing its tokens, with their ids.

    Excluded: tokens contained in another added token, because the longer one may match instead; tokens matched in
    normalized text; tokens that depend on the surrounding letters (`single_word`).
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None or getattr(tokenizer, "split_special_tokens", False):
        return {}
    added = added_tokens(tokenizer)
    names = [token.content for token in added.values()]
    text_of_all = "\0".join(names)
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.special
        and token.content.strip()
        and not (token.normalized or token.single_word)
        and text_of_all.count(token.content) == 1
    }
