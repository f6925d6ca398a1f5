"""docs/operations.md: the commands that it names are run where they can be; the others at least take their arguments."""

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from manifests import CLUSTER, KUBERAY, REPOSITORY, documents
from ray.serve.scripts import cli as serve_command
from result_peers import dead_instance, parcel

from cxr_ray.console import command_app
from cxr_ray.settings import load_settings
from serve.node.node import ListenSettings
from serve.node.outbox import Outbox
from serve.node.parcels import Letter
from serve.node.spool import Spool
from serve.node.spool_place import SPOOL_VARIABLE
from serve.service import ServeSettings
from serve.store import Store

PAGE = (REPOSITORY / "docs/operations.md").read_text()
RUNBOOK = PAGE.partition("## Runbook")[2]
PROMPT = re.compile(r"`(?:(\w+)\$ )?((?:cxr-ray|serve) [^`]+)`")
COMPOSE = documents(CLUSTER / "compose.yaml")[0]["services"]
# What a prompt stands for on one server, as the page's table has it.
SERVICES = dict(re.findall(r"^\| `(\w+)\$` \| `(\w+)` \| ", RUNBOOK, re.MULTILINE))
SPOOL = Path(re.findall(rf"^ENV {SPOOL_VARIABLE}=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[0])


@dataclass(frozen=True)
class Command:
    """A command of the page, and the prompt before it; empty where there is none."""

    prompt: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def _commands() -> list[Command]:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    found = [Command("", f"cxr-ray {rest}") for rest in re.findall(r"^[^#\n]*\bcxr-ray ([a-z][^\n#]*)", blocks, re.MULTILINE)]
    found += [Command(*each) for each in PROMPT.findall(re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))]
    return list(dict.fromkeys(found))


ALL = _commands()
OURS = [command for command in ALL if command.words[0] == "cxr-ray"]


def parse(words: list[str], command: object) -> None:
    """Take the arguments as the command would, group by group, and stop before it runs."""
    name, *arguments = words
    context = command.make_context(name, arguments)
    if hasattr(command, "resolve_command"):
        left = [*context._protected_args, *context.args]
        name, inner, rest = command.resolve_command(context, left)
        parse([name, *rest], inner)


def run(words: list[str]) -> None:
    command_app(words[1])(args=words[2:], prog_name=" ".join(words[:2]), standalone_mode=False)


def test_the_page_names_commands() -> None:
    assert {command.words[1] for command in OURS} >= {"bundle", "deadletter", "deliveries", "jobs", "token"}
    assert set(SERVICES) == {"node", "head", "work"}


@pytest.mark.parametrize("command", OURS, ids=lambda command: command.text)
def test_each_command_takes_what_it_is_given(command: Command) -> None:
    parse(command.words[1:], typer.main.get_command(command_app(command.words[1])))


def test_arguments_that_a_command_does_not_take_are_noticed() -> None:
    for text in ("cxr-ray deadletter list --all", "cxr-ray jobs logs", "cxr-ray bundle verfiy x", "cxr-ray token add NAME"):
        words = shlex.split(text)
        with pytest.raises(typer.BadParameter.__mro__[1]):
            parse(words[1:], typer.main.get_command(command_app(words[1])))


def test_commands_of_serve_are_those_that_it_has() -> None:
    others = [command for command in ALL if command.words[0] == "serve" and command.prompt]
    assert others
    for command in others:
        parse(command.words, serve_command)


def test_the_runbook_says_where_each_command_runs_and_it_has_there_what_it_needs() -> None:
    in_runbook = [Command(*each) for each in PROMPT.findall(RUNBOOK)]
    assert {command.text for command in in_runbook if not command.prompt} == set()
    for command in in_runbook:
        service = COMPOSE[SERVICES[command.prompt]]
        mounted = [volume.rpartition(":/")[2] for volume in service["volumes"] if not volume.endswith(":ro")]
        if command.words[1] in {"deadletter", "deliveries"}:
            assert any(SPOOL.is_relative_to(f"/{folder}") for folder in mounted), command
            assert "--spool" not in command.words
        elif command.words[1] == "bundle":
            assert any(Path(command.words[-1]).is_relative_to(f"/{folder}") for folder in mounted), command
        else:
            # Ray's dashboard on this very machine, and its token.
            assert "--dashboard-port=8265" in service["command"], command
            assert "RAY_AUTH_TOKEN" in service["environment"], command


def test_places_are_those_of_the_settings() -> None:
    for folder in (CLUSTER / "compose", KUBERAY / "base/config"):
        assert load_settings(ListenSettings, folder / "node.yaml", {}).spool == SPOOL
        bundle = load_settings(ServeSettings, folder / "serve.yaml", {}).bundle
        assert f"`{bundle}`" in RUNBOOK or f" {bundle}`" in RUNBOOK
    for component in re.findall(r"cxr-ray/component=(\w+)", RUNBOOK):
        assert any(f"cxr-ray/component: {component}" in path.read_text() for path in (KUBERAY / "base").glob("ray-*.yaml"))


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spool with a dead instance and a dead result, found by the image's variable alone."""
    root = tmp_path / "spool"
    made = Spool(root)
    dead_instance(made)
    outbox = Outbox(root / "outbox")
    outbox.add(parcel("0", "archive"))
    outbox.queue("archive").dead(
        parcel("0", "archive").id, Letter(reason="refused", detail="", when=datetime.now(UTC), attempts=1)
    )
    monkeypatch.setenv(SPOOL_VARIABLE, str(root))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize(
    "command", [each for each in OURS if each.words[1] in {"deadletter", "deliveries"}], ids=lambda command: command.text
)
def test_commands_that_look_into_the_spool_find_it(command: Command, spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = [letter.name for letter in Spool(spool).dead_letters()]
    words = shlex.split(command.text.replace("--destination NAME", "--destination archive").replace("NAME", name))
    run(words)
    assert capsys.readouterr().out.strip()
    if "replay" in words:
        assert bool(Spool(spool).pending()) == (name in words)
        assert bool(Outbox(spool / "outbox").queue("archive").waiting()) == ("archive" in words)


def test_the_node_uses_the_spool_that_the_commands_look_into(spool: Path) -> None:
    assert ListenSettings().spool == spool
    assert ListenSettings(spool=Path("elsewhere")).spool == Path("elsewhere")


def test_the_bundle_is_verified(untrained_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verifying = [command.words for command in OURS if command.words[1] == "bundle"]
    assert verifying
    for words in verifying:
        run([*words[:-1], str(untrained_bundle)])
        assert "intact" in capsys.readouterr().out


def test_tokens_are_made_and_revoked(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/results.sqlite"
    filled = {"NAME": "OLD", "ROLE": "write", "URL": store, "postgresql+psycopg://cxr_ray@postgresql/cxr_ray": store}
    making = [[filled.get(word, word) for word in command.words] for command in OURS if command.words[1] == "token"]
    assert len(making) == 3
    for words in making:
        run(words)
    opened = Store(store)
    assert {token.name: token.revoked_at is not None for token in opened.tokens()} == {"OLD": True, "node": False}
    opened.close()
