"""vLLM's side of the row drafter: the class that `custom_class` speculation is pointed at.

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 32,
                           "model": "relay_serving.vllm_plugin.row_proposer.RowProposer"}'

vLLM builds one of these in the worker of the last pipeline rank and calls `propose` after every step, with token ids
and nothing else: no request ids, no sampling parameters, no grammar. It cuts each draft where the request's grammar
ends it, verifies the rest, and answers what it would have answered without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.tokenizers.registry import cached_tokenizer_from_config

from relay_models.text4seg.families import relay_seg
from relay_models.text4seg.row_drafter import RowDrafter, Vocabulary
from relay_serving.errors import UsageError

# The longest draft that pays: with 64 tokens a descriptor takes 7 % fewer passes, of twice the width.
NUM_SPECULATIVE_TOKENS = 32


class RowProposer:
    """Drafts the rows of segmentation answers, and nothing in any other text.

    Raises:
        UsageError: the engine has no tokenizer, and so no text.
        RelayModelsError: its tokenizer is not a fast one.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        if tokenizer is None:
            raise UsageError(
                "row drafts need the model's tokenizer, and skip_tokenizer_init is set: unset it, or serve without "
                "--speculative-config"
            )
        config = vllm_config.model_config.hf_config
        vocabulary = Vocabulary(tokenizer, marks_rows=relay_seg.ARCHITECTURE in (config.architectures or ()))
        self._drafter = RowDrafter(vocabulary, vllm_config.speculative_config.num_speculative_tokens)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A draft for each request of the step; vLLM has put the step's tokens into the other two arrays already."""
        return self._drafter.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)

    def load_model(self, *args: Sequence[Any]) -> None:
        """There is no model to load."""
