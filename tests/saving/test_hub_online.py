"""A round trip over the Hub: a server of our own, and clients in processes of theirs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub_server import TOKEN, HubServer, Repository, _Handler, hub_server

from ncprior.saving.heads import FILE

PRELUDE = """
import copy, json, torch
from helpers.hub_problems import equal_draws, gaussian, trained
from huggingface_hub.utils import HfHubHTTPError
from ncprior import NCPrior
from ncprior.saving.heads import inspect

def load(name, revision=None):
    return NCPrior.from_pretrained(gaussian(), name, revision=revision)

def try_to_load(name, revision=None):
    try:
        return len(load(name, revision).heads)
    except (ConnectionError, FileNotFoundError) as error:
        return str(error)

prior = trained(gaussian())
"""

PUSH_AND_LOAD = """
first = prior.push_to_hub("tester/my-prior", base_model="tester/vae")
old = copy.deepcopy(prior)
with torch.no_grad():
    next(prior.parameters()).add_(1.0)
second = prior.push_to_hub("my-prior", commit_message="Trained longer")
branch = old.push_to_hub("tester/my-prior", revision="wip")
prior.push_to_hub("tester/secret", private=True)
prior.eval(), old.eval()
print(json.dumps({
    "first": first, "second": second, "branch": branch,
    "newest": equal_draws(prior, load("tester/my-prior")),
    "oldest": equal_draws(old, load("tester/my-prior", first.split("/")[-1])),
    "differ": not equal_draws(old, prior),
    "on the branch": equal_draws(old, load("tester/my-prior", "wip")),
    "secret": equal_draws(prior, load("tester/secret")),
    "inspected": inspect("tester/my-prior", revision="wip")["num_groups"],
    "no repository": try_to_load("tester/absent"),
    "no revision": try_to_load("tester/my-prior", "absent"),
}))
"""

STRANGER = f"""
try:
    prior.push_to_hub("tester/other")
except HfHubHTTPError as error:
    status = error.response.status_code
print(json.dumps({{
    "public": try_to_load("tester/my-prior"),
    "secret": try_to_load("tester/secret"),
    "secret with a token": inspect("tester/secret", token="{TOKEN}") and len(
        NCPrior.from_pretrained(gaussian(), "tester/secret", token="{TOKEN}").heads
    ),
    "push": status,
    "push with a token": prior.push_to_hub("tester/other", token="{TOKEN}"),
}}))
"""

LOAD = """
print(json.dumps({name: try_to_load(name) for name in ("tester/my-prior", "tester/never-seen")}))
"""


ENERGY = """
from ncprior.heads import MLPHead
from ncprior.vaebm import GaussianDecoder
from ncprior.vaebm import VAEBM

source = GaussianDecoder(gaussian(), 0.1)
net = MLPHead((3,), width=8)
with torch.no_grad():
    net.out.weight.normal_()
model = VAEBM(source, net, num_steps=3)
url = model.push_to_hub("tester/my-energy", base_model="tester/vae", private=True)
loaded = VAEBM.from_pretrained(source, "tester/my-energy", revision=url.split("/")[-1])
x = torch.randn(5, 3)
try:
    VAEBM.from_pretrained(source, "tester/my-prior")
except FileNotFoundError as error:
    absent = str(error)
print(json.dumps({
    "equal": torch.equal(model(x), loaded(x)), "url": url, "absent": absent,
}))
"""


def run_client(code: str, environment: dict[str, str]) -> dict[str, Any]:
    """Runs code in a process of its own, since HF_ENDPOINT is read when the library is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PRELUDE + code],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def hub_and_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    with hub_server() as hub:
        yield hub, tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pushed(hub_and_home: tuple[HubServer, Path]) -> dict[str, Any]:
    hub, home = hub_and_home
    return run_client(PUSH_AND_LOAD, hub.environment(home))


def test_a_prior_comes_back_from_the_hub(pushed: dict[str, Any]) -> None:
    asked = ("newest", "oldest", "differ", "on the branch", "secret")
    assert {name: pushed[name] for name in asked} == dict.fromkeys(asked, True)
    assert pushed["inspected"] == 1


def test_every_push_is_one_commit(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path]
) -> None:
    hub, _ = hub_and_home
    repository = hub.repositories["tester/my-prior"]
    shas = [pushed[name].split("/")[-1] for name in ("first", "second", "branch")]
    assert pushed["second"] == f"{hub.url}/tester/my-prior/commit/{shas[1]}"
    assert repository.branches == {"main": shas[1], "wip": shas[2]}
    for sha in shas:
        files = {".gitattributes", FILE, "ncprior.json", "README.md"}
        assert repository.commits[sha].keys() == files
    assert len(repository.commits) == 4  # and the one that made the repository
    assert not repository.private and hub.repositories["tester/secret"].private


