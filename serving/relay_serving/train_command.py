"""`vllm-relay train text4seg` and `vllm-relay eval text4seg`: the training recipe, and how well a model does.

Both read masks in the three forms of `relay_models.recipes.text4seg.dataset`. Evaluation asks a running server over
HTTP, or starts one for a model and stops it afterwards: what is measured is what is served.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import ipaddress
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_models.errors import RelayModelsError
from relay_serving import embedded_model
from relay_serving.errors import EngineStartError, RelayServingError, UsageError
from relay_serving.evaluation_folder import EvaluationFolder

if TYPE_CHECKING:
    from relay_models.recipes.text4seg.dataset import Photo
    from relay_models.recipes.text4seg.evaluation import EvaluationReport, Query, Reply

REQUEST_LIMIT_SECONDS = 1_800
START_LIMIT_SECONDS = 1_800
STOP_LIMIT_SECONDS = 30
BUSY_WAIT_SECONDS = 1
STDERR = 2  # the report alone goes to stdout
TRIES_AGAIN = 3
INTERRUPTED = 130
DEFAULT_GRID = 16
MOST_EXPRESSIONS = 64  # of one request, as the route takes them


# ---------------------------------------------------------------- train

SEEING, EVERYTHING = "seeing", "everything"  # what relay-seg may learn anew

# Options of one of the two recipes alone, and what those of relay-seg are called there.
_ONLY_LORA = frozenset(
    (
        "grid",
        "style",
        "steps",
        "photos_per_step",
        "questions_per_photo",
        "most_tokens",
        "dropout",
        "precision",
        "checkpoint_every",
        "checkpoints_activations",
    )
)
_ONLY_RELAY_SEG = frozenset({"minutes", "warmup_minutes", "processes", "start", "anew"})
_OF_TRAINING = frozenset({"minutes", "processes", "rank", "alpha", "learning_rate", "projector_rate", "seed"})
_RELAY_SEG_NAMES = {"learning_rate": "lora_rate"}


def run_train(words: Sequence[str]) -> int:
    """Train as the command line says, and print what serves the result. Raises UsageError."""
    given = vars(_train_parser().parse_args(words))
    data, images, withheld = given.pop("data"), given.pop("images", None), given.pop("withheld", [])
    try:
        photos = load_photos(data, images)
        if withheld:
            from relay_models.recipes.text4seg.dataset import withhold_pseudo

            photos, _ = withhold_pseudo(photos, withheld)
        adapter = _trained(photos, given)
    except RelayModelsError as error:
        raise UsageError(str(error)) from error
    sys.stdout.write(f"{adapter}\nvllm-relay serve {adapter}\n")
    return 0


def _trained(photos: Sequence[Photo], given: dict[str, Any]) -> Path:
    """The folder of what was trained, by the options that were given; the recipe has defaults for the others."""
    is_relay_seg = given["model"] == embedded_model.RELAY_SEG
    for name in sorted(given.keys() & (_ONLY_LORA if is_relay_seg else _ONLY_RELAY_SEG)):
        raise UsageError(f"--{name.replace('_', '-')} is no option of training {given['model']}")
    return _trained_relay_seg(photos, given) if is_relay_seg else _trained_lora(photos, given)


def _trained_relay_seg(photos: Sequence[Photo], given: dict[str, Any]) -> Path:
    from relay_models.recipes.text4seg.relay_seg_recipe import (  # imports PyTorch
        RelaySegRecipe,
        begun_from,
        on_gpu,
        train_relay_seg,
    )

    anew = given.get("anew")
    if anew == EVERYTHING and "start" in given:
        raise UsageError(f"--start is what training begins from, and --anew {EVERYTHING} begins from nothing: give one")
    output: Path = given["output"]
    recipe = RelaySegRecipe(
        output, embedded_model.prepare(embedded_model.SMOLLM2), embedded_model.prepare_encoder(output)
    )
    if anew != EVERYTHING:
        recipe = begun_from(recipe, given.get("start", embedded_model.WEIGHTS), sees_anew=anew == SEEING)
    if _wants_gpu(given.get("device", "auto")):
        recipe = on_gpu(recipe, len(os.sched_getaffinity(0)))
    training = {_RELAY_SEG_NAMES.get(name, name): given[name] for name in _OF_TRAINING & given.keys()}
    if "absent" in given:
        training["mix"] = replace(recipe.training.mix, num_absent=given["absent"])
    recipe = replace(recipe, training=replace(recipe.training, **training))
    if "variants" in given:
        recipe = replace(recipe, variants=given["variants"])
    of_warmup = {"warmup_minutes": "minutes", "seed": "seed"}
    warmup = {theirs: given[ours] for ours, theirs in of_warmup.items() if ours in given}
    recipe = replace(recipe, warmup=replace(recipe.warmup, **warmup))
    return train_relay_seg(recipe, photos)


def _wants_gpu(device: str) -> bool:
    import torch

    has_gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not has_gpu):
        known = "auto, cpu or cuda" if has_gpu else "auto or cpu, for PyTorch sees no GPU here"
        raise UsageError(f"--device is {device!r}; of relay-seg-tiny it must be {known}")
    return has_gpu and device != "cpu"


def _trained_lora(photos: Sequence[Photo], given: dict[str, Any]) -> Path:
    from relay_models.recipes.text4seg.lora_student import LoraSizes
    from relay_models.recipes.text4seg.lora_training import LoraOptions, train_lora  # imports PyTorch
    from relay_models.recipes.text4seg.questions import QuestionMix
    from relay_models.text4seg.profiles import Style

    sizes = LoraSizes(**{name: given.pop(name) for name in ("rank", "alpha", "dropout") if name in given})
    if "style" in given:
        given["style"] = Style(given["style"])
    if "absent" in given:
        given["mix"] = QuestionMix(num_absent=given.pop("absent"))
    return train_lora(LoraOptions(sizes=sizes, **given), photos)


def _train_parser() -> argparse.ArgumentParser:
    from relay_models.text4seg.profiles import Style

    parser = argparse.ArgumentParser(
        prog="vllm-relay train text4seg",
        description="Fine-tune a model on your masks: LoRA on LLaVA-1.5, Qwen2-VL or InternVL2, or relay-seg-tiny on a "
        "few CPU cores or a GPU. A run that was stopped goes on when the same command is given "
        "again. What is not given is as in the paper, or as relay-seg-tiny was made.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="a .jsonl file, a COCO .json file, or a folder with images/ and masks/")
    add("--model", required=True, help="folder or hub id of the model to begin with, or relay-seg-tiny")
    add("--output", required=True, type=Path, help="folder of the run: features, checkpoints, log, and the adapter")
    add("--images", type=Path, help="what file names in DATA are relative to (default: the folder DATA is in)")
    add(
        "--withheld",
        nargs="+",
        metavar="CLASS",
        help="keep back a tenth, at least one, of these classes' pseudo-labelled photos",
    )
    add("--grid", type=_positive, help="cells a side of the answers (default: what is known of the model)")
    add("--style", choices=[style.value for style in Style], help="of prompts (default: what is known of the model)")
    add("--steps", type=_positive, help="of the optimizer")
    add("--photos-per-step", type=_positive, help="over which gradients are accumulated")
    add("--questions-per-photo", type=_positive, help="packed behind one picture, at most")
    add("--most-tokens", type=_positive, help="of one packed sequence")
    add("--absent", type=int, help="questions of a photo for what is not there, at most")
    add("--rank", type=_positive, help="of the LoRA")
    add("--alpha", type=_positive, help="of the LoRA: its change counts alpha / rank times")
    add("--dropout", type=float, help="of the LoRA")
    add("--learning-rate", type=float, help="of the LoRA, at its highest")
    add("--projector-rate", type=float, help="of the projector, at its highest")
    add("--variants", type=_positive, help="copies of the photos; all but the first are changed at random")
    add("--precision", choices=["bfloat16", "float32"], help="of what is frozen, and of the computation")
    add("--device", help="cpu, cuda, cuda:1 (not for relay-seg-tiny), or auto")
    add("--checkpoint-every", type=_positive, help="steps")
    add("--checkpoints-activations", action="store_true", help="less memory, a third more time")
    add("--seed", type=int, help="of everything")
    group = parser.add_argument_group("relay-seg-tiny")
    group.add_argument("--minutes", type=float, help="of training", default=argparse.SUPPRESS)
    group.add_argument(
        "--warmup-minutes", type=float, help="of the projector alone, before that", default=argparse.SUPPRESS
    )
    group.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="begin from an earlier run's relay-seg.safetensors (default: from the built-in weights)",
    )
    group.add_argument(
        "--anew",
        choices=[SEEING, EVERYTHING],
        help="take over nothing of how pictures are seen, but how their maps are read; or nothing at all",
    )
    group.add_argument("--processes", type=_positive, help="one a core", default=argparse.SUPPRESS)
    return parser


# ---------------------------------------------------------------- eval


def run_eval(words: Sequence[str]) -> int:
    """Evaluate as the command line says, and print the report. Raises UsageError and RelayServingError."""
    args = _eval_parser().parse_args(words)
    if (args.url is None) == (args.model is None):
        raise UsageError("eval text4seg takes one of --url, a running server, and --model, for which it starts one")
    try:
        photos = _chosen(load_photos(args.data, args.images), args)
        if args.url is not None:
            report = evaluate_server(photos, args.url, args)
        else:
            with _server_of(args.model, args.serve_flags) as url:
                report = evaluate_server(photos, url, args)
    except RelayModelsError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:  # requests that are under way may take half an hour, and nothing waits for them
        kept = "nothing was kept" if args.output is None else f"the same command goes on from {args.output}"
        sys.stderr.write(f"\nvllm-relay: evaluation ended; {kept}\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    sys.stdout.write(report.to_markdown())
    return 0


def load_photos(data: Path, images: Path | None) -> list[Photo]:
    """The photos of a `.jsonl` file, a COCO `.json` file, or a folder of PNG masks.

    Raises:
        UsageError: it is none of them. RelayModelsError: it cannot be used.
    """
    from relay_models.recipes.text4seg.dataset import load_coco, load_jsonl, load_png_masks

    if data.is_dir():
        if images is not None:
            raise UsageError(f"--images is {str(images)!r}, but {str(data)!r} is a folder, which holds its own images/")
        return load_png_masks(data)
    if data.suffix == ".jsonl":
        return load_jsonl(data, images or data.parent)
    if data.suffix == ".json":
        return load_coco(data, images or data.parent)
    raise UsageError(
        f"DATA is {str(data)!r}; it must be a .jsonl file, a COCO .json file, or a folder with images/ and masks/"
    )


def _chosen(photos: list[Photo], args: argparse.Namespace) -> list[Photo]:
    from relay_models.recipes.text4seg.dataset import withhold_pseudo

    if args.withheld:
        _, photos = withhold_pseudo(photos, args.withheld)
    return photos[: args.limit]


def evaluate_server(photos: Sequence[Photo], url: str, args: argparse.Namespace) -> EvaluationReport:
    """Ask a server about all photos, with a bar on stderr. What was answered is kept in ``args.output``, if given.

    Raises:
        RelayServingError: it does not answer, or refuses. RelayModelsError: its answers do not fit, or a photo is no
            picture of the size it is annotated with. UsageError: what is asked for cannot be.
    """
    from tqdm import tqdm

    from relay_models.recipes.text4seg.evaluation import QUERY_KINDS, EvaluationSettings, evaluate, queries_of
    from relay_serving.schemas.segmentation import LONGEST_EXPRESSION

    settings = EvaluationSettings(
        kinds=tuple(args.kinds or QUERY_KINDS),
        max_absent=args.max_absent,
        seed=args.seed,
        min_photos=args.min_photos,
    )
    asked = [(photo, query.text) for photo in photos for query in queries_of(photo, settings)]
    for photo, text in asked:
        if len(text) > LONGEST_EXPRESSION:
            raise UsageError(f"{photo.file}: an expression of {len(text)} characters, {text[:40]!r}…, cannot be asked")
    server = Server(
        url,
        api_key=args.api_key,
        model=args.served_model,
        wants_adapter=args.model is not None,
        grammar=args.grammar,
        refiner=args.refiner,
    )
    if asked:
        settings = replace(settings, grid=_grid_of(server, *asked[0], args.grid))
    data = args.name or args.data.name
    kept = None
    if args.output is not None:
        run = {
            "data": data, "model": server.model, "model_folder": server.model_folder, "grammar": args.grammar,
            "refiner": args.refiner, "grid": settings.grid, "kinds": list(settings.kinds),
            "max_absent": settings.max_absent, "photos": len(photos),
        }  # fmt: skip
        kept = EvaluationFolder(args.output, run)

    def answer(photo: Photo, queries: Sequence[Query]) -> Sequence[Reply]:
        replies = kept.replies(photo, queries) if kept is not None else None
        if replies is None:
            replies = server.answer(photo, queries)
            if kept is not None:
                kept.keep(photo, queries, replies)
        return replies

    with (
        contextlib.ExitStack() as last,
        tqdm(total=len(photos), unit="photo", desc="Evaluating", file=sys.stderr, disable=None) as bar,
    ):
        last.callback(server.give_up)
        report = evaluate(
            photos,
            answer,
            settings=settings,
            answer_classes=server.answer_classes if args.multi_class else None,
            model=server.model,
            data=data,
            conditions={"grammar": args.grammar, "refiner": args.refiner},
            progress=lambda done, of: bar.update(1),
            concurrency=args.concurrency,
        )
    if kept is not None:
        kept.finish(photos, report)
    return report


def _grid_of(server: Server, photo: Photo, text: str, wanted: int | None) -> int:
    """Cells of a side of the server's answers, which decide what can be reached. Raises UsageError."""
    found = server.grid(photo, text)
    if found is None:
        return wanted or DEFAULT_GRID
    if len(set(found)) > 1 or (wanted is not None and wanted != found[0]):
        raise UsageError(f"--grid is {wanted}, and the server answers on a grid of {found[0]}x{found[1]}")
    return found[0]


