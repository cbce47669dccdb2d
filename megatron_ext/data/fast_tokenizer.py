"""gigatoken in place of the exact tokenizer, where it is proved to give the same ids.

gigatoken 0.10.0 was compared with sentencepiece 0.2.3 on every code point in six contexts, on
200,000 random strings and on the standard library's source. With identity normalisation the ids are
the same but for two things: a control piece written out in the text, such as `</s>`, which gigatoken
reads as the piece and sentencepiece as plain characters, and user-defined symbols, which it splits.
With a normalisation table, non-ASCII text differs in places. So documents of these kinds are encoded
by the exact tokenizer, and models whose symbols cannot be looked for in the text altogether.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.any_of import contains_any
from megatron_ext.data.byte_level import adapt
from megatron_ext.data.tokenizers import (
    Encoded,
    HuggingFaceReference,
    SentencePieceReference,
    Tokenizer,
    TokenizerSpec,
    bounds_of,
    build_reference,
    flatten,
)
from megatron_ext.exceptions import ConfigError

Backend = Literal["auto", "gigatoken", "reference"]

# Text that breaks tokenizers: blanks, controls, composition, scripts, emoji, long runs.
# fmt: off
HOSTILE_TEXTS = (
    "", " ", "  ", "\n", "\n\n", "\t\ta", " a", "a ", "  a  b  ", "a\n  b", "a\r\nb\rc",
    "\n" * 500,
    "\x00", "a\x00b", "\x01\x02\x7f", "a".join(map(chr, range(32))), "a\U00050000b",
    "\x85", "a\x85", "\u200b\ufeff", "\ufeffhi", "\u2028",
    "a\u00adb",
    "é", "e\u0301", "ﬁ ﬃ ㎏ \uff21", "İ ß \u017f", "\u00a0x\u2003y\u3000z",
    "日本語テキスト", "नमस्ते", "العربية",
    "👩‍👩‍👧‍👦", "🏳️‍🌈🇩🇪", "\U0010ffff", "▁", "▁▁a", "a▁b", "☯", "<0x0A>",
    "<|endoftext|>", "[INST] x [/INST]",
    "a" * 5000, "ab" * 3000, " " * 3000, "1234567890" * 20, "don't  stop", "x=1;y==2",
    "def f(a):\n    return a\n",
)
# fmt: on


class FastTokenizer:
    """gigatoken for most texts, the exact tokenizer for those where it is known to differ.

    Args:
        reference: The exact tokenizer.
        backend: The gigatoken tokenizer.
        needs_reference: Tells the texts that go to the exact tokenizer.
        prefix: Ids that the exact tokenizer puts before every text.
        suffix: Ids that it puts after every text.
        missing: The first of the backend's ids for bytes that the exact tokenizer lacks. Texts with such
            a byte go to the exact tokenizer as well, which may join what stands around it.
        split: Cuts a text into what the backend gets as texts of their own.
    """

    backend_name = "gigatoken"

    def __init__(
        self,
        reference: Tokenizer,
        backend: Any,
        *,
        needs_reference: Callable[[str], bool],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        missing: int | None = None,
        split: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self.reference = reference
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.needs_reference = needs_reference
        self._backend = backend
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._missing, self._split = missing, split

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts one by one."""
        held = {i for i, text in enumerate(texts) if self.needs_reference(text)}
        fast = [i for i in range(len(texts)) if i not in held]
        ids, bounds = self._encode_fast([texts[i] for i in fast] if held else texts)
        held.update(fast[row] for row in self._rows_with_missing(ids, bounds))
        if not held:
            return ids, bounds
        rows = [ids[start:end] for start, end in pairwise(bounds)]
        of = dict(zip(fast, rows, strict=True))
        slow = sorted(held)
        ids, bounds = self.reference.encode_batch([texts[i] for i in slow])
        of |= {i: ids[bounds[row] : bounds[row + 1]] for row, i in enumerate(slow)}
        ordered = [of[i] for i in range(len(texts))]
        return np.concatenate(ordered), bounds_of([len(row) for row in ordered])

    def _rows_with_missing(self, ids: NDArray[Any], bounds: NDArray[Any]) -> list[int]:
        """Numbers of the texts that hold a byte which the exact tokenizer lacks."""
        if self._missing is None or not len(ids) or ids.max() < self._missing:
            return []
        places = np.flatnonzero(ids >= self._missing)
        return [*np.unique(np.searchsorted(bounds, places, side="right") - 1).tolist()]

    def _encode_fast(self, texts: Sequence[str]) -> Encoded:
        if not texts:
            return flatten([])
        if self._split is not None:
            parts = [self._split(text) for text in texts]
            ids, bounds = self._encode_whole([*chain.from_iterable(parts)])
            bounds = bounds[bounds_of([*map(len, parts)])]
        else:
            ids, bounds = self._encode_whole(texts)
        around = len(self._prefix) + len(self._suffix)
        if not around:
            return ids, bounds
        # np.insert keeps the order of what goes to one place: a suffix before the next text's
        # prefix.
        before = np.repeat(bounds[:-1, None], len(self._prefix), axis=1)
        after = np.repeat(bounds[1:, None], len(self._suffix), axis=1)
        places = np.concatenate((before, after), axis=1).ravel()
        values = np.tile([*self._prefix, *self._suffix], len(texts))
        return np.insert(ids, places, values), bounds + around * np.arange(len(bounds))

    def _encode_whole(self, texts: Sequence[str]) -> Encoded:
        """What the backend makes of texts."""
        if not texts:
            return flatten([])
        # parallel=False: the workers are processes already, and its thread pool does not survive a
        # fork.
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        ids, bounds = (
            np.asarray(layout.content.data),
            np.asarray(layout.offsets.data, dtype=np.int64),
        )
        return ids[bounds[0] : bounds[-1]], bounds - bounds[0]


