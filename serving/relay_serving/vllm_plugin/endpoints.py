"""Entry point of the group ``vllm.endpoint_plugins``: what relay adds to vLLM's own HTTP server.

The playground at / and counters on /metrics always; /v1/segmentations, and masks in chats about pictures, where the
served model segments.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from relay_serving import plugin_names
from relay_serving.routes import playground, segmentations
from relay_serving.segmentation.errors import RequestError
from relay_serving.segmentation.server import install
from relay_serving.settings import RelaySettings
from relay_serving.vllm_plugin import metrics

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.relay")


class RelayEndpointPlugin:
    """Follows vLLM's EndpointPlugin protocol."""

    name = plugin_names.OUR_NAME
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        metrics.attach(app)
        segmentations.attach(app)
        playground.attach(app)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Publish the counters of this server's engines; let it segment, if its model does."""
        if engine_client is None:
            return
        metrics.publish(engine_client.vllm_config, state)
        settings = RelaySettings.from_additional_config(engine_client.vllm_config.additional_config)
        profile = install(engine_client, state, settings)
        playground.publish(state, profile)
        if profile is not None:
            try:
                await state.segmentation.warm()
            except RequestError as error:
                logger.warning("No grammar was compiled in advance: %s", error)
            logger.info(
                "Segmentation: %s, descriptors of %d by %d cells, pictures squashed to %d pixels a side.",
                profile.family.name,
                profile.rows,
                profile.columns,
                profile.family.image_side,
            )


def endpoint_plugin() -> RelayEndpointPlugin:
    """What the entry point resolves to."""
    return RelayEndpointPlugin()