class Server:
    """A running relay server as what answers an evaluation."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        wants_adapter: bool = False,
        grammar: str = "on",
        refiner: str = "none",
    ) -> None:
        """Asks what it serves.

        Args:
            model: its name, where the server has several.
            wants_adapter: of several and without a name, the only adapter is meant.

        Raises:
            UsageError: the URL is not http or https, or it is not clear which model is meant. RelayServingError: there
                is no server, or it serves no model.
        """
        if not _is_url_of_server(url):
            raise UsageError(f"--url is {url!r}; it must begin with http:// or https:// and name a server")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._opener = _opener_for(self._url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._grammar, self._refiner = grammar, refiner
        self._given_up = threading.Event()
        self.model, self.model_folder = self._chosen(model, wants_adapter)

    def give_up(self) -> None:
        """Requests that the server is too busy for are not tried again from now on."""
        self._given_up.set()

    def _chosen(self, name: str | None, wants_adapter: bool) -> tuple[str, str | None]:
        """The model's name, and where its weights lie on the server, as far as that says so."""
        models = self._call("/v1/models").get("data") or []
        if not models:
            raise RelayServingError(f"{self._url} serves no model")
        if name is None and wants_adapter and len(models) > 1:
            models = [model for model in models if model.get("parent")] or models
        served = {str(model["id"]): model.get("root") for model in models}
        if name is None and len(served) == 1:
            name = next(iter(served))
        if name not in served:
            given = "missing" if name is None else repr(name)
            raise UsageError(f"--served-model is {given}; {self._url} serves {', '.join(served)}")
        return str(name), served[str(name)]

    def grid(self, photo: Photo, text: str) -> tuple[int, int] | None:
        """Rows and columns of an answer, where one says so."""
        results = self._segment(_data_url(photo), grammar="on", on_refusal="force", expressions=[text])
        found = next((result["grid"] for result in results if result.get("grid")), None)
        return None if found is None else (int(found[0]), int(found[1]))

    def answer(self, photo: Photo, queries: Sequence[Query]) -> list[Reply]:
        """A reply to each query, of whose answer the first descriptor counts; one that the server could not answer has
        status `FAILED`."""
        from relay_models.recipes.text4seg.evaluation import Reply

        replies: list[Reply] = []
        picture = _data_url(photo)
        for start in range(0, len(queries), MOST_EXPRESSIONS):
            texts = [query.text for query in queries[start : start + MOST_EXPRESSIONS]]
            found = [result for result in self._segment(picture, expressions=texts) if not result.get("block")]
            results = sorted(found, key=lambda result: int(result["query_index"]))
            if [result["query_index"] for result in results] != list(range(len(texts))):
                raise RelayServingError(f"{photo.file}: {len(texts)} expressions were sent, {len(results)} came back")
            replies += [Reply(_mask(result, photo), result["status"]) for result in results]
        return replies

    def answer_classes(self, photo: Photo, classes: Sequence[str]) -> Any:
        """[H, W] of 0 for `others` and 1 + the index of a class."""
        import numpy as np

        from relay_models.recipes.text4seg.evaluation import FAILED

        map_HW = np.zeros((photo.height, photo.width), dtype=np.int64)
        for result in self._segment(_data_url(photo), classes=list(classes)):
            if result["status"] == FAILED:
                said = (result.get("error") or {}).get("message")
                raise RelayServingError(f"{photo.file}: the question for {', '.join(classes)} failed: {said}")
            if not result.get("block") and result.get("label") in classes:
                map_HW[_mask(result, photo)] = 1 + classes.index(result["label"])
        return map_HW

    def _segment(self, picture: str, **wanted: Any) -> list[dict[str, Any]]:
        body = {
            "model": self.model,
            "image": picture,
            "grammar": self._grammar,
            "on_refusal": "force" if self._grammar == "on" else "return",
            "mask_format": "coco_rle",
            "refiner": self._refiner,
            **wanted,
        }
        results: list[dict[str, Any]] = self._call("/v1/segmentations", body)["results"]
        return results

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What is asked with a body is asked again where the server fails, `TRIES_AGAIN` times."""
        data = None if body is None else json.dumps(body).encode()
        tries = 0 if body is None else TRIES_AGAIN
        deadline = time.monotonic() + REQUEST_LIMIT_SECONDS
        failures = 0
        while True:
            request = urllib.request.Request(self._url + path, data=data, headers=self._headers)
            try:
                with self._opener.open(request, timeout=REQUEST_LIMIT_SECONDS) as response:
                    answer = json.load(response)
                break
            except urllib.error.HTTPError as error:
                is_over = time.monotonic() > deadline or self._given_up.is_set()
                is_busy = error.code == HTTPStatus.TOO_MANY_REQUESTS
                failures += not is_busy
                may_pass = is_busy or (error.code >= HTTPStatus.INTERNAL_SERVER_ERROR and failures <= tries)
                if is_over or not may_pass:
                    raise RelayServingError(f"{self._url}{path} answered {error.code}: {_said(error)}") from error
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures += 1
                if failures > tries or self._given_up.is_set():
                    raise RelayServingError(f"{self._url}{path} does not answer: {error}") from error
            self._given_up.wait(BUSY_WAIT_SECONDS)
        if not isinstance(answer, dict):
            raise RelayServingError(f"{self._url}{path} answered with no JSON object")
        return answer


def _is_url_of_server(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port beyond 65535
        return False


def _opener_for(url: str) -> urllib.request.OpenerDirector:
    """A proxy that the environment names is for servers elsewhere, and not for one on this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as unreadable:
        return f"its answer cannot be read: {unreadable!r}"


