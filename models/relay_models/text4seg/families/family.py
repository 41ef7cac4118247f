"""What serving has to know of a family of multimodal models: the square it sees and the words around a question.

A `Family` is made from a model's config.json by the module of its family and is a value: it holds no weights, loads no
processor and imports neither vLLM nor transformers. It promises that

    a picture of any shape is squashed to ``image_side`` pixels a side, never cropped, padded or cut into tiles, so that
        cell (r, c) of an n by n grid covers the rows [r H / n, (r + 1) H / n) of the original (arXiv 2410.09855);
    the model's own processor then leaves that square as it is, and it takes ``num_image_tokens`` tokens;
    the text before the picture is the same for every question, so that the picture's prefix is computed once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from relay_models.errors import CheckpointError, LabelError
from relay_models.text4seg.profiles import check_grid

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_SIDE = 4096  # pixels; no published model comes near it, and a config is untrusted


@dataclass(frozen=True)
class Conversation:
    """The words around what is said. A prompt is never written with the token that begins a text, see ``begins_text``.

    Attributes:
        user_open, user_close: around what a user says.
        image: what stands for one picture, what follows it included; pictures come before the text of their message.
        assistant_open, assistant_close: around an answer; ``assistant_open`` is the last that a prompt says.
        answer_lead: what a model puts before the first word of an answer, which a forced preamble must begin with.
        system_open, system, system_close: around and in the opening; with ``system`` None there is none.
        begins_text: the tokenizer puts its own token before a text. A chat template has to write it, since servers
            tokenise its output without special tokens; a prompt must not.
    """

    user_open: str
    user_close: str
    image: str
    assistant_open: str
    assistant_close: str
    answer_lead: str = ""
    system_open: str = ""
    system: str | None = None
    system_close: str = ""
    begins_text: bool = False

    def prompt(self, question: str) -> str:
        """One picture and one question, up to where the answer begins."""
        return f"{self._opening()}{self.user_open}{self.image}{question}{self.user_close}{self.assistant_open}"

    def chat_template(self) -> str:
        """The same for any number of turns and pictures, as the Jinja template that tokenizers and servers take.

        A message's content is a string or a list of parts; its pictures come first, in their order. A system message
        of the caller takes the place of ours.
        """
        answer = "(text | trim)" if self.answer_lead else "text"
        opening = [f"{{%- elif loop.first %}}{{{{ {_quoted(self._opening())} }}}}"] if self.system is not None else []
        beginning = ["{{- bos_token -}}"] if self.begins_text else []
        return "\n".join(
            [
                *beginning,
                "{%- for message in messages -%}",
                "{%- set images = namespace(count=0) -%}",
                "{%- if message['content'] is string %}{% set text = message['content'] %}{% else -%}",
                "{%- set texts = namespace(joined='') -%}",
                "{%- for part in message['content'] -%}",
                "{%- if part['type'] == 'text' %}{% set texts.joined = texts.joined ~ part['text'] %}"
                "{% elif part['type'] == 'image' %}{% set images.count = images.count + 1 %}{% endif -%}",
                "{%- endfor -%}",
                "{%- set text = texts.joined %}{% endif -%}",
                f"{{%- if message['role'] == 'system' %}}{{{{ {_quoted(self.system_open)} ~ text ~ "
                f"{_quoted(self.system_close)} }}}}",
                *opening,
                "{%- endif -%}",
                f"{{%- if message['role'] == 'user' %}}{{{{ {_quoted(self.user_open)} ~ {_quoted(self.image)} * "
                f"images.count ~ text ~ {_quoted(self.user_close)} }}}}",
                f"{{%- elif message['role'] == 'assistant' %}}{{{{ {_quoted(self.assistant_open + self.answer_lead)} ~ "
                f"{answer} ~ {_quoted(self.assistant_close)} }}}}",
                "{%- endif -%}",
                "{%- endfor -%}",
                f"{{%- if add_generation_prompt %}}{{{{ {_quoted(self.assistant_open)} }}}}{{% endif -%}}",
            ]
        )

    def _opening(self) -> str:
        return "" if self.system is None else f"{self.system_open}{self.system}{self.system_close}"


@dataclass(frozen=True)
class Family:
    """One model of a family, as its config describes it.

    Attributes:
        name: of the family.
        architecture: vLLM's name of the model class, to be given as an override where a config does not say it.
        grid: cells a side of its descriptors.
        image_side: pixels a side of the square a picture is squashed to.
        num_image_tokens: positions of the prompt that the picture fills; markers around it are not counted.
        conversation: the words around picture and question.
        reserved: strings with a meaning of their own for the tokenizer or the processor, which no question may hold.
        mm_processor_kwargs: options without which the processor would change the square; empty where there are none.
    """

    name: str
    architecture: str
    grid: int
    image_side: int
    num_image_tokens: int
    conversation: Conversation
    reserved: tuple[str, ...]
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __post_init__(self) -> None:
        check_grid(self.grid)
        for name in ("image_side", "num_image_tokens"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} of {self.name} must be at least 1, got {getattr(self, name)}")

    def with_grid(self, grid: int) -> Family:
        """The same model with descriptors of another size. Raises CheckpointError for an impossible one."""
        return replace(self, grid=check_grid(grid))

    def prompt(self, question: str) -> str:
        """The text of one picture and one question, to be tokenised with the tokenizer's special tokens.

        Raises:
            LabelError: the question holds a reserved string.
        """
        self.check_text("question", question)
        return self.conversation.prompt(question)

    def check_text(self, name: str, text: str) -> None:
        """Refuse text that the model's tokenizer or processor would not read as text, for instance ``<image>``.

        Raises:
            LabelError: says which field, called ``name``, holds which reserved string.
        """
        held = [reserved for reserved in self.reserved if reserved in text]
        if held:
            raise LabelError(f"{name} holds {held[0]!r}, which {self.name} does not read as text: write it differently")

    def squash(self, image: Image) -> Image:
        """The picture as the model is to see it: a square of ``image_side`` pixels, whatever its shape was.

        Bicubic, as in training. The picture must be RGB and upright already.

        Raises:
            ImageError: the picture has another mode; PIL would resize a palette by its indices.
        """
        from relay_models.images import squash  # imports Pillow

        return squash(image, self.image_side, self.image_side)


def config_int(config: Mapping[str, Any], name: str, default: int, *, most: int = MAX_IMAGE_SIDE) -> int:
    """A whole number of a config that is a file of somebody's; ``name`` may be a path, as ``vision_config.image_size``.

    Raises:
        CheckpointError: it is there and is no whole number from 1 to ``most``.
    """
    *path, last = name.split(".")
    for key in path:
        config = config_object(config, key)
    value = config.get(last, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(f"{name} in config.json must be a whole number from 1 to {most}, got {value!r}")
    return value


def config_object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object of a config, empty where it is absent. Raises CheckpointError where it is something else."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{name} in config.json must be an object, got {value!r}")
    return value


def has_architecture(config: Mapping[str, Any], *names: str) -> bool:
    """Whether the config says that the model is of one of these classes."""
    architectures = config.get("architectures") or []
    return isinstance(architectures, list) and any(name in architectures for name in names)


def _quoted(text: str) -> str:
    """As a string of Jinja, which reads JSON's."""
    return json.dumps(text, ensure_ascii=False)
