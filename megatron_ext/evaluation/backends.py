"""The model behind a command line: a Megatron checkpoint or a Hugging Face folder, by one flag."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.data.chat_template import TEMPLATE_FILE, ChatTemplate
from megatron_ext.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec
from megatron_ext.evaluation.completion import Codec, Generator
from megatron_ext.evaluation.sampling import Sampling
from megatron_ext.exceptions import ConfigError
from megatron_ext.runtime import collector

if TYPE_CHECKING:
    from megatron_ext.checkpoint.inspect import Checkpoint


def add_model_arguments(parser: ArgumentParser, *, required: bool = True) -> None:
    """Flags that name a model and how to run it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=Path,
        required=required,
        help="checkpoint directory, an iteration of it (DIR/iter_NNNNNNN), or Hugging Face folder",
    )
    group.add_argument(
        "--backend",
        choices=["megatron", "huggingface"],
        default="megatron",
        help="what --model is: a Megatron checkpoint, run at any layout, or an exported model",
    )
    group.add_argument(
        "--tokenizer-type", choices=TOKENIZER_TYPES, help="default: the one stored with the model"
    )
    group.add_argument("--tokenizer-model", help="default: the one stored with the model")
    group.add_argument(
        "--chat-template", type=Path, help="Jinja file; default: the one stored with the model"
    )
    group.add_argument("--micro-batch-size", type=int, default=8, help="prompts per batch")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)


def add_sampling_arguments(parser: ArgumentParser, *, max_new_tokens: int) -> None:
    """Flags that say how tokens are chosen."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=1234)


def sampling_from(options: Namespace) -> Sampling:
    """The settings of `add_sampling_arguments`.

    Raises:
        ConfigError: a number is out of range.
    """
    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


@contextlib.contextmanager
def open_generator(options: Namespace) -> Iterator[tuple[Generator, Codec]]:
    """Load the model that the command line names.

    Args:
        options: those of `add_model_arguments`.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the tokenizer or the layout does not fit it.
    """
    if options.micro_batch_size < 1:
        raise ConfigError(
            f"--micro-batch-size: expected at least 1, found {options.micro_batch_size}"
        )
    with collector.paused():
        # torch and Megatron are imported after the command line has been read.
        from megatron_ext.runtime import cpu

        cpu.enable()
        from megatron_ext.checkpoint.named import split_name
    open_model, folder = _huggingface, options.model
    if options.backend == "megatron":
        open_model, folder = _megatron, split_name(options.model)[0]
    template = options.chat_template
    if template is None and (folder / TEMPLATE_FILE).is_file():
        template = folder
    with open_model(options, template) as opened:
        yield opened


@contextlib.contextmanager
def _huggingface(options: Namespace, template: Path | None) -> Iterator[tuple[Generator, Codec]]:
    with collector.paused():
        from megatron_ext.checkpoint.inspect import has_checkpoint
        from megatron_ext.checkpoint.named import split_name
        from megatron_ext.checkpoint.own_tokenizer import CONFIG, tokenizer_spec
        from megatron_ext.evaluation.huggingface_generator import HuggingFaceGenerator

    layout = (options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    if layout != (1, 1):
        raise ConfigError(
            "--tensor-model-parallel-size and --pipeline-model-parallel-size: expected 1 with --backend "
            f"huggingface, found {layout[0]} and {layout[1]}"
        )
    if not (options.model / CONFIG).is_file():
        other = ""
        if has_checkpoint(split_name(options.model)[0]):
            other = "; --backend megatron reads the checkpoint there"
        raise ConfigError(
            f"--model {options.model}: expected a Hugging Face folder with --backend huggingface, found no "
            f"{CONFIG} in it{other}"
        )
    recorded = tokenizer_spec(options.model)
    spec = TokenizerSpec(
        tokenizer_type=options.tokenizer_type or recorded.tokenizer_type,
        tokenizer_model=options.tokenizer_model or recorded.tokenizer_model,
    )
    codec = Codec(spec, template=template)
    yield (
        HuggingFaceGenerator(
            options.model, batch_size=options.micro_batch_size, vocab_size=codec.vocab_size
        ),
        codec,
    )


class _TunedCodec(Codec):
    """A codec with the template that a checkpoint records, where no file of it is beside the checkpoint.

    Args:
        spec: the tokenizer of the model.
        source: the template.
        origin: where it is from, for messages.
    """

    def __init__(self, spec: TokenizerSpec, *, source: str, origin: str) -> None:
        super().__init__(spec)
        self._source, self._origin = source, origin

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return ChatTemplate(self._source, self._spec, origin=self._origin)


def _codec(spec: TokenizerSpec, template: Path | None, checkpoint: Checkpoint) -> Codec:
    """With the template that is given or kept, else the one that the model was tuned with."""
    recorded = getattr(checkpoint.args, "tuned_chat_template", None)
    if template is not None or recorded is None:
        return Codec(spec, template=template)
    return _TunedCodec(spec, source=recorded, origin=f"the one that {checkpoint.path} records")


@contextlib.contextmanager
def _megatron(options: Namespace, template: Path | None) -> Iterator[tuple[Generator, Codec]]:
    with collector.paused():
        from megatron_ext.checkpoint.inspect import check_architecture, has_checkpoint
        from megatron_ext.checkpoint.named import open_named, split_name
        from megatron_ext.checkpoint.own_tokenizer import CONFIG, choose_tokenizer
        from megatron_ext.evaluation.megatron_generator import MegatronGenerator
        from megatron_ext.frozen import FrozenModel
        from megatron_ext.runtime import compat, console
        from megatron_ext.session import open_session

    if not has_checkpoint(split_name(options.model)[0]) and (options.model / CONFIG).is_file():
        raise ConfigError(
            f"--model {options.model}: expected a checkpoint directory with --backend megatron, found a "
            "Hugging Face folder; --backend huggingface reads it"
        )
    compat.apply()
    checkpoint = open_named(options.model, flag="--model")
    kind, tokenizer = choose_tokenizer(options, checkpoint)
    spec = TokenizerSpec(tokenizer_type=kind, tokenizer_model=tokenizer)
    try:
        codec = _codec(spec, template, checkpoint)
    except ConfigError as error:
        if options.tokenizer_model is not None or Path(spec.tokenizer_model).exists():
            raise
        raise ConfigError(
            f"{error}; {checkpoint.path} records this path, and --tokenizer-model names the tokenizer at its "
            "present place"
        ) from error
    wanted = Namespace(
        tokenizer_type=spec.tokenizer_type,
        tokenizer_model=spec.tokenizer_model,
        micro_batch_size=options.micro_batch_size,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    with open_session(wanted, checkpoint) as session:
        check_architecture(checkpoint, session.args, flag="--model")
        with console.hidden():
            model = FrozenModel(
                session.model_config, args=session.args, checkpoint=checkpoint, flag="--model"
            )
        yield MegatronGenerator(model, args=session.args), codec
