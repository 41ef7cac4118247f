"""The command line: which plugins load, which model is served, whose flag wins, what a mistake prints."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_serving import cli, embedded_model, engine_process, plugin_names, preflight, relay_flags, start_defaults
from relay_serving.errors import (
    ModelNotFoundError,
    PortUnavailableError,
    RelayServingError,
    SystemLibraryError,
    UsageError,
)
from relay_serving.settings import VARIABLES, CpuKernel, RelaySettings
from relay_serving.supervisor import Listening

names = st.lists(st.text("abcdefgh_", min_size=1, max_size=8), unique=True)


# ---- VLLM_PLUGINS


@given(names, names)
def test_our_name_is_added_to_the_users_list_and_nothing_is_dropped(users, discovered):
    value = plugin_names.plugins_value(",".join(users), enabled=True, discovered=discovered)
    assert value.split(",") == [*users, "relay"]


@given(names)
def test_unset_keeps_loading_all_that_would_have_loaded(discovered):
    value = plugin_names.plugins_value(None, enabled=True, discovered=[*discovered, "relay"])
    assert value.split(",") == [*discovered, "relay"]


@given(names | st.none(), names)
def test_the_kill_switch_takes_our_name_out_and_no_other(users, discovered):
    current = None if users is None else ",".join([*users, "relay"])
    value = plugin_names.plugins_value(current, enabled=False, discovered=[*discovered, "relay"])
    assert [name for name in value.split(",") if name] == (discovered if users is None else users)


def test_a_plugin_whose_name_is_consent_is_not_named_for_the_user():
    consent = "lora_hf_hub_resolver"
    assert plugin_names.plugins_value(None, True, ["a", consent]) == "a,relay"
    assert plugin_names.plugins_value(consent, True, []) == f"{consent},relay"


def test_an_endpoint_plugin_is_not_loaded_because_we_are(monkeypatch):
    """vLLM loads those only by name, so naming everything discovered must not name them."""
    groups = {
        "vllm.general_plugins": ["both_of_us"],
        "vllm.platform_plugins": ["tpu"],
        "vllm.endpoint_plugins": ["routes"],
        "console_scripts": ["pip"],
    }

    class EntryPoints:
        def __init__(self):
            self.groups = set(groups)

    def entry_points(group=None):
        return EntryPoints() if group is None else [SimpleNamespace(name=name) for name in groups[group]]

    monkeypatch.setattr(plugin_names, "entry_points", entry_points)
    assert plugin_names.discovered_names() == ["both_of_us", "tpu"]


def test_the_engine_gets_our_plugin_and_the_users(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert cli.engine_environment(["--port", "1"])["VLLM_PLUGINS"] == "mine,relay"
    assert cli.engine_environment(["--no-relay"])["VLLM_PLUGINS"] == "mine"
    monkeypatch.setenv("VLLM_RELAY", "0")
    assert cli.engine_environment([])["VLLM_PLUGINS"] == "mine"
    environment = cli.engine_environment(["--relay"])
    assert (environment["VLLM_PLUGINS"], environment["VLLM_RELAY"]) == ("mine,relay", "1")


def test_relay_is_found_where_it_is_installed():
    plugin_names.check_relay_loads()


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([], "no plugin named 'relay'"),
        ([("elsewhere:register", None)], "another package"),
        ([("relay_serving.x:register", ImportError("no module x"))], "does not import: ImportError: no module x"),
    ],
    ids=["absent", "foreign", "broken"],
)
def test_a_relay_that_cannot_load_is_found_before_vllm_swallows_it(monkeypatch, found, reason):
    def load(error):
        def raise_it():
            raise error

        return raise_it

    plugins = [SimpleNamespace(name="relay", value=value, load=load(error)) for value, error in found]
    monkeypatch.setattr(plugin_names, "entry_points", lambda group: plugins)
    with pytest.raises(RelayServingError, match=reason):
        plugin_names.check_relay_loads()


# ---- flags and settings


def parsed(*words):
    parser = argparse.ArgumentParser()
    relay_flags.add_flags(parser)
    return parser.parse_args(words)


def test_flags_win_over_the_environment_and_the_environment_over_defaults():
    environment = {"VLLM_RELAY_CPU_KERNEL": "torch", "VLLM_RELAY_MIN_SHARED_TOKENS": "9"}
    settings = relay_flags.settings_from(parsed("--relay-cpu-kernel", "cpp"), environment)
    assert settings == RelaySettings(cpu_kernel=CpuKernel.CPP, min_shared_tokens=9)


# each: the --config file, the command line, whether relay is on
SWITCHES = [
    ({}, [], True),
    ({}, ["--no-relay"], False),
    ({}, ["--no_relay"], False),
    ({}, ["--no_relay", "--relay"], True),
    ({"relay": False}, [], False),
    ({"relay": True}, [], True),
    ({"no-relay": True}, [], False),
    ({"no_relay": True}, [], False),
    ({"no-relay": False}, [], True),
    ({"relay": False}, ["--relay"], True),
    ({"relay": True}, ["--no-relay"], False),
]


@pytest.mark.parametrize(("config", "words", "is_on"), SWITCHES)
@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_every_switch_reaches_vllms_plugins_and_its_parser(monkeypatch, config, words, is_on, variable):
    """Before vLLM is there, and again behind its parser, which drops `relay: false` and makes `relay: true` a flag."""
    monkeypatch.delenv("VLLM_RELAY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_RELAY", variable)
    if variable == "0" and not config and not words:
        is_on = False
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    environment = cli.engine_environment(words, config)
    assert environment["VLLM_PLUGINS"] == ("mine,relay" if is_on else "mine")
    flags_of_config = [f"--{key}".replace("_", "-") for key, value in config.items() if value]
    args = parsed(*flags_of_config, *[word.replace("_", "-") for word in words])
    assert relay_flags.settings_from(args, environment).enabled is is_on


def test_a_switch_in_the_config_file_that_is_neither_yes_nor_no_is_refused():
    with pytest.raises(UsageError, match=r"no-relay in the --config file is 'perhaps'; it must be true or false"):
        cli.engine_environment([], {"no-relay": "perhaps"})
    assert relay_flags.config_variables({"relay_log_plan": False, "port": 1}) == {"VLLM_RELAY_LOG_PLAN": "0"}


@pytest.fixture
def settled(monkeypatch):
    """What the engine's process makes of flags, --additional-config and the environment."""

    def settle(*words, additional_config=None, **environment):
        for name in ("VLLM_RELAY", "VLLM_RELAY_CPU_KERNEL", "TRITON_INTERPRET", "RELAY_RUN_ID", "RELAY_GPU_KERNEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"VLLM_PLUGINS": "mine,relay", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(engine_process.register, "register", lambda: registered.append(True))
        args = argparse.Namespace(**vars(parsed(*words)), additional_config=additional_config or {})
        settings = engine_process.settle_relay(args)
        assert RelaySettings.from_additional_config(args.additional_config, {}) == settings
        return settings

    registered = settle.registered = []
    monkeypatch.setenv("TRITON_INTERPRET", "")  # so that what `settle` leaves is taken back
    monkeypatch.setenv("RELAY_RUN_ID", "")
    monkeypatch.setenv("RELAY_GPU_KERNEL", "")
    return settle


def test_processes_to_come_know_which_kernel_a_gpu_has(settled):
    settled(VLLM_RELAY_GPU_KERNEL="triton")
    assert os.environ["RELAY_GPU_KERNEL"] == "triton"
    assert "VLLM_RELAY_GPU_KERNEL" not in os.environ
    assert settled.registered == [True]
    settled(additional_config={"relay": {"gpu_kernel": "off"}}, VLLM_RELAY_GPU_KERNEL="triton")
    assert os.environ["RELAY_GPU_KERNEL"] == "off"
    assert settled.registered == [True]


def test_additional_config_switches_relay_off_in_every_process_to_come(settled):
    settings = settled("--relay", additional_config={"relay": {"enabled": False}}, VLLM_RELAY="1")
    assert not settings.enabled
    assert os.environ["VLLM_PLUGINS"] == "mine"


def test_additional_config_switches_relay_on_again(settled):
    assert settled(additional_config={"relay": {"enabled": True}}, VLLM_PLUGINS="mine", VLLM_RELAY="0").enabled
    assert os.environ["VLLM_PLUGINS"] == "mine,relay"
    assert "VLLM_RELAY" not in os.environ, "it would switch the plugin off in the workers"
    assert settled.registered


def test_triton_is_interpreted_whoever_asked_for_it(settled):
    settled("--relay-cpu-kernel", "cpp", additional_config={"relay": {"cpu_kernel": "triton"}})
    assert os.environ["TRITON_INTERPRET"] == "1"
    settled("--relay-cpu-kernel", "triton", additional_config={"relay": {"cpu_kernel": "cpp"}})
    assert "TRITON_INTERPRET" not in os.environ


def test_what_is_settled_is_not_left_for_vllm_to_warn_of(settled):
    assert settled(VLLM_RELAY="1", VLLM_RELAY_CPU_KERNEL="torch").cpu_kernel == CpuKernel.TORCH
    assert not [name for name in os.environ if name in VARIABLES.values()]
    assert not settled.registered


def test_a_wrong_flag_is_named_with_its_value():
    with pytest.raises(UsageError, match="--relay-min-shared-tokens is 'many'; it must be a whole number"):
        relay_flags.settings_from(parsed("--relay-min-shared-tokens", "many"), {})


def test_every_setting_has_a_flag_in_the_help():
    text = relay_flags.help_text()
    for flag in ("--relay", "--no-relay", "--relay-cpu-kernel", "--relay-min-shared-tokens", "--relay-log-plan"):
        assert flag in text


def defaulted(*words, embedded=True, on_cpu=True, available=20 << 30):
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--optimization-level", "-O", type=int, default=2)
    parser.add_argument("--compilation-config", default="{}")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    start_defaults.mark(parser)
    args = parser.parse_args(words)
    start_defaults.apply(args, embedded_name="built-in" if embedded else None, on_cpu=on_cpu, available_bytes=available)
    return args


@pytest.fixture
def no_cpu_variable(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.mark.usefixtures("no_cpu_variable")
def test_our_defaults_stand_where_nothing_was_given():
    args = defaulted()
    assert (args.host, args.served_model_name, args.kv_cache_memory_bytes) == ("127.0.0.1", ["built-in"], 1 << 30)
    assert (args.optimization_level, args.compilation_config, args.gpu_memory_utilization) == (2, "{}", 0.92)


@pytest.mark.usefixtures("no_cpu_variable")
def test_flags_given_by_the_user_win():
    args = defaulted("--host", "0.0.0.0", "--served-model-name", "a", "--kv-cache-memory-bytes", "7")
    assert (args.host, args.served_model_name, args.kv_cache_memory_bytes) == ("0.0.0.0", ["a"], 7)
    assert defaulted("--gpu-memory-utilization", "0.5").kv_cache_memory_bytes is None


def test_the_users_kv_variable_wins(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert defaulted().kv_cache_memory_bytes is None


@pytest.mark.usefixtures("no_cpu_variable")
def test_on_cuda_and_for_other_models_vllm_decides():
    args = defaulted(embedded=False, on_cpu=False)
    assert (args.kv_cache_memory_bytes, args.enforce_eager, args.served_model_name) == (None, False, None)
    assert defaulted(embedded=False).kv_cache_memory_bytes == int((20 << 30) * 0.4)
    assert defaulted(available=1 << 30).kv_cache_memory_bytes < 1 << 30


@pytest.mark.usefixtures("no_cpu_variable")
def test_without_a_compiler_execution_is_eager_unless_the_user_asked_to_compile(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert defaulted().enforce_eager
    assert not defaulted("-O", "2").enforce_eager
    assert not defaulted("--no-enforce-eager").enforce_eager


def test_variables_the_user_set_are_left_alone(tmp_path):
    wanted = start_defaults.compile_cache_environment({"TORCHINDUCTOR_CACHE_DIR": "/mine"}, tmp_path)
    assert wanted == {"VLLM_USE_AOT_COMPILE": "0"}
    wanted = start_defaults.compile_cache_environment({}, tmp_path, loads_artefacts=True)
    assert wanted == {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}


# ---- which model


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], False),
        (["--port", "8001"], False),
        (["--served-model-name", "x"], False),
        (["facebook/opt-125m", "--port", "8001"], True),
        (["--model", "x"], True),
        (["--model=x"], True),
    ],
)
def test_the_embedded_model_is_served_where_none_is_named(words, named):
    assert cli.names_a_model(words) is named


