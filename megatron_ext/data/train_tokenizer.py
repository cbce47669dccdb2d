"""Training of a SentencePiece BPE tokenizer on the inputs of preprocessing."""

import io
import logging
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import sentencepiece
from tqdm import tqdm

from megatron_ext.data.atomic import AtomicFiles, check_place
from megatron_ext.data.documents import parse_block, read_blocks
from megatron_ext.data.inputs import InputFormat, find_inputs
from megatron_ext.data.records import BadRecord
from megatron_ext.exceptions import ConfigError, DataError

logger = logging.getLogger(__name__)

# SentencePiece drops longer sentences; they are cut instead, so that no text is lost.
_SENTENCE_CHARACTERS = 1000
_PROBE_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """What to train on, and what to train.

    Attributes:
        inputs: Files, directories and globs.
        output: The model file.
        vocab_size: Pieces, all kinds together: 4 control pieces, 256 bytes, characters and merges.
        keys: Keys or columns that hold text.
        input_format: Format of all inputs, or by their names.
        split_digits: Whether each digit is a piece of its own.
        max_bytes: Text to train on, of each file as much as its share of the input's stored bytes, from
            its start; all of it is held in memory.
        on_error: Whether a bad record stops the training or is left out and counted.
        overwrite: Whether an existing model may be replaced.
    """

    inputs: list[str]
    output: str
    vocab_size: int
    keys: list[str] = field(default_factory=lambda: ["text"])
    input_format: InputFormat = "auto"
    split_digits: bool = True
    max_bytes: int = 1_000_000_000
    on_error: Literal["fail", "skip"] = "fail"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise ConfigError(
                f"--vocab-size: expected at least 300 (256 bytes, 4 control pieces, characters), "
                f"found {self.vocab_size}"
            )
        if self.max_bytes < 1:
            raise ConfigError(f"--max-bytes: expected at least 1, found {self.max_bytes}")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerResult:
    """What came out.

    Attributes:
        vocab_size: Pieces.
        text_bytes: UTF-8 bytes of text learned from.
        files: Given.
        files_read: Of which at least the start was read.
        files_cut: Of which no more than the start was read.
        probe_bytes: Bytes of the text, its end, on which `bytes_per_token` was measured.
        bytes_per_token: Mean bytes of a token.
        skipped: Bad records left out, by reason.
    """

    vocab_size: int
    text_bytes: int
    files: int
    files_read: int
    files_cut: int
    probe_bytes: int
    bytes_per_token: float
    skipped: dict[str, int]


class _Lines:
    """The lines of the input, cut to length, counted as they pass.

    Of each file no more is read than its share of `max_bytes` by its size as stored, and what the files
    before it have left of theirs. A document that is longer than that counts against the files behind it:
    of many small files some are left out, evenly.
    """

    def __init__(self, config: TrainTokenizerConfig) -> None:
        self._config = config
        self.paths = find_inputs(config.inputs, input_format=config.input_format)
        self._sizes = [max(1, path.stat().st_size) for path in self.paths]
        self.text_bytes = self.files_read = self.files_cut = 0
        self.probe: deque[str] = deque()
        self.skipped: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._cut()
        except (Exception, KeyboardInterrupt) as error:
            # SentencePiece makes an internal error of its own, with a trace, of whatever ends its input.
            self.failure = error
            raise

    def _cut(self) -> Iterator[str]:
        total = min(sum(self._sizes), self._config.max_bytes)
        kept = 0
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
            for text in self._texts():
                # Newlines stay out of the pieces: each is a byte piece of its own when encoded.
                for line in text.split("\n"):
                    for start in range(0, len(line), _SENTENCE_CHARACTERS):
                        yield line[start : start + _SENTENCE_CHARACTERS]
                size = len(text.encode())
                self.text_bytes += size
                bar.update(size)
                self.probe.append(text)
                kept += size
                while kept - len(self.probe[0].encode()) >= _PROBE_BYTES:
                    kept -= len(self.probe.popleft().encode())

    def _texts(self) -> Iterator[str]:
        stored, all_stored = 0, sum(self._sizes)
        for path, size in zip(self.paths, self._sizes, strict=True):
            stored += size
            share = self._config.max_bytes * stored // all_stored
            if self.text_bytes >= share:
                continue
            self.files_read += 1
            for text in self._texts_of(path):
                if self.text_bytes >= share:
                    self.files_cut += 1
                    break
                yield text

    def _texts_of(self, path: Path) -> Iterator[str]:
        config = self._config
        blocks = read_blocks(
            [path],
            keys=config.keys,
            input_format=config.input_format,
            text_unit="line",  # it is cut into lines in any case, and a large file would be held whole
            skip_broken=config.on_error == "skip",
        )
        for block in blocks:
            for record in parse_block(block, config.keys):
                if not isinstance(record, BadRecord):
                    for texts in record:
                        yield from texts
                elif config.on_error == "fail":
                    raise DataError(f"{record}; --on-error skip leaves such records out")
                else:
                    self.skipped[record.reason] += 1
                    if self.skipped[record.reason] <= 3 or record.where == block.path:
                        logger.warning("skipped %s", record)


def train_tokenizer(config: TrainTokenizerConfig) -> TrainTokenizerResult:
    """Trains a tokenizer and writes its model.

    Raises:
        ConfigError: The output exists or has no place, no input matches, or the vocabulary is too small
            for the text.
        DataError: The input cannot be read, holds a bad record, or is too small for the vocabulary.
    """
    check_place(config.output, flag="--output")
    lines = _Lines(config)
    output = Path(config.output)
    model = io.BytesIO()
    with AtomicFiles([output], overwrite=config.overwrite) as files:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=config.vocab_size,
                byte_fallback=True,
                split_digits=config.split_digits,
                # Nothing is normalised, added or removed, so that encoding can be undone.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                # The rarest characters, together 0.05% of the text, are left to the bytes.
                character_coverage=0.9995,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                # Recorded in the model: another number would give the same pieces another digest.
                num_threads=4,
                minloglevel=2,
            )
        except RuntimeError as error:
            failure = lines.failure or _explain(error, config.vocab_size, lines.text_bytes)
            raise failure from error
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        files[output].write(model.getvalue())
        files.commit()
    probe_bytes = sum(len(text.encode()) for text in lines.probe)
    probe_tokens = sum(len(processor.encode(text)) for text in lines.probe)
    return TrainTokenizerResult(
        vocab_size=processor.vocab_size(),
        text_bytes=lines.text_bytes,
        files=len(lines.paths),
        files_read=lines.files_read,
        files_cut=lines.files_cut,
        probe_bytes=probe_bytes,
        bytes_per_token=probe_bytes / max(probe_tokens, 1),
        skipped=dict(lines.skipped),
    )


def _explain(error: RuntimeError, vocab_size: int, text_bytes: int) -> Exception:
    """Turns SentencePiece's error into the setting to change."""
    message = " ".join(str(error).split())
    if text_bytes == 0:
        return DataError("the input holds no text to train a tokenizer on")
    if "Please set it to a value <=" in message:
        limit = message.rpartition("<=")[2].strip(" .")
        return DataError(
            f"--vocab-size {vocab_size}: {text_bytes} bytes of text are too few for it, "
            f"at most {limit} pieces"
        )
    if needed := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size}: the text has so many characters that at least "
            f"{needed[1]} pieces are needed"
        )
    return DataError(f"SentencePiece: {message}")
