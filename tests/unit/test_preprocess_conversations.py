"""A conversation becomes a document whose tokens are those that chat tuning trains on."""

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ext.data.chat_template import BUILT_IN, load_template
from megatron_ext.data.chat_tokens import load_tokens
from megatron_ext.data.manifest import read_manifest
from megatron_ext.data.preprocess import PreprocessConfig, preprocess
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.conversations import conversations
from tests.helpers.preprocess import tool
from tests.helpers.text import make_texts, train_sentencepiece, write_jsonl

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A prompt and an answer with nothing between them that a tokenizer would stop at.
GLUED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """SentencePiece that begins a text with a blank, and a Hugging Face tokenizer that does with <s>."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = train_sentencepiece(folder / "t.model", add_dummy_prefix=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["assistant:the", "assistant\nthe", *make_texts(20)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": special[2:]}
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    fast.chat_template = CHATML
    fast.save_pretrained(folder / "hf")
    kinds = {"SentencePieceTokenizer": model, "HuggingFaceTokenizer": str(folder / "hf")}
    return {k: TokenizerSpec(tokenizer_type=k, tokenizer_model=v) for k, v in kinds.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same kind of conversations in every shape that chat tuning reads."""
    folder = tmp_path_factory.mktemp("data")
    texts = [text.replace("</s>", "") for text in make_texts(80) if text.strip()]
    pairs = [{"query": f"q {i}", "response": text} for i, text in enumerate(texts)]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = conversations(60, seed=1)
    other = [
        [{"from": names[t["role"]], "value": t["content"]} for t in c]
        for c in conversations(20, seed=2)
    ]
    records = {
        "pairs": pairs,
        "bare": turns[:40],
        "messages": [{"messages": c, "id": 1} for c in turns[40:]],
        "shared": [{"conversations": c} for c in other],
    }
    (folder / "nothing.jsonl").touch()
    named = [write_jsonl(folder / f"{name}.jsonl", part) for name, part in records.items()]
    return [*named, str(folder / "nothing.jsonl")]


def run(files, prefix, spec, **options):
    config = PreprocessConfig(
        inputs=files, output_prefix=str(prefix), tokenizer=spec, conversations=True, **options
    )
    result = preprocess(config)
    return IndexedDataset(result.prefixes[0]), result


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize(
    ("kind", "source", "name"),
    [
        ("SentencePieceTokenizer", None, "built-in"),
        ("SentencePieceTokenizer", GLUED, "t.jinja"),
        ("HuggingFaceTokenizer", None, "tokenizer"),
        ("HuggingFaceTokenizer", GLUED, "t.jinja"),
    ],
)
def test_documents_are_what_chat_tuning_trains_on(
    specs, files, tmp_path, kind, source, name, append_eod
):
    spec, path = specs[kind], None
    if source is not None:
        path = str(tmp_path / "t.jinja")
        Path(path).write_text(source)
    template = load_template(spec, path=path)
    tuned = load_tokens([Path(f) for f in files], template, limit=10**9, tokenizer_digest="")
    documents, result = run(files, tmp_path / "o", spec, append_eod=append_eod, chat_template=path)
    assert len(documents) == len(tuned.lengths) > 140
    for index in range(len(documents)):
        expected = tuned.ids[tuned.bounds[index] : tuned.bounds[index + 1]].tolist()
        if append_eod and expected[-1] != template.eod_id:
            expected.append(template.eod_id)
        assert documents[index].tolist() == expected, index
    # A document is one sequence, however many pieces it is made of.
    np.testing.assert_array_equal(documents.document_indices, np.arange(len(documents) + 1))
    manifest = read_manifest(result.prefixes[0])
    assert (manifest.chat_template, manifest.append_eod) == (name, append_eod)
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    assert manifest.chat_template_digest == digest


def test_the_tokens_are_those_of_prompts_and_answers_each_by_itself(specs, tmp_path):
    spec = specs["SentencePieceTokenizer"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"query": "the dog", "response": "it jumps"}])
    documents, result = run([source], tmp_path / "o", spec, append_eod=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=spec.tokenizer_model)
    end = processor.eos_id()
    expected = [*processor.encode("User: the dog"), end, *processor.encode("Assistant:")]
    expected += [*processor.encode("it jumps"), end]
    assert documents[0].tolist() == expected
    # Of the text in one piece they would be others.
    whole = load_template(spec).render([{"role": "user", "content": "the dog"}])
    assert processor.encode(whole) != expected[: len(processor.encode(whole))]
    assert result.text_bytes == len("User: the dogAssistant:it jumps")


