"""Text to Megatron's indexed data sets: many workers, one order, all files or none.

The parent reads raw blocks and writes tokens; the workers parse and encode. At most two blocks a
worker are on their way; memory grows with the input by 8 bytes a document alone, of the index. Results
are taken in the order of the input.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_ext.data.atomic import AtomicFiles, check_place
from megatron_ext.data.data_set import DataSet
from megatron_ext.data.documents import (
    Block,
    TextUnit,
    read_blocks,
)
from megatron_ext.data.encode import BackendMismatchError, sample_texts
from megatron_ext.data.fast_tokenizer import Backend, choose_tokenizer
from megatron_ext.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from megatron_ext.data.inputs import InputFormat, find_inputs, format_of
from megatron_ext.data.manifest import Manifest, Source, manifest_path
from megatron_ext.data.progress import Progress
from megatron_ext.data.tokenizers import (
    Tokenizer,
    TokenizerSpec,
    around_text,
    build_reference,
    tokenizer_digest,
)
from megatron_ext.data.workers import encode_in_order
from megatron_ext.exceptions import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_ext.data.conversations import ConversationFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to encode, how, and where to.

    Attributes:
        inputs: Files, directories and globs.
        output_prefix: Outputs are `PREFIX_KEY_document.bin`, `.idx` and `.manifest.json`.
        tokenizer: The tokenizer.
        keys: Keys (JSON) or columns (Parquet) that hold text; each makes a data set.
        conversations: Whether records are conversations, each of which becomes a document; see `chat.py`.
        chat_template: What renders them, as of `load_template`.
        append_eod: Whether to end each non-empty document with the end-of-document id.
        workers: Encoding processes; 1 encodes in this process.
        input_format: Format of all inputs, or by their names.
        text_unit: What is one document of plain text.
        on_error: Whether a bad record stops the run or is left out and counted.
        backend: Whether gigatoken encodes where it is exact.
        overwrite: Whether existing outputs may be replaced.
        log_interval: Documents between two lines of progress where there is no terminal for a bar.
    """

    inputs: list[str]
    output_prefix: str
    tokenizer: TokenizerSpec
    keys: list[str] = field(default_factory=lambda: ["text"])
    conversations: bool = False
    chat_template: str | None = None
    append_eod: bool = False
    workers: int = 1
    input_format: InputFormat = "auto"
    text_unit: TextUnit = "file"
    on_error: Literal["fail", "skip"] = "fail"
    backend: Backend = "auto"
    overwrite: bool = False
    log_interval: int = 10000

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers: expected at least 1, found {self.workers}")
        if self.log_interval < 1:
            raise ConfigError(f"--log-interval: expected at least 1, found {self.log_interval}")
        if self.output_prefix.endswith("/"):
            raise ConfigError(
                f"--output-prefix: expected a folder and the beginning of file names, found the folder "
                f"{self.output_prefix} alone"
            )
        if not self.keys or len(set(self.keys)) != len(self.keys):
            raise ConfigError(f"--json-keys: expected distinct names, found {self.keys}")
        if self.conversations and self.keys != ["text"]:
            raise ConfigError(
                f"--json-keys: expected none beside --conversations, found {' '.join(self.keys)}"
            )
        if self.chat_template is not None and not self.conversations:
            raise ConfigError(
                f"--chat-template {self.chat_template}: expected --conversations beside it, found none"
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """What a run wrote.

    Attributes:
        prefixes: Prefix of each key's data set, as for `--data-path`.
        manifests: Manifest of each data set.
        skipped: Bad records left out, by reason.
        text_bytes: UTF-8 bytes of text encoded, all keys.
        seconds: From the start of encoding to the last file in place.
    """

    prefixes: list[str]
    manifests: list[Manifest]
    skipped: dict[str, int]
    text_bytes: int
    seconds: float


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Encodes text into Megatron's indexed data sets.

    The files are, byte for byte, those of Megatron-LM's `tools/preprocess_data.py`. If gigatoken
    turns out not to be exact after the run has begun, `auto` starts over with the exact tokenizer.

    Raises:
        ConfigError: Settings that cannot work, or outputs that exist or have no place.
        DataError: Inputs that cannot be read, a bad record, or no tokens at all. Nothing is written
            then.
    """
    check_place(config.output_prefix, flag="--output-prefix")
    paths = find_inputs(config.inputs, input_format=config.input_format)
    has_text = any(format_of(p, input_format=config.input_format) == "text" for p in paths)
    if config.text_unit != "file" and not has_text:
        raise ConfigError(
            f"--text-unit {config.text_unit}: expected plain text in the input, found records alone, each of "
            "which is a document"
        )
    if config.keys != ["text"] and has_text:
        raise ConfigError(
            "--json-keys: plain text has no keys; leave it out, or name no text files"
        )
    conversations = None
    if config.conversations:
        # The template alone says which tokens are around a text.
        config = replace(config, tokenizer=replace(config.tokenizer, include_special_tokens=False))
        # Its templates cost each start 25 ms.
        from megatron_ext.data.conversations import find_format

        conversations = find_format(
            *(paths, config.tokenizer),
            input_format=config.input_format,
            template=config.chat_template,
        )
        logger.info("rendering conversations by the chat template: %s", conversations.name)
    prefixes = [f"{config.output_prefix}_{key}_document" for key in config.keys]
    outputs = [path for prefix in prefixes for path in _outputs(prefix)]
    with AtomicFiles(outputs, overwrite=config.overwrite) as files:
        sample = sample_texts(_blocks(config, paths), config.keys, conversations)
        tokenizer, message = choose_tokenizer(config.tokenizer, config.backend, sample)
        logger.info("%s", message)
        if config.append_eod and tokenizer.eod_id is None:
            raise ConfigError("--append-eod: the tokenizer has no end-of-document (EOS) piece")
        origin = _Origin(
            tokenizer_digest(config.tokenizer),
            [Source(path=str(path), bytes=path.stat().st_size) for path in paths],
            conversations,
        )
        try:
            return _run(config, paths, prefixes, files, tokenizer, origin)
        except BackendMismatchError as error:
            if config.backend == "gigatoken":
                raise DataError(f"--tokenizer-backend gigatoken: {error}") from error
            logger.warning("%s; starting over with the reference tokenizer", error)
            files.restart()
            exact = build_reference(config.tokenizer)
            return _run(config, paths, prefixes, files, exact, origin)


@dataclass(frozen=True)
class _Origin:
    """What the manifests name, looked up before the run: hours later it may be gone."""

    tokenizer_digest: str
    sources: list[Source]
    conversations: ConversationFormat | None


def _run(
    config: PreprocessConfig,
    paths: list[Path],
    prefixes: list[str],
    files: AtomicFiles,
    tokenizer: Tokenizer,
    origin: _Origin,
) -> PreprocessResult:
    """Encodes everything with one tokenizer and publishes the files."""
    start = time.monotonic()
    dtype = token_dtype(tokenizer.vocab_size)
    data_sets = [
        DataSet(key, IndexedWriter(files[bin_path(p)], files[idx_path(p)], dtype))
        for key, p in zip(config.keys, prefixes, strict=True)
    ]
    skipped: Counter[str] = Counter()
    text_bytes = 0
    encoded = encode_in_order(
        _blocks(config, paths),
        tokenizer,
        config.tokenizer,
        keys=config.keys,
        append_eod=config.append_eod,
        workers=config.workers,
        conversations=origin.conversations,
    )
    with Progress(sum(source.bytes for source in origin.sources), config.log_interval) as progress:
        for block in encoded:
            if block.bad and config.on_error == "fail":
                raise DataError(f"{block.bad[0]}; --on-error skip leaves such records out")
            for record in block.bad:
                skipped[record.reason] += 1
                if skipped[record.reason] <= 3 or record.where == block.path:  # all of a file
                    logger.warning("skipped %s", record)
            for data_set, key in zip(data_sets, block.keys, strict=True):
                data_set.append(key)
            text_bytes += block.text_bytes
            first = data_sets[0].writer
            progress.update(block.consumed, first.documents, first.tokens)
    for data_set in data_sets:
        data_set.finish(skipped)
    manifests = [_manifest(config, origin, tokenizer, data_set, skipped) for data_set in data_sets]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        files[manifest_path(prefix)].write(manifest.to_json())
    files.commit()
    return PreprocessResult(
        prefixes=prefixes,
        manifests=manifests,
        skipped=dict(skipped),
        text_bytes=text_bytes,
        seconds=time.monotonic() - start,
    )


def _outputs(prefix: str) -> list[Path]:
    """The files of a data set in the order of their publication; readers look for the index."""
    return [bin_path(prefix), manifest_path(prefix), idx_path(prefix)]


def _blocks(config: PreprocessConfig, paths: list[Path]) -> Iterator[Block]:
    return read_blocks(
        paths,
        keys=config.keys,
        input_format=config.input_format,
        text_unit=config.text_unit,
        skip_broken=config.on_error == "skip",
    )


def _manifest(
    config: PreprocessConfig,
    origin: _Origin,
    tokenizer: Tokenizer,
    data_set: DataSet,
    skipped: Counter[str],
) -> Manifest:
    writer, rendered = data_set.writer, origin.conversations
    before, after = around_text(tokenizer) if rendered is None else (None, None)
    return Manifest(
        tokenizer_type=config.tokenizer.tokenizer_type,
        tokenizer_model=Path(config.tokenizer.tokenizer_model).name,
        tokenizer_digest=origin.tokenizer_digest,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        append_eod=config.append_eod,
        dtype=token_dtype(tokenizer.vocab_size).name,
        documents=writer.documents,
        sequences=writer.sequences,
        tokens=writer.tokens,
        max_token_id=data_set.largest,
        skipped=dict(skipped),
        backend=tokenizer.backend_name,
        sources=origin.sources,
        content_digest=writer.content_digest,
        document_sample=[digest.to_bytes(8).hex() for digest in data_set.sample.smallest],
        chat_template=None if rendered is None else rendered.name,
        chat_template_digest=None if rendered is None else rendered.digest,
        before_text=before,
        after_text=after,
    )
