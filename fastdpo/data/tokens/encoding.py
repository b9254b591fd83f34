"""From texts to token ids, many at a time.

In: the texts of rows, each a prompt and what begins with it. Out: their ids, those that the tokenizer gives to each
text alone, without anything around it.

A prompt is tokenized once and not with every response again: where all texts of a row share a special token that the
tokenizer looks for before anything else, as the <|im_start|> of the answer's turn, a text is the tokens up to there and
those from there on. This is how such tokens work (they cut a text before it is normalized), and the first rows are
tokenized both ways to see that it is so here; where it is not, every text is tokenized as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdpo.data.tokens.control import ControlTokens, MarkedTokens, added_tokens, encode_marked

Ids = list[int]
_PROVED_ROWS = 16  # tokenized both ways
_EXPLORED_ROWS = 256  # looked through for special tokens where none is known to be in rows
_TEXTS_AT_ONCE = 1024


class TextEncoder:
    """A tokenizer's `__call__` on plain texts, in batches, and what of its offsets and special tokens is used here."""

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

    # One text, or several that have nothing to do with each other

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, with nothing around it."""
        if not texts:
            return []
        is_direct = self._is_plain and len(texts) > 1
        options = {"add_special_tokens": False, "verbose": False}
        encoded = self.tokenizer(list(texts[:1] if is_direct else texts), **options)
        ids = [list(some) for some in encoded["input_ids"]]
        if is_direct:  # the call has set all that the backend needs to be told; it is asked for ids and nothing else
            ids += [encoding.ids for encoding in self._backend.encode_batch_fast(texts[1:], add_special_tokens=False)]
        return ids

    def encode_with_offsets(self, text: str) -> tuple[Ids, list[tuple[int, int]]]:
        """The ids and the characters of each token, the white space that belongs to it included.

        GPT-NeoX's and other byte-level tokenizers leave white space out of the offsets that they give (trim_offsets).
        That is done behind the tokens' making, so a copy without this step shows all of a token.
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
        """The ids of a text in which no added token is looked for: those of its characters."""
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
        """The text of tokens. Of a tokenizer that knows no special tokens in text, as mistral-common's, without these:
        with them it would write the pieces of its vocabulary."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not self._has_added)
        return text

    # Rows: a prompt and the texts that begin with it

    def encode_rows(self, rows: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """The ids of every text of every row; texts that occur several times are tokenized once."""
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
        """Where the last special token begins that all texts of a row share, and which; (-1, "") where none does."""
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

    # What single tokens are

    def leading_ids(self, example: str = "a") -> Ids:
        """What the tokenizer puts before a text, such as [BOS]. Seen on an example: classes and files disagree on
        flags."""
        if self._around is None:
            bare = self.encode([example])[0]
            full = list(self.tokenizer(example, verbose=False)["input_ids"])
            starts = range(len(full) - len(bare) + 1)
            self._around = next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])
        return self._around

    def is_blank(self, token: int) -> bool:
        """Whether a token is white space, or nothing at all."""
        if token not in self._is_blank:
            self._is_blank[token] = not self.tokenizer.decode([token]).strip()
        return self._is_blank[token]

    def is_control(self, token: int) -> bool:
        """Whether a token is special, and no text."""
        if token not in self._is_control:
            self._is_control[token] = not self.tokenizer.decode([token], skip_special_tokens=True).strip()
        return self._is_control[token]


def _is_transformers_own(tokenizer: Any) -> bool:
    """Whether a tokenizer's call is transformers' own, and no code that came with a model."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names
    )


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
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
    """What is tokenized of a row: its texts, or what they share up to a token's end and the rest from the token on."""
    if start < 0:
        return list(texts)
    return [texts[0][: start + len(token)], *(text[start:] for text in texts)]


def _cutting_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens at which a text can be cut without a change to its tokens, with their ids.

    Left out: tokens that other added tokens contain, so that a longer one may be found in their place; those that are
    found in normalized text; those that depend on the letters around them (`single_word`).
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
