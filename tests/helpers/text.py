"""Small text, tokenizers and an independent reference for the tests of preprocessing."""

import io
import json
import random
from pathlib import Path

import numpy as np
import sentencepiece

SCRIPTS = (
    "the quick brown fox jumps over it",
    "def f(x):\n    return x + 1\n",
    "émile ça va ﬁn",
    "東京 と 京都",
    "🙂 ok",
)


def make_texts(count, seed=0):
    """Texts of 0 to some 300 words, with blanks, scripts and an empty one now and then."""
    rng = random.Random(seed)
    words = [*" ".join(SCRIPTS).split(" "), "\n", "\n\n", "  ", "\t", "1234", "</s>"]
    return [
        "" if rng.random() < 0.03 else " ".join(rng.choices(words, k=rng.randint(1, 300)))
        for _ in range(count)
    ]


def train_sentencepiece(path, **options):
    """A BPE model of 400 pieces over the words of `make_texts`."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "pad_id": 3,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    } | options
    lines = [line for text in make_texts(200, seed=1) for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **settings
    )
    Path(path).write_bytes(model.getvalue())
    return str(path)


def train_byte_level(folder, *, every_byte=True, digits=None):
    """Saves a byte-level BPE of transformers; with `digits` they are split off, each or together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits is not None:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=digits == "each"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if every_byte else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200, seed=1), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def reference_dataset(prefix, documents, *, model, append_eod):
    """Writes documents (lists of texts) with megatron.core's builder and SentencePiece alone."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(processor.vocab_size())
    )
    for texts in documents:
        rows = [row for row in (processor.encode(text) for text in texts) if row]
        if rows and append_eod:
            rows[-1] = [*rows[-1], processor.eos_id()]
        builder.add_document([i for row in rows for i in row], [len(row) for row in rows])
    builder.finalize(f"{prefix}.idx")
    return prefix


def same_files(first, second):
    return all(
        Path(f"{first}{suffix}").read_bytes() == Path(f"{second}{suffix}").read_bytes()
        for suffix in (".bin", ".idx")
    )


def write_dataset(prefix, documents, dtype=np.uint16):
    """Writes id lists as a data set without a manifest, with megatron.core's builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if len(ids) else [])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
