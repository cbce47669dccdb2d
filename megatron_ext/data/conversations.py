"""Conversations as documents: rendered whole by a chat template, with the tokens that chat tuning trains on.

Those are not the tokens of the rendered text in one piece: tuning tokenises prompts and answers each by
itself (see `chat_template`), and SentencePiece reads no special token from text. So a record becomes the
pieces of which `ChatTemplate.encode` joins the tokens, and the tokenizer, fast or exact, is given those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.data.chat import Shape, shape_of, take_conversation
from megatron_ext.data.chat_template import ChatTemplate, load_template
from megatron_ext.data.documents import Block, json_lines, read_blocks
from megatron_ext.data.inputs import InputFormat, format_of
from megatron_ext.data.records import BadRecord, Record
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.exceptions import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ConversationFormat:
    """All that a worker process needs to make documents of conversations.

    Attributes:
        template: the chat template.
        name: where it is from: the name of a file or folder, ``tokenizer``, or ``built-in``.
        origin: the same, for messages.
        tokenizer: the tokenizer, which adds no tokens to a text.
        shapes: shape of the records of each file.
    """

    template: str
    name: str
    origin: str
    tokenizer: TokenizerSpec
    shapes: Mapping[str, Shape]

    @property
    def digest(self) -> str:
        """SHA-256 of the template, as of the file that chat tuning leaves beside its checkpoints."""
        return hashlib.sha256(self.template.encode()).hexdigest()


def find_format(
    paths: Sequence[Path],
    tokenizer: TokenizerSpec,
    *,
    input_format: InputFormat,
    template: str | Path | None,
) -> ConversationFormat:
    """Read the template and, of each file, the first record, which says how conversations are kept there.

    Args:
        paths: JSON lines, each file of one shape.
        tokenizer: the tokenizer, which adds no tokens to a text.
        input_format: format of all files, or by their names.
        template: as of `load_template`.

    Raises:
        ConfigError: a file is of another format, or the template cannot be used.
        DataError: a file cannot be read, or its first record has no known shape.
    """
    for path in paths:
        if (kind := format_of(path, input_format=input_format)) != "jsonl":
            raise ConfigError(
                "--conversations: expected JSON lines (--input-format jsonl, where names do not say so), "
                f"found {path} ({kind})"
            )
    loaded = load_template(tokenizer, path=template)
    loaded.check_tuning()
    name = "built-in" if loaded.is_built_in else "tokenizer"
    if template is not None:
        name = Path(template).resolve().name
    shapes = {}
    for path in paths:
        # Of a file that ends early the records before are read; whether that will do is said later.
        for block in read_blocks([path], keys=(), input_format="jsonl", skip_broken=True):
            first = next(json_lines(block), None) if block.kind == "jsonl" else None
            if first is not None:
                shapes[str(path)] = shape_of(first[1], f"{path}:{first[0]}")
            if first is not None or block.kind != "jsonl":
                break
    return ConversationFormat(
        template=loaded.source, name=name, origin=loaded.origin, tokenizer=tokenizer, shapes=shapes
    )


class ConversationParser:
    """Makes of raw blocks what `parse_block` makes of those of text: one key, a document a conversation.

    Args:
        found: the format.

    Attributes:
        special_ids: the token of each piece that is no text.
    """

    def __init__(self, found: ConversationFormat) -> None:
        self._template = ChatTemplate(found.template, found.tokenizer, origin=found.origin)
        self._shapes = found.shapes
        self.special_ids = self._template.special_ids

    def __call__(self, block: Block) -> Iterator[Record | BadRecord]:
        """Parses the records of a block, in order; the texts of a document are its pieces."""
        if block.kind == "bad":
            yield from block.payload
            return
        for number, line in json_lines(block):
            where = f"{block.path}:{number}"
            found = take_conversation(line, where, self._shapes[block.path])
            if isinstance(found, BadRecord):
                # Few different reasons, for they are counted.
                yield BadRecord(where, "no conversation", f"{found.reason}, {found.detail}")
                continue
            try:
                yield [self._template.pieces(found.messages)]
            except DataError as error:
                yield BadRecord(where, "the chat template refuses it", str(error))