def test_a_config_file_may_name_the_model(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("port: 8001\n")
    assert not cli.names_a_model(["--config", str(config)])
    config.write_text("model: facebook/opt-125m\n")
    assert cli.names_a_model(["--config", str(config)])
    config.write_text("- port\n")
    with pytest.raises(UsageError, match="must hold flags and their values"):
        cli.read_config_file(["--config", str(config)])
    with pytest.raises(UsageError, match="cannot read the --config file"):
        cli.names_a_model(["--config", str(tmp_path / "absent.yaml")])


def served(words, monkeypatch):
    """The words that the engine is started with, and the embedded model that was prepared for them."""
    prepared, started = [], []
    monkeypatch.setattr(embedded_model, "prepare", lambda name: prepared.append(name) or f"/cache/{name}")
    monkeypatch.setattr(cli, "supervise", lambda words, environment, logs: started.append(words) or 0)
    assert cli.serve(words) == 0
    return started[0], prepared


@pytest.mark.parametrize("name", embedded_model.FOLDERS)
def test_an_embedded_model_is_served_by_its_name(name, monkeypatch, tmp_path):
    words, prepared = served([name, "--port", "1"], monkeypatch)
    assert (words, prepared) == (["serve", f"/cache/{name}", "--port", "1"], [name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert served([name], monkeypatch) == (["serve", name], []), "a folder of that name is somebody's own"


def test_weights_of_the_users_own_training_are_served_under_the_name_of_their_file(monkeypatch, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.touch()
    monkeypatch.setattr(embedded_model, "prepare_trained", lambda path: Path("/cache", path.name))
    words, _ = served([str(file), "--port", "1"], monkeypatch)
    assert words == ["serve", "/cache/mine.safetensors", "--port", "1", "--served-model-name", "mine"]
    words, _ = served([str(file), "--served-model-name=x"], monkeypatch)
    assert words == ["serve", "/cache/mine.safetensors", "--served-model-name=x"]


def test_without_relay_the_default_is_what_stock_vllm_knows(monkeypatch, capsys):
    monkeypatch.setattr(embedded_model, "DEFAULT", embedded_model.RELAY_SEG)
    assert served([], monkeypatch)[1] == ["relay-seg-tiny"]
    assert served(["--no-relay"], monkeypatch)[1] == ["smollm2-135m-instruct"]
    assert "without relay vLLM does not know relay-seg-tiny" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_RELAY", "0")
    assert served([], monkeypatch)[1] == ["smollm2-135m-instruct"]


@pytest.mark.parametrize("model", ["/no/such/folder", "./gone", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_before_the_engine_starts(model):
    with pytest.raises(ModelNotFoundError, match="no model folder at"):
        preflight.check_model(model)


def test_a_hub_id_is_left_to_vllm():
    for model in ("facebook/opt-125m", "gpt2", "s3://bucket/a/b/c", None):
        preflight.check_model(model)


def test_a_port_in_use_is_named(unused_port_holder):
    with pytest.raises(PortUnavailableError, match=rf"127\.0\.0\.1:{unused_port_holder}: Address already in use; stop"):
        preflight.check_port("127.0.0.1", unused_port_holder)


def test_a_missing_system_library_is_named_with_what_brings_it():
    preflight.check_library(preflight.CPU_LIBRARY)
    with pytest.raises(SystemLibraryError, match=r"need the system library libgone\.so\.1, .*apt-get install libnuma1"):
        preflight.check_library("libgone.so.1")


@pytest.fixture
def unused_port_holder():
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


# ---- what the user reads


def listening(**changes):
    fields = {
        "host": "127.0.0.1",
        "port": 8000,
        "tls": False,
        "unix_socket": None,
        "model": "m",
        "chats": True,
        "needs_key": False,
        "relay": "on",
        "shutdown_timeout": 0.0,
    }
    return Listening(**{**fields, **changes})


def test_the_greeting_shows_the_url_and_a_curl_that_a_shell_understands():
    import json
    import shlex

    text = listening(host="", needs_key=True).greeting().strip().splitlines()
    assert "http://127.0.0.1:8000" in text[0]
    words = shlex.split(text[-1])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "m"
    assert "Authorization: Bearer $VLLM_API_KEY" in words
    assert listening(host="::").base_url == "http://[::1]:8000"
    assert listening(tls=True, host="0.0.0.0").base_url == "https://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--version"], 0, "vllm-relay 0."),
        ([], 0, "serve [MODEL] [FLAGS]"),
        (
            ["swerve"],
            2,
            "vllm-relay: error: unknown command 'swerve'; it must be serve, prepare, bench, convert, train",
        ),
        (["prepare", "now"], 2, "vllm-relay: error: prepare takes one of relay-seg-tiny, smollm2-135m-instruct, or"),
    ],
)
def test_commands_answer_without_importing_the_engine(words, status, text):
    code = "import sys; from relay_serving.cli import main; s = main(); assert 'torch' not in sys.modules; sys.exit(s)"
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30)
    assert result.returncode == status, result.stderr
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
