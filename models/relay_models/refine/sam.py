"""A SAM of transformers' shape, asked about one picture: encoded once, then a mask for each prompt.

Any SamModel will do: ViT-B, L or H from a hub id or a folder, or MobileSAM, which is one with another encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.refine import mobile_sam
from relay_models.refine.prompts import Prediction, Prompt

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in 8-bit steps
DEVIATION = (58.395, 57.12, 57.375)
MODEL_TYPE = "sam"


class Sam:
    """Predicts masks. Not for use from several threads at once.

    Args:
        model: a transformers SamModel.
        device: where to compute.
    """

    def __init__(self, model: Any, *, device: str | torch.device = "cpu") -> None:
        self._model = model.to(device).eval()
        self._device = torch.device(device)
        prompt_config = model.config.prompt_encoder_config
        self.side: int = prompt_config.image_size
        self.mask_side: int = 4 * prompt_config.image_embedding_size
        self._mean = torch.tensor(MEAN, device=device)[:, None, None]
        self._deviation = torch.tensor(DEVIATION, device=device)[:, None, None]

    @classmethod
    def mobile(cls, weights: Path, *, device: str | torch.device = "cpu") -> Sam:
        """MobileSAM from converted weights (see `weights`). Raises CheckpointError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights of MobileSAM in {weights}: {error}") from error
        return cls(mobile_sam.load(state), device=device)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str | torch.device = "cpu") -> Sam:
        """A SAM by hub id or folder, in float32. Raises CheckpointError."""
        from transformers import AutoConfig, SamModel

        try:
            config = AutoConfig.from_pretrained(name)
            if config.model_type != MODEL_TYPE:
                raise CheckpointError(
                    f"{name} is a model of type {config.model_type!r}; a refiner must be a SAM (type {MODEL_TYPE!r})"
                )
            model, loading = SamModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot load the SAM {name}: {_first_line(error)}") from error
        if loading["missing_keys"]:
            raise CheckpointError(f"the SAM {name} lacks the weight {min(loading['missing_keys'])}")
        return cls(model, device=device)

    @torch.inference_mode()
    def embed(self, view: Image.Image) -> torch.Tensor:
        """What the decoder needs of a picture that was fitted into the frame (see `Frame.view`)."""
        if max(view.size) != self.side or view.mode != "RGB":
            raise RelayModelsError(
                f"view must be RGB with a longest side of {self.side}, got {view.mode} of {view.width}x{view.height}"
            )
        pixels_3HW = torch.from_numpy(np.array(view)).to(self._device).permute(2, 0, 1).float()
        normal_3HW = (pixels_3HW - self._mean) / self._deviation
        _, height, width = normal_3HW.shape
        padded = F.pad(normal_3HW, (0, self.side - width, 0, self.side - height))
        return self._model.get_image_embeddings(padded[None])

    @torch.inference_mode()
    def predict(self, embedding: torch.Tensor, prompts: Sequence[Prompt]) -> list[Prediction]:
        """One mask for each prompt, each by itself."""
        return [self._predict(embedding, prompt) for prompt in prompts]

    def _predict(self, embedding: torch.Tensor, prompt: Prompt) -> Prediction:
        logits: Any = self._tensor(prompt.logits_MM, (1, 1, self.mask_side, self.mask_side))
        for _ in range(prompt.passes):
            found = self._model(
                image_embeddings=embedding,
                input_points=self._tensor(prompt.points_P2, (1, 1, -1, 2)),
                input_labels=self._tensor(prompt.labels_P, (1, 1, -1)),
                input_boxes=self._tensor(prompt.box, (1, 1, 4)),
                input_masks=logits,
                multimask_output=False,
            )
            logits = found.pred_masks[:, 0]
        return Prediction(logits[0, 0].float().cpu().numpy(), float(found.iou_scores[0, 0, 0]))

    def _tensor(self, array: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(self._device).reshape(shape)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
