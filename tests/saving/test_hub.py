"""What is local, what is on the Hub, and the errors of the Hub; nothing here uses a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub_problems import gaussian, trained
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ncprior import NCPrior
from ncprior.saving import hub, inspect
from ncprior.saving.heads import FILE


def failing(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    "name",
    [
        *("./a/b", "../a", "a/b/c", "/a/b", "~/a", ".", "a\\b", "a b", "", "a/", "\x1b[31m/a"),
        *("my-prior", "./a", "~a"),
    ],
)
def test_N8_a_name_that_can_be_no_repository_is_local(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", failing(AssertionError("the Hub was asked")))
    with pytest.raises(FileNotFoundError, match="There is no file") as caught:
        NCPrior.from_pretrained(gaussian(), name)
    assert Path(name).exists() or "a Hub repository is owner/name" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, b"a/b", gaussian()])
def test_what_is_no_path_is_named(name: Any) -> None:
    for load in (inspect, lambda path: NCPrior.from_pretrained(gaussian(), path)):
        with pytest.raises(TypeError, match="path_or_repo must be of type str or PathLike"):
            load(name)


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An error of the Hub, without the response that its constructor takes."""
    error = kind.__new__(kind)
    error.args = (f"{status} answer",)
    return error


def uncached(cause: Exception) -> Exception:
    error = LocalEntryNotFoundError(
        "An error happened, and it is not cached. Check your connection."
    )
    between = RuntimeError("in between")
    error.__cause__, between.__cause__ = cause, None
    return error


ABSENT = {
    "repository": answer(RepositoryNotFoundError, 404),
    "revision": answer(RevisionNotFoundError, 404),
    "offline": uncached(OfflineModeIsEnabled("offline mode is enabled")),
}

FAILED = {
    "429": (uncached(answer(HfHubHTTPError, 429)), "429 answer"),
    "503": (uncached(answer(HfHubHTTPError, 503)), "503 answer"),
    "connection": (uncached(ConnectionError("no route")), "ConnectionError: no route"),
    "gated": (answer(GatedRepoError, 403), "403 answer"),
    "no space": (OSError(28, "No space left on device"), "No space left"),
    "cache": (NotADirectoryError(20, "Not a directory", "/x"), "Not a directory"),
    "no cache": (FileNotFoundError(2, "No such file", "/proc/x"), "HF_HOME"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_M4_what_does_not_exist_is_not_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", failing(ABSENT[case]))
    with pytest.raises(FileNotFoundError, match=f"{FILE} cannot be downloaded from a Hub"):
        NCPrior.from_pretrained(gaussian(), "someone/model")


@pytest.mark.parametrize("case", FAILED)
def test_M4_other_errors_of_the_hub_are_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, match = FAILED[case]
    monkeypatch.setattr(hub, "hf_hub_download", failing(error))
    with pytest.raises(OSError, match=match) as caught:
        NCPrior.from_pretrained(gaussian(), "someone/model")
    assert not isinstance(caught.value, FileNotFoundError)
    if case in ("429", "connection"):
        assert "There is no directory someone/model" in str(caught.value)
        assert "check its path; if a repository, check the connection" in str(caught.value)


@pytest.mark.parametrize("library", ["httpx", "httpx2._exceptions", "requests.exceptions"])
def test_an_error_of_a_library_for_http_is_a_connection_error(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off = type("RemoteProtocolError", (Exception,), {"__module__": library})
    monkeypatch.setattr(hub, "hf_hub_download", failing(cut_off("closed")))
    for load in (inspect, lambda name: NCPrior.from_pretrained(gaussian(), name)):
        with pytest.raises(ConnectionError, match="broke off: RemoteProtocolError: closed. Check"):
            load("someone/model")
    monkeypatch.setattr(hub, "hf_hub_download", failing(LookupError("a bug")))
    with pytest.raises(LookupError, match="a bug"):
        inspect("someone/model")


def test_the_token_goes_to_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []

    def download(*_: Any, token: str | None, **__: Any) -> str:
        tokens.append(token)
        return str(saved / FILE)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for token in ("hf_mine", None):
        NCPrior.from_pretrained(gaussian(), "someone/model", token=token)
        inspect("someone/model", token=token)
    assert tokens == ["hf_mine", "hf_mine", None, None]
    with pytest.raises(TypeError, match="token must be of type str or None"):
        NCPrior.from_pretrained(gaussian(), "someone/model", token=3)  # type: ignore[arg-type]


class Api:
    """A Hub that notes what it is asked for."""

    asked: list[str]
    present: Path | Exception = EntryNotFoundError("no README")

    def __init__(self, **_: Any) -> None:
        Api.asked = []

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        Api.asked.append("repository")
        return type("Repo", (), {"repo_id": f"someone/{repo_id.split('/')[-1]}"})

    def hf_hub_download(self, repo_id: str, file: str, **_: Any) -> str:
        Api.asked.append(file)
        if isinstance(Api.present, Exception):
            raise Api.present
        return str(Api.present)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
        Api.asked.append("commit")
        self.__class__.files = {o.path_in_repo: o.path_or_fileobj for o in operations}
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/0"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    monkeypatch.setattr(hub, "HfApi", Api)
    Api.asked = []
    return Api


@pytest.mark.parametrize(
    "card",
    [
        {"base_model": "](javascript:x)"},
        {"card_data": {"tags": 3}},
        {"card_data": {"license": object()}},
        {"report": "fine"},
        {"reprot": None},
    ],
)
def test_F30_no_repository_is_made_before_the_card_is_valid(
    card: dict[str, Any], api: type[Any]
) -> None:
    with pytest.raises((TypeError, ValueError)):
        trained(gaussian()).push_to_hub("model", **card)
    assert api.asked == []


def test_F22_a_push_leaves_no_files_behind(
    api: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = trained(gaussian()).push_to_hub("model")
    assert url == "https://hub/someone/model/commit/0"
    assert api.asked == ["repository", "README.md", "commit"]
    assert sorted(api.files) == ["README.md", "ncprior.json", FILE]
    assert '"someone/model"' in api.files["README.md"].decode()
    assert yaml.safe_load(api.files["README.md"].decode().split("---\n")[1])["tags"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="repo_id must be of type str"):
        trained(gaussian()).push_to_hub(None)  # type: ignore[arg-type]


VAES = b"---\nlibrary_name: pythae\n---\n# My VAE\n"


def test_a_push_to_the_repository_of_the_vae_leaves_its_readme(
    api: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "present", tmp_path / "README.md")
    api.present.write_bytes(VAES)
    trained(gaussian()).push_to_hub("model")
    assert sorted(api.files) == ["ncprior.json", FILE]
    with pytest.warns(UserWarning, match="with the given base_model. Leave it out") as caught:
        trained(gaussian()).push_to_hub("model", base_model="someone/vae")
    assert [warning.filename for warning in caught] == [__file__]
    api.present.write_bytes(api.present.read_bytes().replace(b"pythae", b"ncprior"))
    trained(gaussian()).push_to_hub("model")
    assert "README.md" in api.files


@pytest.mark.parametrize("case", ["connection", "gated", "503", "no space"])
def test_nothing_is_pushed_while_the_readme_cannot_be_read(
    case: str, api: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "present", FAILED[case][0])
    with pytest.raises(ConnectionError, match="Nothing is saved to someone/model"):
        trained(gaussian()).push_to_hub("model")
    assert "commit" not in api.asked
