"""vLLM's serving classes, with Fathom's prompts: they write answers, streams and calls of tools.

They neither tokenize nor see an engine. Where they would render a prompt, they get its number in
the call, and :class:`server.serving.inference.Inference` tokenizes it when its turn has come.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.renderers import merge_kwargs
from vllm.renderers.chat_utils import ChatTemplateContentFormatOption
from vllm.renderers.inputs.preprocess import PromptComponents

from server.calls.generation import RenderedPrompt
from server.errors import FathomError, InvalidArgument
from server.openai.body import num_characters
from server.openai.call import PROMPT, current
from server.openai.engine_client import InferenceClient

_CONTENT_FORMAT: ChatTemplateContentFormatOption = "auto"


class CallModels(OpenAIServingModels):
    """The one model, under the name that the call has for it, which has been checked."""

    def is_base_model(self, model_name: str) -> bool:
        return True

    def model_name(self, lora_request: Any = None) -> str:
        return current().model


class _PromptNumbers:
    """Prompts that are numbers until Inference reads them."""

    def _extract_prompt_len(self, prompt: Any) -> int:
        return 1  # Inference knows how much room is left

    def _extract_prompt_components(self, prompt: Any) -> Any:
        return PromptComponents()


class Completions(_PromptNumbers, OpenAIServingCompletion):
    """Completions of the prompts of the call."""

    async def render_completion_request(self, request: CompletionRequest) -> Any:
        return [{PROMPT: i} for i in range(len(current().prompts))]


class Chats(_PromptNumbers, OpenAIServingChat):
    """Answers to the chat of the call, whose tools the parser of the model's family reads."""

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        return [], [{PROMPT: 0}]

    def prepare(self, request: ChatCompletionRequest) -> None:
        """Let the parser of tools say what an answer must look like.

        Raises :class:`InvalidArgument` for tools that no parser reads.
        """
        parser, choice = self.parser_cls, request.tool_choice
        wants_tools = bool(request.tools) and choice not in (None, "none")
        if wants_tools and (parser is None or parser.tool_parser_cls is None):
            allowed = "none: the server's setting tool_parser names no parser of calls of tools"
            raise InvalidArgument("tools", len(request.tools or ()), allowed)
        if parser is not None and wants_tools:
            self._make_parser(
                request,
                self.renderer.get_tokenizer(),
                self._effective_chat_template_kwargs(request),
            ).adjust_request(request=request)

    def rendered(self, request: ChatCompletionRequest) -> RenderedPrompt:
        """Return a chat that has tools, parts of other kinds, or options of the template."""
        if (request.chat_template_kwargs or {}).get("chat_template") is not None:
            allowed = "none: the chat template is the model's own"
            raise InvalidArgument("chat_template_kwargs.chat_template", "a template", allowed)
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(None, _CONTENT_FORMAT).with_defaults(
            merge_kwargs(None, {"tools": tools, "tokenize": False})
        )
        messages = request.messages
        size = num_characters([list(map(dict, messages)), tools, request.documents])

        def render() -> str:
            try:
                _, rendered = self.renderer.render_messages(messages, params)
                prompt: Any = rendered
                return str(prompt["prompt"])
            except FathomError:
                raise
            except Exception as error:  # a template is a program, which may fail in any way
                allowed = f"what the model's chat template takes ({str(error)[:300]})"
                raise InvalidArgument("messages", len(messages), allowed) from error

        return RenderedPrompt(render, size)


def serving_classes(
    client: InferenceClient, name: str, *, tool_parser: str | None = None
) -> tuple[Completions, Chats]:
    """Return what answers requests for text."""
    models = CallModels(client, [BaseModelPath(name, client.model_config.model)])
    chat: dict[str, Any] = {
        "chat_template": None,
        "chat_template_content_format": _CONTENT_FORMAT,
        "enable_auto_tools": tool_parser is not None,
        "tool_parser": tool_parser,
        "reasoning_parser": "",
    }
    options: dict[str, Any] = {
        "online_renderer": None,  # nothing is left for it to do
        "request_logger": None,
        "enable_prompt_tokens_details": True,
    }
    completions = Completions(client, models, **options)
    return completions, Chats(client, models, "assistant", **options, **chat)
