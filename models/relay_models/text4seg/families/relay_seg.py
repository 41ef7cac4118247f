"""relay-seg-tiny: EfficientNet-Lite0 at 512 pixels, 256 image tokens, SmolLM2-135M-Instruct.

One image token for each cell of the grid, row by row. It chats as SmolLM2 does: without a picture its prompts are,
letter for letter, those of the template SmolLM2 was published with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay_models.text4seg.families.family import Conversation, Family, config_int, has_architecture
from relay_models.text4seg.profiles import MAX_GRID, training_of

ARCHITECTURE = "RelaySegForConditionalGeneration"
IMAGE_TOKEN = "<image>"
IMAGE_SIDE = 512
GRID = 16
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # SmolLM2's own

# SmolLM2's special tokens, the last of which stands for a picture here (see `assemble`).
RESERVED = (
    IMAGE_TOKEN,
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
)


@dataclass(frozen=True)
class ChatML(Conversation):
    """SmolLM2's turns: whatever the role, and a system sentence of its own only before a first message of another."""

    def chat_template(self) -> str:
        """As SmolLM2's, with the pictures of a message before its text.

        Several texts in one message are joined by a line break, as servers do for templates that take one text only.
        """
        image, opening = json.dumps(self.image), json.dumps(self._opening())
        return "\n".join(
            [
                "{%- for message in messages -%}",
                f"{{%- if loop.first and message['role'] != 'system' %}}{{{{ {opening} }}}}{{% endif -%}}",
                r"{{- '<|im_start|>' ~ message['role'] ~ '\n' }}",
                "{%- if message['content'] is string %}{{ message['content'] }}{% elif message['content'] -%}",
                "{%- for part in message['content'] -%}",
                f"{{%- if part['type'] == 'image' %}}{{{{ {image} }}}}{{% endif -%}}",
                "{%- endfor -%}",
                "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}",
                r"{%- if not loop.first %}{{ '\n' }}{% endif %}{{ part['text'] }}",
                "{%- endfor -%}",
                "{%- endif -%}",
                r"{{- '<|im_end|>\n' }}",
                "{%- endfor -%}",
                r"{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}",
            ]
        )


CONVERSATION = ChatML(
    system_open="<|im_start|>system\n",
    system=SYSTEM,
    system_close="<|im_end|>\n",
    user_open="<|im_start|>user\n",
    image=f"{IMAGE_TOKEN}\n",
    user_close="<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    assistant_close="<|im_end|>\n",
)


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another architecture.

    Raises:
        CheckpointError: the config has an impossible size.
    """
    if not has_architecture(config, ARCHITECTURE):
        return None
    tokens_a_side = config_int(config, "grid", GRID, most=MAX_GRID)
    return Family(
        name="relay-seg",
        architecture=ARCHITECTURE,
        grid=training_of(config, model_id, default_grid=tokens_a_side).grid,
        image_side=config_int(config, "image_side", IMAGE_SIDE),
        num_image_tokens=tokens_a_side**2,
        conversation=CONVERSATION,
        reserved=RESERVED,
    )
