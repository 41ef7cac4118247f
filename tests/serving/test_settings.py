"""The relay settings: where they come from, who wins, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_serving.errors import SettingError
from relay_serving.settings import VARIABLES, CpuKernel, GpuKernel, RelaySettings, cache_folder

settings_values = st.builds(
    RelaySettings,
    enabled=st.booleans(),
    cpu_kernel=st.sampled_from(CpuKernel),
    gpu_kernel=st.sampled_from(GpuKernel),
    min_shared_tokens=st.integers(0, 1 << 20),
    log_plan=st.booleans(),
)


@pytest.fixture(autouse=True, scope="module")
def _nothing_of_the_developers():
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES.values():
            patch.delenv(variable, raising=False)
        yield


json_keys = st.text(min_size=1).filter(lambda key: key != "relay")


@given(settings_values, st.dictionaries(json_keys, st.integers() | st.text()))
def test_settings_survive_the_way_to_the_workers_and_drop_nothing_of_the_users(settings, users):
    carried = settings.to_additional_config(users)
    assert RelaySettings.from_additional_config(carried) == settings
    assert {key: carried[key] for key in users} == users


def test_what_the_user_wrote_under_our_key_wins():
    carried = RelaySettings(min_shared_tokens=5).to_additional_config({"relay": {"min_shared_tokens": 512}})
    assert RelaySettings.from_additional_config(carried) == RelaySettings(min_shared_tokens=512)


@pytest.mark.parametrize(
    "additional_config", [{}, {"other": 1}, None, object()], ids=["empty", "other", "none", "object"]
)
def test_without_our_key_the_environment_stands_and_then_the_defaults(additional_config, monkeypatch):
    """As in a vLLM that somebody else started, with VLLM_PLUGINS=relay."""
    assert RelaySettings.from_additional_config(additional_config) == RelaySettings()
    monkeypatch.setenv("VLLM_RELAY_CPU_KERNEL", "torch")
    assert RelaySettings.from_additional_config(additional_config) == RelaySettings(cpu_kernel=CpuKernel.TORCH)


def test_our_key_wins_over_the_environment_field_by_field():
    environment = {"VLLM_RELAY_CPU_KERNEL": "torch", "VLLM_RELAY_MIN_SHARED_TOKENS": "9"}
    settings = RelaySettings.from_additional_config({"relay": {"min_shared_tokens": 7}}, environment)
    assert settings == RelaySettings(cpu_kernel=CpuKernel.TORCH, min_shared_tokens=7)


def test_the_environment_sets_every_field():
    environment = {
        "VLLM_RELAY": "0",
        "VLLM_RELAY_CPU_KERNEL": "torch",
        "VLLM_RELAY_GPU_KERNEL": "triton",
        "VLLM_RELAY_MIN_SHARED_TOKENS": "256",
        "VLLM_RELAY_LOG_PLAN": "yes",
        "VLLM_RELAY_SEGMENTATION": "24",
        "VLLM_RELAY_SEGMENTATION_QUERIES": "7",
        "VLLM_RELAY_DRAFT_ROWS": "32",
        "VLLM_RELAY_REFINER": "mobile-sam",
        "VLLM_RELAY_REFINER_TIMEOUT": "5",
    }
    settings = RelaySettings.from_environment(environment)
    kernels = (CpuKernel.TORCH, GpuKernel.TRITON)
    assert settings == RelaySettings(False, *kernels, 256, True, "24", 7, 32, "mobile-sam", 5)
    assert len(environment) == len(dataclasses.fields(RelaySettings))


def test_an_empty_variable_counts_as_unset():
    assert RelaySettings.from_environment({"VLLM_RELAY": "", "VLLM_RELAY_CPU_KERNEL": ""}) == RelaySettings()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VLLM_RELAY": "maybe"}, "VLLM_RELAY is 'maybe'; it must be 1 or 0"),
        (
            {"VLLM_RELAY_SEGMENTATION": "0"},
            "VLLM_RELAY_SEGMENTATION is '0'; it must be auto, off, or a number of cells a side from 1 to 64",
        ),
        (
            {"VLLM_RELAY_SEGMENTATION": "half"},
            "VLLM_RELAY_SEGMENTATION is 'half'; it must be auto, off, or a number of cells a side from 1 to 64",
        ),
        (
            {"VLLM_RELAY_REFINER": "sam"},
            "VLLM_RELAY_REFINER is 'sam'; it must be none, mobile-sam, a hub id (owner/name), "
            "or the path of a folder (./name)",
        ),
        ({"VLLM_RELAY_REFINER_TIMEOUT": "0"}, "VLLM_RELAY_REFINER_TIMEOUT is '0'; it must be 1 or more"),
        ({"VLLM_RELAY_SEGMENTATION_QUERIES": "0"}, "VLLM_RELAY_SEGMENTATION_QUERIES is '0'; it must be 1 or more"),
        (
            {"VLLM_RELAY_CPU_KERNEL": "gpu"},
            "VLLM_RELAY_CPU_KERNEL is 'gpu'; it must be one of auto, cpp, torch, triton",
        ),
        ({"VLLM_RELAY_MIN_SHARED_TOKENS": "-1"}, "VLLM_RELAY_MIN_SHARED_TOKENS is '-1'; it must be a whole number"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(environment, expected):
    with pytest.raises(SettingError) as caught:
        RelaySettings.from_environment(environment)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "relay",
    [7, "on", {"cpu_kernel": "gpu"}, {"min_shared_tokens": True}, {"min_shared_tokens": 1.5}, {"colour": "red"}],
)
def test_a_wrong_additional_config_is_named_with_its_value(relay):
    with pytest.raises(SettingError, match=r'additional-config\["relay"\]'):
        RelaySettings.from_additional_config({"relay": relay})


def test_the_cache_folder_follows_its_variable_then_xdg_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({"VLLM_RELAY_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}).as_posix() == "/a/b"
    assert cache_folder({"XDG_CACHE_HOME": "/c"}).as_posix() == "/c/vllm-relay"
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "vllm-relay"
    assert cache_folder({}) == tmp_path / ".cache" / "vllm-relay"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"VLLM_RELAY_CACHE": "~/relay"},
        {"VLLM_RELAY_CACHE": "here/and/there"},
        {"VLLM_RELAY_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"},
        {"VLLM_RELAY_CACHE": "", "XDG_CACHE_HOME": "/c"},
        {"XDG_CACHE_HOME": "relative"},
        {"XDG_CACHE_HOME": ""},
    ],
    ids=str,
)
def test_kernels_and_server_mean_the_same_cache_folder(variables, tmp_path, monkeypatch):
    """Kernels stand alone and do not import us, so each works it out by itself."""
    from relay_kernels.relay_attention import cpu_build

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("VLLM_RELAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cpu_build.cache_folder() == cache_folder() / "kernels"
    assert cache_folder().is_absolute()
    assert "~" not in cache_folder().parts


def test_the_plugins_switch_and_the_command_lines_are_one(monkeypatch):
    """`register` and `settings` once read VLLM_RELAY each in a way of its own."""
    from relay_serving.vllm_plugin.register import is_asked_for

    monkeypatch.setenv("VLLM_PLUGINS", "other, relay")
    for value, expected in (("", True), ("1", True), (" On ", True), ("0", False), ("no", False), ("OFF", False)):
        monkeypatch.setenv("VLLM_RELAY", value)
        assert is_asked_for() is expected is RelaySettings.from_environment().enabled
    monkeypatch.setenv("VLLM_RELAY", "maybe")
    with pytest.raises(SettingError, match="VLLM_RELAY is 'maybe'; it must be 1 or 0"):
        is_asked_for()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert not is_asked_for()


def test_a_plain_vllm_interprets_triton_where_our_variable_asks_for_it(monkeypatch):
    import os

    from vllm import platforms

    from relay_serving.vllm_plugin.register import register

    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setenv("VLLM_PLUGINS", "relay")
    monkeypatch.setenv("RELAY_RUN_ID", "abc")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    register()
    assert os.environ["TRITON_INTERPRET"] == ""
    monkeypatch.setenv("VLLM_RELAY_CPU_KERNEL", "triton")
    register()
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize(
    ("environment", "is_ours"),
    [
        ({}, False),
        ({"VLLM_RELAY_GPU_KERNEL": "triton"}, True),
        ({"RELAY_GPU_KERNEL": "triton"}, True),  # a process that vLLM started: the flag won over the environment
        ({"RELAY_GPU_KERNEL": "off", "VLLM_RELAY_GPU_KERNEL": "triton"}, False),
    ],
)
def test_backends_of_a_gpu_are_ours_only_where_the_kernel_is_asked_for(monkeypatch, environment, is_ours):
    """Each name that vLLM may choose leads to a class of ours; on this machine, all but one can be imported."""
    from vllm import platforms
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from relay_serving.vllm_plugin import register

    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(platforms.current_platform, "is_cuda", lambda: True)
    for name in ("VLLM_RELAY_GPU_KERNEL", "RELAY_GPU_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"VLLM_PLUGINS": "relay", "RELAY_RUN_ID": "abc", **environment}.items():
        monkeypatch.setenv(name, value)
    names = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
    try:
        register.register()
        found = {name: AttentionBackendEnum[name].get_path() for name in names}
    finally:
        for name in names:
            AttentionBackendEnum[name].clear_override()
    assert [path.startswith("relay_serving.") for path in found.values()] == [is_ours] * 3
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
