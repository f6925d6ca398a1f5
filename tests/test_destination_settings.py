"""Settings of destinations: what they mean, and what is said of those that make no sense."""

from pathlib import Path

import pytest

from cxr_ray.errors import UsageError
from cxr_ray.settings import Settings, load_settings
from serve.node.destinations import DeliverySettings


class _Node(Settings):
    delivery: DeliverySettings = DeliverySettings()


PACS = "{kind: dicom, name: pacs, host: pacs.example, port: 104, called_ae: PACS"


@pytest.mark.parametrize(
    ("destinations", "says"),
    [
        ("[{kind: fax, name: a}]", r"delivery.destinations.0.* 'fax'"),
        (f"[{PACS}, port: 0}}]", "port"),
        (f"[{PACS}, name: Über}}]", "name"),
        (f"[{PACS}, results: []}}]", "results"),
        (f"[{PACS}, results: [sr, sr]}}]", "names a kind of result twice"),
        (f"[{PACS}, results: [pdf]}}]", "results"),
        (f"[{PACS}, sr_class: basic}}]", "sr_class"),
        (f"[{PACS}, called_ae: seventeen-letters}}]", "called_ae"),
        (f"[{PACS}, tls: {{key: a.pem}}}}]", "name the certificate's file too"),
        (f"[{PACS}, tsl: null}}]", "tsl"),
        (f"[{PACS}}}, {PACS}}}]", "destinations pacs stand there twice"),
        ("[{kind: sender}]", "give peers or default_port"),
        ("[{kind: sender, peers: {CT1: eleven}}]", "CT1: 'eleven' is neither PORT nor HOST:PORT"),
        ("[{kind: stow, name: a, url: 'https://user:secret@pacs/'}]", "url"),
        ("[{kind: webhook, name: a, url: 'ftp://pacs/'}]", "url"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(tmp_path: Path, destinations: str, says: str) -> None:
    # A later key of the same name wins in YAML: each case spoils one setting of a good destination.
    (tmp_path / "node.yaml").write_text(f"delivery: {{destinations: {destinations}}}")
    with pytest.raises(UsageError, match=says) as raised:
        load_settings(_Node, tmp_path / "node.yaml", {})
    assert "\n" not in str(raised.value)


def test_settings_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(
        f"""delivery:
  destinations:
  - {PACS}, commitment: true, tls: {{ca: ca.pem}}}}
  - {{kind: stow, name: cloud, url: 'https://cloud.example/dicom-web', token_file: token, results: [sr]}}
  - {{kind: webhook, name: ris, url: 'https://ris.example/results', hmac_secret_file: secret}}
  - {{kind: sender, peers: {{CT1: 104, CR2: '[fe80::1]:105'}}, default_port: 11112}}
"""
    )
    settings = load_settings(_Node, tmp_path / "node.yaml", {}).delivery
    pacs, cloud, ris, sender = settings.destinations
    assert (pacs.sr_class, pacs.results, pacs.commitment.resends) == ("comprehensive-3d", ("sr", "sc"), 5)
    assert (cloud.results, ris.kind, sender.name) == (("sr",), "webhook", "sender")
    assert sender.port_of("CT1", "10.0.0.1") == ("10.0.0.1", 104)
    assert sender.port_of("CR2", "10.0.0.1") == ("fe80::1", 105)
    assert sender.port_of("MR3", "10.0.0.1") == ("10.0.0.1", 11112)
