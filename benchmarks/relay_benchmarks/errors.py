"""What goes wrong in a benchmark, below the server's tree (`relay_serving.errors`), so that one handler prints both.

RelayServingError                 exit status 1
├── UsageError                    exit status 2
│   ├── BenchArgumentError           an argument, or a combination, that cannot be measured
│   └── ResultsFileError             the CSV file cannot be appended to
├── EngineFailedError             an engine of the benchmark did not start, or died
├── RequestsFailedError           a server refused requests, or is gone
├── ComparisonError               a side is not what it is called, or the sides differ where they must not
└── KernelCheckError              the kernel computes wrong values, so its speed means nothing
"""

from __future__ import annotations

from relay_serving.errors import RelayServingError, UsageError


class BenchArgumentError(UsageError):
    pass


class ResultsFileError(UsageError):
    pass


class EngineFailedError(RelayServingError):
    pass


class RequestsFailedError(RelayServingError):
    pass


class ComparisonError(RelayServingError):
    pass


class KernelCheckError(RelayServingError):
    pass