def build_fast(spec: TokenizerSpec, reference: Tokenizer) -> FastTokenizer:
    """Loads gigatoken for a tokenizer, unchecked: see `choose_tokenizer`.

    Raises:
        _UnsupportedError: It cannot be used for this model; the message says why.
    """
    try:
        import gigatoken
    except ImportError as error:
        raise _UnsupportedError("gigatoken is not installed") from error
    try:
        if isinstance(reference, SentencePieceReference):
            needs_reference = _sentencepiece_guard(reference)
            backend = gigatoken.Tokenizer.from_sentencepiece(spec.tokenizer_model)
            return FastTokenizer(reference, backend, needs_reference=needs_reference)
        assert isinstance(reference, HuggingFaceReference)
        if not reference.tokenizer.is_fast:
            raise _UnsupportedError("the Hugging Face tokenizer is a slow one")
        prefix, suffix = _template(reference)
        adapted = adapt(reference.tokenizer)
        backend = gigatoken.Tokenizer(adapted.tokenizer)
        return FastTokenizer(
            reference,
            backend,
            needs_reference=_huggingface_guard(reference),
            prefix=prefix,
            suffix=suffix,
            missing=adapted.missing,
            split=adapted.split,
        )
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        raise _UnsupportedError(f"gigatoken cannot load it: {error}") from error


def choose_tokenizer(
    spec: TokenizerSpec, backend: Backend, sample: Sequence[str]
) -> tuple[Tokenizer, str]:
    """Picks gigatoken if its ids are those of the exact tokenizer on hostile texts and on a sample.

    Args:
        spec: The tokenizer.
        backend: `auto` falls back to the exact tokenizer, `gigatoken` refuses to.
        sample: Texts of the actual input.

    Returns:
        The tokenizer, and one line that says which it is and why.

    Raises:
        ConfigError: The model cannot be loaded, or `gigatoken` was asked for and is not exact.
    """
    reference = build_reference(spec)
    if backend == "reference":
        return reference, "encoding with the reference tokenizer, as asked"
    try:
        fast = build_fast(spec, reference)
        texts = [*HOSTILE_TEXTS, *sample]
        different = first_difference(fast, texts)
        if different is not None:
            raise _UnsupportedError(
                f"gigatoken's ids differ from its ids on {texts[different][:40]!r}"
            )
    except _UnsupportedError as error:
        if backend == "gigatoken":
            raise ConfigError(f"--tokenizer-backend gigatoken: {error}") from error
        return reference, f"encoding with the reference tokenizer: {error}"
    return (
        fast,
        f"encoding with gigatoken: same ids as the reference tokenizer on {len(texts)} texts",
    )


def first_difference(fast: FastTokenizer, texts: Sequence[str]) -> int | None:
    """Number of the first text for which a fast tokenizer is not exact; None if there is none."""
    ids, bounds = fast.encode_batch(texts)
    exact, exact_bounds = fast.reference.encode_batch(texts)
    for i in range(len(texts)):
        row, exact_row = (
            ids[bounds[i] : bounds[i + 1]],
            exact[exact_bounds[i] : exact_bounds[i + 1]],
        )
        if not np.array_equal(row, exact_row):
            return i
    return None


class _UnsupportedError(Exception):
    """gigatoken is not usable for a model."""


def _sentencepiece_guard(reference: SentencePieceReference) -> Callable[[str], bool]:
    """Tells the texts on which gigatoken differs from SentencePiece, as the module says."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(reference.processor.serialized_model_proto())
    kinds = model.SentencePiece
    symbols = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    normalizes = bool(model.normalizer_spec.precompiled_charsmap)
    if symbols and (normalizes or any(re.search(r"[\s▁]", symbol) for symbol in symbols)):
        raise _UnsupportedError(
            "gigatoken splits user-defined symbols in other ways than SentencePiece, and a text need not "
            "hold them as they are written, since they hold blanks or texts are normalised"
        )
    has_piece = contains_any(
        [*symbols, *(piece.piece for piece in model.pieces if piece.type == kinds.CONTROL)]
    )
    if not normalizes:
        return has_piece
    return lambda text: not text.isascii() or has_piece(text)


def _huggingface_guard(reference: HuggingFaceReference) -> Callable[[str], bool]:
    """Tells the texts that hold an added token, some of which are looked for in normalised text."""
    contains = contains_any(sorted(reference.tokenizer.get_added_vocab()))
    normalizer = reference.tokenizer.backend_tokenizer.normalizer
    added = reference.tokenizer.added_tokens_decoder.values()
    tokens = [token.content for token in added if token.normalized]
    if normalizer is None or not tokens:
        return contains
    in_normalized = contains_any(sorted({normalizer.normalize_str(token) for token in tokens}))
    return lambda text: contains(text) or in_normalized(normalizer.normalize_str(text))


def _template(reference: HuggingFaceReference) -> tuple[list[int], list[int]]:
    """Ids that a Hugging Face tokenizer puts around every text."""
    if not reference.include_special_tokens:
        return [], []
    ids = reference.tokenizer("a").input_ids
    bare = reference.tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start], ids[start + len(bare) :]
    raise _UnsupportedError("its template changes the text")
