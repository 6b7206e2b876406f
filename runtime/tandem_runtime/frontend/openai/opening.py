"""What a request's prompt follows: a named context, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tandem_runtime.frontend.backend import ServedModel
from tandem_runtime.frontend.contexts import Prefix, rendered
from tandem_runtime.frontend.encode import encode
from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import Context, Named


@dataclass(frozen=True)
class Opening:
    """A context's tokens come first, as they are; the request's prompt is encoded by itself."""

    context: Context | None
    prefix: Prefix

    @property
    def named(self) -> Named | None:
        """What is the context's of the prompt."""
        if self.context is None:
            return None
        return Named(self.context.id, self.context.created_unix_s, len(self.prefix.ids))

    async def prompt_ids(self, tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
        """Of a completion."""
        if isinstance(prompt, str):
            prompt = await encode(tokenizer, prompt, add_special_tokens=self.context is None)
        return self.prefix.ids + prompt

    def continued(
        self,
        model: ServedModel,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
    ) -> str:
        """What the chat template writes of these messages behind those of the context.

        Raises `BadRequest`.
        """
        assert self.context is not None
        whole = rendered(self.context, model, messages, tools=tools)
        if not whole.startswith(self.prefix.text):
            what = "tools" if tools else "messages"
            raise BadRequest(
                f"With these {what} the model's chat template begins otherwise than the context "
                f"'{self.context.id}' does; leave them out, or send the whole prompt.",
                param=what,
            )
        return whole[len(self.prefix.text) :]


NOTHING: Final = Opening(None, Prefix([], ""))
