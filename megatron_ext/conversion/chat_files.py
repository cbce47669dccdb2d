"""What a chat-tuned model needs beside its weights: its template, and the token that ends its answers."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, LlamaConfig

from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.conversion.huggingface import GENERATION
from megatron_ext.data.chat_template import TEMPLATE_FILE, ChatTemplate
from megatron_ext.data.tokenizers import HuggingFaceReference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatFiles:
    """How a model was tuned on conversations.

    Attributes:
        template: the chat template, a Jinja text.
        end: id of the token that ends an answer.
    """

    template: str
    end: int

    @classmethod
    def of_run(cls, args: Namespace, *, tokenizer: Path) -> ChatFiles | None:
        """What the model of a run was tuned with, by it or before it; ``None`` if it never was.

        Args:
            args: arguments of the run, as its checkpoint holds them.
            tokenizer: folder of the Hugging Face tokenizer that goes with the model.

        Raises:
            ConfigError: the template cannot be used with the tokenizer.
        """
        template = getattr(args, "tuned_chat_template", None)
        if template is None:
            return None
        return cls(template, ChatTemplate(template, tokenizer_spec(tokenizer)).end_of_turn)

    def write(self, folder: Path) -> None:
        """Put both into an exported model where what the base model brought says something else.

        Args:
            folder: with the model's config and tokenizer.
        """
        own = HuggingFaceReference(tokenizer_spec(folder)).tokenizer.chat_template
        if own != self.template:
            if own is not None:
                logger.info("the chat template is the one of the tuning, not that of the tokenizer")
            (folder / TEMPLATE_FILE).write_text(self.template, encoding="utf-8")
        path = folder / GENERATION
        if not path.is_file():
            config = LlamaConfig.from_pretrained(folder, local_files_only=True)
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        # Not by `GenerationConfig`, which refuses to save settings that it has read.
        settings = json.loads(path.read_text())
        ends = settings.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if self.end not in ends:
            settings["eos_token_id"] = [*ends, self.end]
            path.write_text(json.dumps(settings, indent=2) + "\n")
