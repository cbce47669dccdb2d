"""Tokenizers of preprocessing against megatron.core's, and gigatoken against both."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from megatron_ext.data import tokenizers
from megatron_ext.data.fast_tokenizer import HOSTILE_TEXTS, FastTokenizer, choose_tokenizer
from megatron_ext.data.tokenizers import TokenizerSpec, build_reference, tokenizer_digest
from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.text import make_texts, train_byte_level, train_sentencepiece, write_jsonl

NORMALIZING = {
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "add_dummy_prefix": True,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "identity": train_sentencepiece(folder / "identity.model"),
        "normalizing": train_sentencepiece(folder / "normalizing.model", **NORMALIZING),
        "symbols": train_sentencepiece(
            folder / "symbols.model", user_defined_symbols=["<|x|>", "\n\n"], **NORMALIZING
        ),
        "plain symbols": train_sentencepiece(
            folder / "plain.model", user_defined_symbols=["<|x|>", "[REF]"]
        ),
        "unigram": train_sentencepiece(folder / "unigram.model", model_type="unigram"),
        "huggingface": train_byte_level(folder / "hf"),
    }


def spec_of(models, name, **options):
    kind = "HuggingFaceTokenizer" if name == "huggingface" else "SentencePieceTokenizer"
    return TokenizerSpec(tokenizer_type=kind, tokenizer_model=models[name], **options)


def rows(tokenizer, texts):
    ids, bounds = tokenizer.encode_batch(texts)
    return [row.tolist() for row in np.split(ids, bounds[1:-1])]


@pytest.mark.parametrize("name", ["identity", "normalizing", "symbols", "unigram", "huggingface"])
@pytest.mark.parametrize("special", [True, False])
def test_reference_is_megatrons_tokenizer(models, name, special):
    from megatron.core.tokenizers import MegatronTokenizer

    library, options = "sentencepiece", {}
    if name == "huggingface":
        library, options = "huggingface", {"include_special_tokens": special}
    theirs = MegatronTokenizer.from_pretrained(
        tokenizer_path=models[name], metadata_path={"library": library}, **options
    )
    ours = build_reference(spec_of(models, name, include_special_tokens=special))
    texts = [*HOSTILE_TEXTS, *make_texts(50)]
    assert rows(ours, texts) == [theirs.tokenize(text) for text in texts]
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)


@pytest.mark.parametrize("name", ["identity", "normalizing", "plain symbols", "huggingface"])
def test_fast_is_exact_on_texts_of_all_kinds(models, name):
    rng = np.random.default_rng(0)
    pieces = [
        *map(chr, range(0x250)),
        *"▁\u2028\u3000東ﬁ🙂\u0301",
        *["</s>", "<s>", "<|x|>", "[REF]", "the", " "] * 20,
    ]
    texts = ["".join(rng.choice(pieces, size=n)) for n in rng.integers(1, 40, size=2000)]
    tokenizer, message = choose_tokenizer(spec_of(models, name), "auto", texts[:100])
    assert isinstance(tokenizer, FastTokenizer), message
    assert "gigatoken" in message
    reference = build_reference(spec_of(models, name))
    assert rows(tokenizer, texts) == rows(reference, texts)


@pytest.mark.parametrize(
    ("name", "reason"), [("symbols", "user-defined symbols"), ("unigram", "cannot load it")]
)
def test_fallback_says_why(models, name, reason):
    tokenizer, message = choose_tokenizer(spec_of(models, name), "auto", [])
    assert tokenizer.backend_name == "reference"
    assert reason in message
    with pytest.raises(ConfigError, match=f"--tokenizer-backend gigatoken: .*{reason}"):
        choose_tokenizer(spec_of(models, name), "gigatoken", [])


@pytest.mark.parametrize("name", ["identity", "symbols"])
def test_bare_gigatoken_differs_where_the_guards_stand(models, name):
    """The guards are needed: without them the same texts come out differently."""
    import gigatoken

    processor = sentencepiece.SentencePieceProcessor(model_file=models[name])
    bare = gigatoken.Tokenizer.from_sentencepiece(models[name])
    text = {"identity": "a</s>b", "symbols": "a\n\nb"}[name]
    assert bare.encode(text).tolist() != processor.encode(text)


def test_difference_in_the_sample_falls_back(models, monkeypatch):
    exact = FastTokenizer._encode_fast

    def broken(self, texts):
        ids, bounds = exact(self, texts)
        return (ids + 1 if "the very one" in texts else ids), bounds

    monkeypatch.setattr(FastTokenizer, "_encode_fast", broken)
    spec = spec_of(models, "identity")
    assert choose_tokenizer(spec, "auto", ["a"])[0].backend_name == "gigatoken"
    tokenizer, message = choose_tokenizer(spec, "auto", ["a", "the very one"])
    assert tokenizer.backend_name == "reference"
    assert "differ" in message


def test_gigatoken_not_installed(models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    tokenizer, message = choose_tokenizer(spec_of(models, "identity"), "auto", [])
    assert (tokenizer.backend_name, "not installed" in message) == ("reference", True)


def test_added_tokens_are_also_found_in_normalised_text(models, tmp_path):
    """The same letter may be two code points: the token is found, gigatoken alone does not find it."""
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(models["huggingface"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(AddedToken("<\u00e9>", normalized=True))
    tokenizer.save_pretrained(tmp_path)
    spec = TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    tokenizer, message = choose_tokenizer(spec, "auto", [])
    assert isinstance(tokenizer, FastTokenizer), message
    texts = ["a <\u00e9> b", "a <e\u0301> b", "e\u0301"]
    assert rows(tokenizer, texts) == rows(tokenizer.reference, texts)
    assert [*map(tokenizer.needs_reference, texts)] == [True, True, False]


def test_digest_depends_on_the_model(models):
    digests = {tokenizer_digest(spec_of(models, name)) for name in models}
    assert len(digests) == len(models)


def test_unknown_type():
    with pytest.raises(ConfigError, match="--tokenizer-type: expected one of"):
        TokenizerSpec(tokenizer_type="TikTokenizer", tokenizer_model="x")


def test_a_file_is_no_hugging_face_tokenizer(models):
    spec = TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=models["identity"])
    with pytest.raises(
        ConfigError,
        match=r"--tokenizer-model: expected the folder .*, found a file, .*SentencePiece",
    ):
        build_reference(spec)


def test_trained_tokenizer_loses_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = [*make_texts(300), "x" * 5000]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    output = tmp_path / "t.model"
    settings = {"inputs": [source], "output": str(output), "vocab_size": 400}
    result = train_tokenizer(TrainTokenizerConfig(**settings))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert result.vocab_size == processor.vocab_size() == 400
    assert result.text_bytes == sum(len(text.encode()) for text in texts)
    special = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert special == (0, 1, 2, 3)
    # SentencePiece's own mark for a space is the one character that does not come back.
    lossless = [text for text in [*texts, *HOSTILE_TEXTS] if "▁" not in text]
    assert [text for text in lossless if processor.decode(processor.encode(text)) != text] == []
    assert processor.encode("12", out_type=str) == ["1", "2"]
    with pytest.raises(ConfigError, match="exists"):
        train_tokenizer(TrainTokenizerConfig(**settings))
    with pytest.raises(ConfigError, match=r"^--max-bytes: expected at least 1, found 0$"):
        TrainTokenizerConfig(**settings, max_bytes=0)
    first = output.read_bytes()
    train_tokenizer(TrainTokenizerConfig(**settings, overwrite=True))
    assert output.read_bytes() == first


def test_a_bad_record_stops_training_by_its_line_or_is_left_out(tmp_path):
    texts = make_texts(300)
    source = tmp_path / "a.jsonl"
    write_jsonl(source, [{"text": text} for text in texts])
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], '{"text": "a"', *lines[1:]]))
    settings = {"inputs": [str(source)], "output": str(tmp_path / "t.model"), "vocab_size": 400}
    with pytest.raises(DataError, match=r"^\S+a\.jsonl:2: not valid JSON \(.*; --on-error skip "):
        train_tokenizer(TrainTokenizerConfig(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    result = train_tokenizer(TrainTokenizerConfig(**settings, on_error="skip"))
    assert result.skipped == {"not valid JSON": 1}
    assert result.text_bytes == sum(len(text.encode()) for text in texts)


def test_a_folder_is_no_place_for_a_model(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in make_texts(300)])
    (tmp_path / "models").mkdir()
    settings = {"inputs": [source], "output": str(tmp_path / "models"), "vocab_size": 400}
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=r"models: expected a file to write, .* found a folder"
        ):
            train_tokenizer(TrainTokenizerConfig(**settings, overwrite=overwrite))


def test_training_errors_name_the_setting(tmp_path):
    def train(text, vocab_size=4000):
        source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        config = TrainTokenizerConfig(
            inputs=[source], output=str(tmp_path / "t.model"), vocab_size=vocab_size
        )
        train_tokenizer(config)

    with pytest.raises(
        DataError, match=r"--vocab-size 4000: .* too few for it, at most \d+ pieces"
    ):
        train("a small text of a few words")
    with pytest.raises(DataError, match="holds no text"):
        train("")
    with pytest.raises(ConfigError, match=r"--vocab-size 400: .* at least \d+ pieces"):
        train("".join(map(chr, range(0x4E00, 0x5200))) * 3, 400)
    with pytest.raises(ConfigError, match="at least 300"):
        train("a", 200)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1], []), ([], [2]), ([1], [2]), ([2], [2])]
)
def test_what_a_tokenizer_puts_around_texts(before, after):
    def encode(texts):
        return tokenizers.flatten([[*before, *map(ord, text), *after] for text in texts])

    assert tokenizers.around_text(SimpleNamespace(encode_batch=encode)) == (before, after)