def test_workers_and_the_exact_tokenizer_make_the_same_files(specs, files, tmp_path):
    spec = specs["SentencePieceTokenizer"]
    _, first = run(files, tmp_path / "a", spec)
    assert first.manifests[0].backend == "gigatoken"
    _, second = run(files, tmp_path / "b", spec, workers=2, backend="reference")
    found = [result.manifests[0] for result in (first, second)]
    assert replace(found[1], backend="gigatoken") == found[0]


def test_bad_records_are_named_or_left_out_and_counted(specs, tmp_path):
    spec = specs["HuggingFaceTokenizer"]
    good = {"query": "q", "response": "a"}
    bad = [{"query": "q"}, {"query": "</s>", "response": "a"}, {"query": "q", "response": " "}]
    source = write_jsonl(tmp_path / "a.jsonl", [good, *bad, good])
    expected = 'a.jsonl:2: no conversation (expected {"query", "response"} as in the first record'
    with pytest.raises(DataError) as stopped:
        run([source], tmp_path / "o", spec)
    assert expected in str(stopped.value)
    assert str(stopped.value).endswith("--on-error skip leaves such records out")
    assert not list(tmp_path.glob("o*"))
    documents, result = run([source], tmp_path / "o", spec, on_error="skip")
    assert len(documents) == 2
    assert result.skipped == {"no conversation": 2, "the chat template refuses it": 1}
    special = write_jsonl(tmp_path / "b.jsonl", [bad[1]])
    message = r"b\.jsonl:1: the chat template refuses it \(expected no special token in the text of turn 1"
    with pytest.raises(DataError, match=message):
        run([special], tmp_path / "p", spec)


def test_of_a_file_that_ends_early_what_is_there_is_read_and_the_rest_counted(specs, tmp_path):
    spec = specs["HuggingFaceTokenizer"]
    turns = [{"query": f"{n} by {n * n}", "response": f"{n**3}"} for n in range(200)]
    whole = write_jsonl(tmp_path / "a.jsonl", turns)
    cut = tmp_path / "b.jsonl.gz"
    cut.write_bytes(gzip.compress(Path(whole).read_bytes())[:-400])
    documents, result = run([whole, cut], tmp_path / "o", spec, on_error="skip")
    assert result.skipped == {"file ends early": 1}
    assert len(turns) < len(documents) < 2 * len(turns)
    for again, first in zip(documents[len(turns) :], documents, strict=False):
        np.testing.assert_array_equal(again, first)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz cannot be read"):
        run([whole, cut], tmp_path / "p", spec)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.txt", {}, r"^--conversations: expected JSON lines .*, found .*a\.txt \(text\)$"),
        ("a.parquet", {}, r"^--conversations: expected JSON lines .*, found .*parquet\)$"),
        ("a.jsonl", {}, r"a\.jsonl:1: expected a list of turns, .*found the keys 'text'"),
        ("a.jsonl", {"keys": ["text", "q"]}, "^--json-keys: expected none beside --conversations"),
        ("a.jsonl", {"chat_template": "no.jinja"}, "^--chat-template: .* nothing at no.jinja"),
    ],
)
def test_what_are_no_conversations_is_refused_before_any_work(
    specs, tmp_path, name, options, message
):
    (tmp_path / name).write_text(json.dumps({"text": "a"}))
    with pytest.raises((ConfigError, DataError), match=message):
        run([str(tmp_path / name)], tmp_path / "o", specs["SentencePieceTokenizer"], **options)


def test_the_tool_takes_the_flags(specs, files, tmp_path):
    model = specs["SentencePieceTokenizer"].tokenizer_model
    (tmp_path / "t.jinja").write_text(BUILT_IN)
    flags = ("--conversations", "--chat-template", tmp_path / "t.jinja", "--append-eod")
    process = tool(model, files[:1], tmp_path / "o", *flags, "--workers", 1)
    said, log = process.communicate()
    assert process.returncode == 0, log
    assert "rendering conversations by the chat template: t.jinja" in log
    assert f"{tmp_path / 'o'}_text_document: " in said
    process = tool(model, files[:1], tmp_path / "p", *flags[1:3])
    assert (
        process.communicate()[1]
        .splitlines()[-1]
        .endswith("expected --conversations beside it, found none")
    )
