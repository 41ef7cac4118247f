"""Every error the server's own code raises, one tree.

RelayServingError                 exit status 1
├── UsageError                    exit status 2: the command line or the environment is wrong
│   ├── SettingError                 a relay setting, wherever it came from
│   ├── ModelNotFoundError           neither a folder here nor the shape of a hub id
│   └── PortUnavailableError         in use, or not ours to bind
├── SystemLibraryError            vLLM needs a library that this machine lacks
├── EmbeddedModelError            the built-in model could not be fetched, verified or converted
├── ConversionError               a checkpoint could not be fetched or converted
├── segmentation.errors.RequestError   one HTTP request; has a status and a field, and ends no process
└── EngineStartError              vLLM itself gave up; carries its own reason

A message is one line: what is wrong, with the value, and what to do.
"""

from __future__ import annotations


class RelayServingError(Exception):
    exit_status = 1


class UsageError(RelayServingError):
    exit_status = 2


class SettingError(UsageError):
    def __init__(self, source: str, value: object, expected: str) -> None:
        super().__init__(f"{source} is {value!r}; it must be {expected}")


class ModelNotFoundError(UsageError):
    pass


class PortUnavailableError(UsageError):
    pass


class SystemLibraryError(RelayServingError):
    pass


class EmbeddedModelError(RelayServingError):
    pass


class ConversionError(RelayServingError):
    pass


class EngineStartError(RelayServingError):
    pass
