"""Reading out of vLLM's log why it did not start. The logs are shortened recordings."""

from __future__ import annotations

import pytest

from relay_serving.start_failure import StartLog, in_one_line, is_second_hand, with_advice

WORKER = "(Worker pid=7) ERROR 11-23 23:49:04 [multiproc_executor.py:1063] "
CORE = "(EngineCore pid=6) ERROR 11-23 23:49:04 [core.py:1510] "
API = "(APIServer pid=5) "

KV_TOO_LARGE = f"""\
(EngineCore pid=6) INFO 11-23 23:49:03 [utils.py:347] Using LBHNC KV cache layout.
{WORKER}WorkerProc hit an exception.
{WORKER}Traceback (most recent call last):
{WORKER}  File "cpu_worker.py", line 219, in determine_available_memory
{WORKER}    raise ValueError(
{WORKER}ValueError: Available memory on node 0 is less than requested memory for kv (500.0 GiB). Decrease it.
{WORKER}
{CORE}EngineCore failed to start.
{CORE}Traceback (most recent call last):
{CORE}RuntimeError: Worker failed with error 'x', please check the stack trace above for the root cause
Process EngineCore:
{API}Traceback (most recent call last):
{API}  File "core_client.py", line 5, in launch
{API}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""

CHAINED = """\
Traceback (most recent call last):
  File "hub.py", line 1, in head
ConnectionError: name resolution failed

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "hub.py", line 2, in get
OSError: We couldn't connect to the hub
to load the files.
(APIServer pid=5) INFO 11-23 23:49:05 [x.py:1] later
"""


def fed(text: str) -> tuple[StartLog, list[str]]:
    log = StartLog()
    return log, [line for line in text.splitlines() if log.shows(line)]


def test_the_first_cause_is_the_reason_and_no_traceback_is_shown():
    log, shown = fed(KV_TOO_LARGE)
    assert log.reason() == ("Available memory on node 0 is less than requested memory for kv (500.0 GiB). Decrease it.")
    assert shown == [KV_TOO_LARGE.splitlines()[0], "Process EngineCore:"]


def test_of_a_chain_the_last_link_says_most_and_its_message_may_have_several_lines():
    log, shown = fed(CHAINED)
    assert log.reason() == (
        "We couldn't connect to the hub to load the files; "
        "check the model's name or path, and the network if it is on a hub"
    )
    assert shown == [CHAINED.splitlines()[-1]]


def test_an_ordinary_log_is_shown_whole_and_holds_no_reason():
    text = "(APIServer pid=5) WARNING 11-23 23:49:05 [x.py:1] a\nINFO:     Started server process [5]\nplain print"
    log, shown = fed(text)
    assert shown == text.splitlines()
    assert log.reason() is None


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("To serve at least one request, (0.18 GiB KV cache is needed", "lower --max-model-len"),
        ("is less than requested memory for kv (-1.08/0.0 GiB). Reduce use", "--kv-cache-memory-bytes, e.g. 1G"),
        ("[Errno 98] Address already in use", "pass --port"),
        ("DefaultCPUAllocator: can't allocate memory", "smaller model"),
    ],
)
def test_what_to_do_is_added_where_the_message_does_not_say_it(reason, advice):
    assert advice in with_advice(reason)


def test_a_message_is_one_line_of_bounded_length():
    assert in_one_line("a\n  b\tc") == "a b c"
    assert len(in_one_line("x " * 9999)) == 600
    assert is_second_hand("Engine core initialization failed. See root cause above.")
