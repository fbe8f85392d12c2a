"""Which chat template writes the conversations, and what it can and cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from tunefleet.data.entries import suggestion
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What ends an answer in each named template. None: the tokenizer's end-of-sequence token itself.
_ANSWER_ENDS = {
    "alpaca": None,
    "chatml": "<|im_end|>",
    "default": None,
    "gemma": "<end_of_turn>",
    "llama2": None,
    "llama3": "<|eot_id|>",
    "mistral": None,
    "qwen": "<|im_end|>",
}
# Names that recipes of the peers use for a format that has a name here.
_OTHER_NAMES = {"qwen3_nothink": "chatml"}
# The published formats of these begin with the beginning-of-sequence token.
_BEGIN_WITH_BOS = {"gemma", "llama2", "llama3", "mistral"}

SENTINEL = "zqxj7sentinel7jxqz"
# Some templates write today's date: rows must not depend on the day. A macro hides the function of the same name.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Template:
    """A chat template and what was found out about it.

    `jinja` is what a saved tokenizer should carry: `generate` then writes prompts exactly as they were trained.
    `stop_token_ids` end an answer; `answer_ends` are all texts that are one token and could.
    """

    name: str
    jinja: str
    knows_system: bool = True
    knows_tool_results: bool = True
    answer_ends: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def knows_tools(self) -> bool:
        """Whether the schemas of tools are written into the prompt."""
        return "tools" in self.jinja

    @property
    def knows_calls(self) -> bool:
        """Whether function calls are written by the template; else they are written as the data has them."""
        return "tool_calls" in self.jinja


def template_names() -> tuple[str, ...]:
    """Every name that `template:` may have."""
    return tuple(sorted({*_ANSWER_ENDS, *_OTHER_NAMES}))


def choose(name: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Template, tuple[str, ...]]:
    """The template called `name`, else the tokenizer's own, else `default`; and what the user should know about it.

    Raises `Refused` for an unknown name, or a tokenizer that has no token to end an answer with.
    """
    notices: list[str] = []
    if name is not None:
        template = Template(name, _named(name, tokenizer))
    elif own := _own(tokenizer):
        template = Template("tokenizer", own)
    else:
        template = Template("default", _named("default", tokenizer))
        notices.append("The tokenizer has no chat template: `template: default` is used. Write `template` to choose.")
    if "strftime_now" in template.jinja:
        notices.append("The chat template writes today's date; rows are written with 26 Jul 2024 instead.")
    try:
        header = _missing_generation_prompt(template, tokenizer)
        if header:
            notices.append(f"The chat template has no generation prompt: {header!r} is added to it as one.")
            prompt = "{%- if add_generation_prompt -%}{{- " + repr(header) + " -}}{%- endif -%}"
            template = replace(template, jinja=template.jinja + prompt)
        return _examined(template, tokenizer), tuple(notices)
    except (TemplateError, TypeError) as problem:
        raise Refused(
            f"The tokenizer's chat template cannot write one question and its answer ({problem}): write `template`."
        ) from problem


def render(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    *,
    generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of `chat`. Raises jinja2's `TemplateError` where the template refuses it."""
    date = _FIXED_DATE if "strftime_now" in template.jinja else ""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in chat],
        tools=[dict(tool) for tool in tools] or None,
        chat_template=date + template.jinja,
        add_generation_prompt=generation_prompt,
        tokenize=False,
    )
    return str(text)


def single_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that are always one token of their own, so that generation can stop at them. Longest first."""
    return tuple(sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=lambda text: -len(text)))


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts the beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token. Raises `Refused` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise Refused("The tokenizer has no end-of-sequence token: set `eos_token` in its tokenizer_config.json.")
    return int(tokenizer.eos_token_id)


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise Refused(f"The tokenizer has the chat templates {', '.join(own)}, none is `default`: set `template`.")
        return own["default"]
    return own


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    known = _OTHER_NAMES.get(name, name)
    if known not in _ANSWER_ENDS:
        raise Refused(
            f"`template: {name}` is not known (known: {', '.join(template_names())}): choose one, or leave it out "
            f"to use the tokenizer's own.{suggestion(name, template_names())}"
        )
    begins = starts_with_bos(tokenizer) or (known in _BEGIN_WITH_BOS and tokenizer.bos_token_id is not None)
    end = _ANSWER_ENDS[known]
    if end is None:
        end_token_id(tokenizer)
        stop = "eos_token"
    elif end in single_tokens(tokenizer):
        stop = repr(end)
    else:
        # Here the mark is only text: generation needs a token to stop at, so the answer ends with both.
        end_token_id(tokenizer)
        stop = f"{end!r} + eos_token"
    text = (resources.files("tunefleet.data") / "jinja" / f"{known}.jinja").read_text(encoding="utf-8").strip()
    return f"{{%- set begin = {'bos_token' if begins else repr('')} -%}}{{%- set stop = {stop} -%}}{text}"


def _missing_generation_prompt(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before an answer, if the template does not write it when asked for a generation prompt."""
    question = [{"role": "user", "content": "x"}]
    both = [*question, {"role": "assistant", "content": SENTINEL}]
    asked = render(template, tokenizer, question, generation_prompt=True)
    bare = render(template, tokenizer, question, generation_prompt=False)
    answered = render(template, tokenizer, both, generation_prompt=False)
    at = answered.find(SENTINEL)
    if asked != bare or at < 0 or not answered.startswith(bare):
        return ""
    # Blanks before an answer belong to its first token in most vocabularies, so the prompt ends before them.
    return answered[len(bare) : at].rstrip(" ")


def _examined(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    user = {"role": "user", "content": "x"}
    system = [{"role": "system", "content": SENTINEL}, user]
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {}}}
    called: dict[str, Any] = {"role": "assistant", "content": "" if template.knows_calls else "f"}
    if template.knows_calls:
        called["tool_calls"] = [call]
    result = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": SENTINEL}
    both = [user, {"role": "assistant", "content": "y"}]
    answered = render(template, tokenizer, both, generation_prompt=False).rstrip()
    single = single_tokens(tokenizer)
    ends = [token for token in single if answered.endswith(token)][:1]
    return replace(
        template,
        knows_system=_says(template, tokenizer, system),
        answer_ends=single,
        knows_tool_results=_says(template, tokenizer, [user, called, result]),
        stop_token_ids=(_token_id(tokenizer, ends[0]) if ends else end_token_id(tokenizer),),
    )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) else found[0]


def _says(template: Template, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> bool:
    """Whether the text of the sentinel message comes out of the template."""
    try:
        return SENTINEL in render(template, tokenizer, chat, generation_prompt=True)
    except (TemplateError, TypeError):
        return False