def test_the_card_on_the_hub_names_the_repository(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path]
) -> None:
    commit = hub_and_home[0].repositories["tester/my-prior"].commits[pushed["first"][-40:]]
    card = commit["README.md"].decode()
    assert 'NCPrior.from_pretrained(source, "tester/my-prior")' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "tester/vae"


def test_only_the_one_file_is_downloaded(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path], tmp_path: Path
) -> None:
    hub, _ = hub_and_home
    before = len(hub.requests)
    assert run_client(LOAD, hub.environment(tmp_path))["tester/my-prior"] == 1
    asked = [request for request in hub.requests[before:] if "/resolve/" in request]
    assert asked and all(request.endswith(f"/{FILE}") for request in asked)


ON_A_VAE = """
for number in range(2):
    url = prior.push_to_hub("tester/vae", card_data=None)
print(json.dumps({"url": url, "groups": try_to_load("tester/vae")}))
"""


def test_heads_go_into_the_repository_of_the_vae(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path]
) -> None:
    hub, home = hub_and_home
    vae = {"config.json": b"{}", "README.md": b"# My VAE\n", "model.bin": b"weights"}
    hub.repositories["tester/vae"] = Repository(private=False)
    hub.repositories["tester/vae"].commit("main", vae)
    found = run_client(ON_A_VAE, hub.environment(home))
    files = hub.repositories["tester/vae"].commits[found["url"][-40:]]
    assert {name: files.pop(name) for name in vae} == vae
    assert files.keys() == {FILE, "ncprior.json"} and found["groups"] == 1


CUT_OFF = """
import types
from huggingface_hub import file_download
file_download.time = types.SimpleNamespace(sleep=lambda seconds: None)
print(json.dumps({"error": try_to_load("tester/my-prior")}))
"""


def test_a_download_that_is_cut_off_is_a_connection_error(
    pushed: dict[str, Any],
    hub_and_home: tuple[HubServer, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send_half(handler: Any, body: bytes, headers: dict[str, str], **_: Any) -> None:
        if handler.command == "HEAD":
            send(handler, body, headers)
            return
        handler.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.close_connection = True

    send = _Handler._send
    monkeypatch.setattr(_Handler, "_send", send_half)
    hub, _ = hub_and_home
    error = run_client(CUT_OFF, hub.environment(tmp_path))["error"]
    assert f"The download of {FILE} from the Hub repository tester/my-prior broke off: " in error
    assert "Check the connection, or try again later." in error


def test_what_is_not_on_the_hub_is_named(pushed: dict[str, Any]) -> None:
    for reason, names in {
        "no repository": ["no directory tester/absent", "repository tester/absent. "],
        "no revision": ["repository tester/my-prior at revision absent. "],
    }.items():
        assert all(name in pushed[reason] for name in [*names, FILE])


def test_a_token_is_needed_for_writing_and_for_what_is_private(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path], tmp_path: Path
) -> None:
    hub, _ = hub_and_home
    found = run_client(STRANGER, hub.environment(tmp_path, token=None))
    assert found["public"] == 1
    assert "no directory tester/secret" in found["secret"]
    assert found["secret with a token"] == 1
    assert found["push"] == 401
    assert found["push with a token"].startswith(f"{hub.url}/tester/other/commit/")


def test_without_a_connection_what_was_downloaded_is_still_there(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path]
) -> None:
    hub, home = hub_and_home
    found = run_client(LOAD, hub.environment(home) | {"HF_HUB_OFFLINE": "1"})
    assert found["tester/my-prior"] == 1
    assert "no directory tester/never-seen" in found["tester/never-seen"]


def test_an_energy_comes_back_from_the_hub(
    pushed: dict[str, Any], hub_and_home: tuple[HubServer, Path]
) -> None:
    hub, home = hub_and_home
    found = run_client(ENERGY, hub.environment(home))
    repository = hub.repositories["tester/my-energy"]
    files = repository.commits[repository.branches["main"]]
    assert found["equal"] and repository.private and len(repository.commits) == 2
    assert files.keys() == {".gitattributes", "vaebm.safetensors", "vaebm.json", "README.md"}
    assert 'VAEBM.from_pretrained(source, "tester/my-energy")' in files["README.md"].decode()
    assert "vaebm.safetensors cannot be downloaded from a Hub repository" in found["absent"]


@pytest.mark.slow  # huggingface_hub tries for a minute
def test_a_hub_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with hub_server() as hub:
        environment = hub.environment(tmp_path)
    found = run_client(LOAD, environment)
    assert all(f"the Hub repository {name}: Connect" in error for name, error in found.items())
