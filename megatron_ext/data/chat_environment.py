"""What chat templates run in: the Jinja environment of ``transformers``, without its clock."""

from __future__ import annotations

import functools
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, by which templates mark answers for ``transformers``; it prints nothing."""

    tags: set[str] = {"generation"}  # noqa: RUF012, as in Jinja's own class

    def parse(self, parser: Any) -> Any:
        """The statements up to ``{% endgeneration %}``."""
        scope = jinja2.nodes.Scope(lineno=next(parser.stream).lineno)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


@functools.cache
def environment() -> jinja2.Environment:
    """Sandboxed, block lines trimmed, with ``raise_exception`` for the template's use."""

    def raise_exception(message: str) -> Any:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made
