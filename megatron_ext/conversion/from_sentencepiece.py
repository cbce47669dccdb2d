"""A SentencePiece model as the folder of a Hugging Face tokenizer that gives the same ids.

For models such as `tools/train_tokenizer.py` makes: byte pairs, bytes for what has no piece, text taken as
it is. Others are refused, and so is one whose ids differ on any of the texts that are tried.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.data.fast_tokenizer import HOSTILE_TEXTS
from megatron_ext.data.tokenizers import (
    HuggingFaceReference,
    SentencePieceReference,
    TokenizerSpec,
    record_origin,
)
from megatron_ext.exceptions import ConfigError

_SPACE = "▁"
_FLAG = "--tokenizer"
# Texts of random pieces that are compared, and pieces in each.
_TEXTS, _PIECES = 2000, 20


def write_tokenizer(model: Path, folder: Path) -> None:
    """Write the tokenizer.

    Special tokens are found in text, as everywhere in Hugging Face and unlike in SentencePiece, where text
    never becomes one.

    Args:
        model: a SentencePiece model.
        folder: where to write; it is there already.

    Raises:
        ConfigError: the model is of another kind, or the ids differ.
    """
    spec = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    reference = SentencePieceReference(spec)
    _fast(_proto(reference, model), reference).save_pretrained(folder)
    _compare(reference, HuggingFaceReference(tokenizer_spec(folder), flag=_FLAG), model)
    record_origin(folder, model)


def _proto(reference: SentencePieceReference, model: Path) -> Any:
    """The model's own description, if it is of the kind that is converted."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto.FromString(reference.processor.serialized_model_proto())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wanted = {
        "byte pairs": trainer.model_type == trainer.BPE,
        "bytes for what has no piece": trainer.byte_fallback,
        "spaces that are kept": not normalizer.remove_extra_whitespaces,
        "spaces as ▁": normalizer.escape_whitespaces,
        "no normalisation": not normalizer.precompiled_charsmap,
        "no space before the text": not normalizer.add_dummy_prefix,
        "no symbols of its own": all(p.type != p.USER_DEFINED for p in proto.pieces),
    }
    if lacking := [name for name, found in wanted.items() if not found]:
        raise ConfigError(
            f"{_FLAG}: expected the folder of a Hugging Face tokenizer, found none, and {model} is not "
            f"converted: that takes {', '.join(lacking)}"
        )
    return proto


def _fast(proto: Any, reference: SentencePieceReference) -> PreTrainedTokenizerFast:
    """The same vocabulary and the same order of joining."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    processor = reference.processor
    names = {
        name: processor.id_to_piece(number)
        for name, number in (
            ("unk_token", processor.unk_id()),
            ("bos_token", processor.bos_id()),
            ("eos_token", processor.eos_id()),
            ("pad_token", processor.pad_id()),
        )
        if number >= 0
    }
    pairs = BPE(
        vocab=vocabulary,
        merges=_merges(proto, vocabulary),
        unk_token=names["unk_token"],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(pairs)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the pieces with the highest scores first."""
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    merges = []
    for made in sorted(normal, key=lambda piece: -piece.score):
        text = made.piece
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    return merges


def _compare(
    reference: SentencePieceReference, converted: HuggingFaceReference, model: Path
) -> None:
    """Compare ids, and the text that they give back, on hostile texts and on random pieces.

    Raises:
        ConfigError: they differ; names the text.
    """
    processor, tokenizer = reference.processor, converted.tokenizer
    chance = random.Random(0)
    special = list(tokenizer.all_special_tokens)
    plain = [n for n in range(reference.vocab_size) if processor.id_to_piece(n) not in special]
    drawn = (processor.decode(chance.choices(plain, k=_PIECES)) for _ in range(_TEXTS))
    for text in (*HOSTILE_TEXTS, *drawn):
        if any(token in text for token in special):
            continue
        expected = processor.encode(text)
        found = tokenizer(text, add_special_tokens=False).input_ids
        if found != expected or tokenizer.decode(found) != processor.decode(expected):
            raise ConfigError(
                f"{_FLAG}: expected the folder of a Hugging Face tokenizer, found none, and {model} is not "
                f"converted: ids differ on {text[:40]!r}"
            )
