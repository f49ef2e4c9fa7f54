"""Adapters on the hub: what is fetched, and what is said where it cannot be."""

import pytest
from conftest import sample, tiny_pipeline, tiny_transformer
from fake_hub import COMMIT, fake_hub
from huggingface_hub import constants
from test_flexible import attach, config_of

import flexivid
from flexivid.model.adapter import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME, read_config, save_adapter
from flexivid.model.hub import locate_adapter

NAMES = {CONFIG_NAME, WEIGHTS_NAME, LORA_NAME}


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    """A repository with an adapter at its top and in a folder of it, beside what is none of it."""
    flex = attach(tiny_transformer())
    save_adapter(tmp_path / "made", config_of(flex), {"transformer": flex})
    own = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    other = {"model.safetensors": b"large", "README.md": b"words", "optimizer.bin": b"state"}
    return own | {f"second/{name}": content for name, content in own.items()} | other


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """Begins a hub that has the files, or one that refuses; what it was asked for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    running = []

    def begin(**settings) -> list[str]:
        running.append(fake_hub(settings.pop("files", files), **settings))
        address, asked = running[-1].__enter__()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        return asked

    yield begin
    for server in running:
        server.__exit__(None, None, None)


def below(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_three_files_are_fetched(hub):
    hub()
    assert below(locate_adapter("someone/adapter")) == NAMES


def test_a_subfolder_of_a_repository_and_of_a_folder(hub, files, tmp_path):
    hub()
    folder = locate_adapter("someone/adapter", subfolder="second", revision="main")
    assert folder.name == "second" and below(folder.parent) == {f"second/{name}" for name in NAMES}
    (tmp_path / "all").mkdir()
    (tmp_path / "made").rename(tmp_path / "all/second")
    flexivid.enable(tiny_pipeline(), adapter=tmp_path / "all", subfolder="second", budget=0.6)


def test_enable_reads_it_once(hub, monkeypatch):
    asked = hub()
    read = []
    monkeypatch.setattr("flexivid.api.read_config", lambda folder: read.append(folder) or read_config(folder))
    pipe = tiny_pipeline()
    flexivid.enable(pipe, adapter="someone/adapter", budget=0.6)
    assert sample(pipe).isfinite().all()
    with pytest.raises(ValueError, match="give a budget"):  # it has no recipe
        flexivid.enable(pipe, adapter="someone/adapter")
    assert len(read) == 2 and len([line for line in asked if line.endswith("/revision/main")]) == 2


def test_a_token_goes_with_every_request(hub, monkeypatch):
    given = []
    monkeypatch.setattr(
        "flexivid.model.hub.snapshot_download", lambda *names, **settings: given.append(settings) or 1 / 0
    )
    with pytest.raises(flexivid.AdapterError):
        flexivid.enable(tiny_pipeline(), adapter="someone/adapter", budget=0.6, token="secret", revision="v2")
    assert (given[0]["token"], given[0]["revision"]) == ("secret", "v2")


@pytest.mark.parametrize(
    ("settings", "asked_for", "said"),
    [
        ({"refuse": (404, "RepoNotFound")}, {}, "the hub has none of that name, or it is private: then log in"),
        ({"refuse": (401, "RepoNotFound")}, {}, "the hub has none of that name, or it is private: then log in"),
        ({"refuse": (403, "GatedRepo")}, {}, "ask for access on its page"),
        ({"refuse": (403, "Forbidden")}, {}, "the hub cannot be asked, nor is it in the cache: .*403"),
        ({"refuse": (503, "Down")}, {}, "the hub cannot be asked, nor is it in the cache: .*503"),
        ({}, {"revision": "v9"}, "someone/adapter on the hub has no revision v9"),
        ({}, {"subfolder": "third"}, "someone/adapter/third is on the hub, but is no flexivid adapter"),
        ({"files": {"README.md": b"words"}}, {}, "someone/adapter is on the hub, but is no flexivid adapter"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, settings, asked_for, said):
    hub(**settings)
    with pytest.raises(flexivid.AdapterError, match=said):
        locate_adapter("someone/adapter", **asked_for)


def test_without_a_network(hub, monkeypatch):
    hub()
    folder = locate_adapter("someone/adapter")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert locate_adapter("someone/adapter") == folder and folder.name == COMMIT  # from the cache
    with pytest.raises(
        flexivid.AdapterError, match="no folder someone/other, and the hub cannot be asked, nor is it in"
    ):
        locate_adapter("someone/other")


@pytest.mark.parametrize("name", ["revision", "subfolder", "token"])
def test_what_is_about_an_adapter_needs_one(name):
    with pytest.raises(ValueError, match=f"{name} is about an adapter; give one"):
        flexivid.enable(tiny_pipeline(), budget=0.5, **{name: "v1"})


def test_a_revision_of_a_folder(tmp_path):
    with pytest.raises(flexivid.AdapterError, match="a revision is of a hub id, and .* is a folder"):
        locate_adapter(tmp_path, revision="v1")