def _data_url(photo: Photo) -> str:
    """The file as it is, which must be the picture that was annotated. Raises UsageError and RelayModelsError."""
    photo.open()
    try:
        picture = base64.b64encode(photo.path.read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"{photo.path}: cannot be read: {error.strerror or error}") from error
    return f"data:image/jpeg;base64,{picture}"  # the server finds out by itself what kind of picture it is


def _mask(result: dict[str, Any], photo: Photo) -> Any:
    import numpy as np

    from relay_models.masks import from_coco_rle

    if result.get("mask") is None:
        return np.zeros((photo.height, photo.width), dtype=np.bool_)
    mask_HW = from_coco_rle(result["mask"])
    if mask_HW.shape != (photo.height, photo.width):
        raise RelayServingError(
            f"{photo.file}: is {photo.height} by {photo.width}, a mask came back of {mask_HW.shape}"
        )
    return mask_HW


@contextlib.contextmanager
def _server_of(model: str, flags: Sequence[str]) -> Iterator[str]:
    """The URL of a server of this model, which ends with the block. What it says goes to stderr."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "relay_serving", "serve", model, "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=STDERR)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    opener = _opener_for(url)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineStartError(f"the server ended with status {process.returncode} before it was ready")
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.5)
    raise EngineStartError(f"the server was not ready after {START_LIMIT_SECONDS} s")


def _eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-relay eval text4seg",
        description="Ask a model about photos whose masks are known: cIoU, gIoU, N-acc, T-acc, REC accuracy, mIoU, "
        "with intervals and ceilings.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="a .jsonl file, a COCO .json file, or a folder with images/ and masks/")
    add("--images", type=Path, help="what file names in DATA are relative to (default: the folder DATA is in)")
    add("--url", help="a running server, such as http://127.0.0.1:8000")
    add("--model", help="a model to start a server for, as `vllm-relay serve` takes it")
    add("--serve-flags", nargs=argparse.REMAINDER, default=[], help="flags of that server; must come last")
    add("--api-key", help="what the server asks for")
    add("--grammar", choices=["on", "off"], default="on", help="whether answers are held to the format (default: on)")
    add("--refiner", default="none", help="of that server, by name (default: none, the coarse masks)")
    add("--served-model", metavar="NAME", help="of a server with several models, which is meant")
    add("--grid", type=_positive, help="cells of a side, for ceilings (default: as the answers have)")
    add("--kinds", nargs="+", metavar="KIND", help="kinds of questions (default: all)")
    add("--multi-class", action="store_true", help="also ask for several classes at once, for mIoU")
    add("--max-absent", type=int, default=2, help="absent classes asked for, of a photo, at most (default: 2)")
    add("--min-photos", type=_positive, default=8, help="of a class, to count in the macro mean (default: 8)")
    add("--limit", type=_positive, help="the first so many photos only")
    add("--concurrency", type=_positive, default=4, help="photos asked about at a time (default: 4)")
    add("--withheld", nargs="+", metavar="CLASS", help="only the photos of these classes that training kept back")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--name", help="of the data, for the report (default: DATA's)")
    add(
        "--output",
        type=Path,
        help="folder for report.json, report.md and masks.jsonl, which bench refining reads; an evaluation that was "
        "ended goes on there",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
