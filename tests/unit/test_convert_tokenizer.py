"""A SentencePiece model as a Hugging Face tokenizer: the same ids, or a refusal."""

import hashlib

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_ext.conversion import from_sentencepiece
from megatron_ext.conversion.huggingface import TOKENIZER_FILES, copy_files
from megatron_ext.data.tokenizers import TokenizerSpec, tokenizer_digest
from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from megatron_ext.exceptions import ConfigError
from tests.helpers.text import make_texts, train_sentencepiece, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """As the product's own tool makes it."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    records = [{"text": text} for text in make_texts(200, seed=5) if text]
    source = write_jsonl(folder / "a.jsonl", records)
    output = folder / "tok.model"
    train_tokenizer(TrainTokenizerConfig(inputs=[source], output=str(output), vocab_size=400))
    return output


def test_ids_and_text_are_those_of_sentencepiece(model, tmp_path):
    from_sentencepiece.write_tokenizer(model, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert len(ours) == theirs.vocab_size()
    assert (ours.unk_token_id, ours.bos_token_id) == (theirs.unk_id(), theirs.bos_id())
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_id(), theirs.pad_id())
    for text in make_texts(300, seed=6):
        if "</s>" not in text:
            ids = theirs.encode(text)
            assert ours(text).input_ids == ids
            assert ours.decode(ids) == text
    # In text SentencePiece reads no special token; chat templates need it to be one here.
    assert ours("a</s>").input_ids == [*theirs.encode("a"), theirs.eos_id()]
    assert theirs.eos_id() not in theirs.encode("a</s>")


def test_data_of_the_one_are_data_of_the_other(model, tmp_path):
    def digest(kind, path):
        return tokenizer_digest(TokenizerSpec(tokenizer_type=kind, tokenizer_model=str(path)))

    folder, copied = tmp_path / "made", tmp_path / "copied"
    for each in (folder, copied):
        each.mkdir()
    from_sentencepiece.write_tokenizer(model, folder)
    copy_files(folder, copied, TOKENIZER_FILES)  # as an import does
    for each in (folder, copied):
        assert digest("HuggingFaceTokenizer", each) == digest("SentencePieceTokenizer", model)
    # Its vocabulary was changed since, or the note was lost or cut short.
    changed = (copied / "tokenizer.json").read_text() + "\n"
    (copied / "tokenizer.json").write_text(changed)
    own = hashlib.sha256(changed.encode()).hexdigest()
    assert digest("HuggingFaceTokenizer", copied) == own
    note = copied / "sentencepiece_origin.json"
    for text in ("", "[]", "{}", "null"):
        note.write_text(text)
        assert digest("HuggingFaceTokenizer", copied) == own
    note.unlink()
    assert digest("HuggingFaceTokenizer", copied) == own


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"model_type": "unigram"}, "byte pairs"),
        ({"byte_fallback": False}, "bytes for what has no piece"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation"),
        ({"add_dummy_prefix": True, "remove_extra_whitespaces": True}, "spaces that are kept, no "),
        ({"user_defined_symbols": ["<sep>"]}, "no symbols of its own"),
    ],
)
def test_other_kinds_are_refused_by_what_they_lack(options, lacking, tmp_path):
    train_sentencepiece(tmp_path / "other.model", **options)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=rf"^--tokenizer: .*other\.model .* that takes {lacking}"):
        from_sentencepiece.write_tokenizer(tmp_path / "other.model", tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


def test_a_tokenizer_that_joins_in_another_order_is_found_out(model, tmp_path, monkeypatch):
    merges = from_sentencepiece._merges
    monkeypatch.setattr(from_sentencepiece, "_merges", lambda *found: merges(*found)[::-1])
    with pytest.raises(ConfigError, match=r"^--tokenizer: .* is not converted: ids differ on '"):
        from_sentencepiece.write_tokenizer(model, tmp_path)
