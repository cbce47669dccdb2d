"""A data set while it is made: its documents are appended block by block, and its index written last."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_ext.data.document_digests import DocumentSample
from megatron_ext.data.encode import EncodedKey
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.exceptions import DataError


@dataclass
class DataSet:
    """What becomes of one key's text while it is encoded.

    Attributes:
        key: The key.
        writer: Of its files.
        largest: Largest token id so far.
        sample: Digests of some of its documents.
    """

    key: str
    writer: IndexedWriter
    largest: int = 0
    sample: DocumentSample = field(default_factory=DocumentSample)

    def append(self, encoded: EncodedKey) -> None:
        """Takes the documents of a block."""
        self.writer.append(
            encoded.tokens,
            sequence_lengths=encoded.sequence_lengths,
            document_sequences=encoded.document_sequences,
        )
        self.largest = max(self.largest, encoded.max_token)
        self.sample.add(encoded.digests)

    def finish(self, skipped: Counter[str]) -> None:
        """Writes the index.

        Raises:
            DataError: There are no tokens.
        """
        if self.writer.tokens == 0:
            left_out = f", {skipped.total()} bad records left out" if skipped else ""
            raise DataError(
                f"no tokens for key {self.key!r}: {self.writer.documents} documents{left_out}"
            )
        self.writer.finish()
