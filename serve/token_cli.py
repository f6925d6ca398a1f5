"""`cxr-ray token`: who may ask the service for what."""

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_ray.errors import UsageError
from cxr_ray.terminal import command_group, console, print_json, table
from serve.store_options import DEFAULT_STORE, AsJson, StoreUrl, opened

if TYPE_CHECKING:
    from serve.store import Token

app = command_group("Bearer tokens of the service: read sees studies, write also sends them, admin also manages.")
Name = Annotated[str, typer.Argument(help="Whose token it is; the audit calls its bearer so.")]


@app.command("add")
def add_token(
    name: Name,
    role: Annotated[str, typer.Option(help="read, write or admin; each may do what those before it may.")],
    expires_days: Annotated[int | None, typer.Option(help="Days until it is good no longer [never].")] = None,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Make a token and print its secret, which cannot be printed again."""
    from serve.store.records import require_role  # noqa: PLC0415

    if expires_days is not None and not 1 <= expires_days <= 36_500:
        raise UsageError(f"--expires-days is {expires_days}; give 1 to 36500 days, or leave it out")
    expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    known_role = require_role(role)
    with opened(store) as opened_store:
        secret = opened_store.add_token(name, known_role, expires_at)
    # Alone on standard output, so that it can go straight into a file.
    sys.stderr.write(f"the secret of {name!r} ({role}); only its digest is kept, so store it now:\n")
    sys.stdout.write(f"{secret}\n")


@app.command("list")
def list_tokens(json: AsJson = False, store: StoreUrl = DEFAULT_STORE) -> None:
    """List all tokens, without their secrets."""
    with opened(store) as opened_store:
        tokens = opened_store.tokens()
    if json:
        print_json([_as_json(token) for token in tokens])
        return
    columns = [("name", False), ("role", False), ("made", True), ("last used", True), ("state", False)]
    shown = table(f"{len(tokens)} tokens", columns)
    for token in tokens:
        used = "never" if token.last_used_on is None else f"{token.last_used_on}"
        shown.add_row(token.name, token.role, f"{token.created_at:%Y-%m-%d}", used, _state(token))
    console.print(shown)


@app.command("revoke")
def revoke_token(name: Name, store: StoreUrl = DEFAULT_STORE) -> None:
    """Let a token be good no longer, from the next request on."""
    with opened(store) as opened_store:
        opened_store.revoke_token(name)
    console.print(f"{name}: revoked")


def _state(token: "Token") -> str:
    if token.revoked_at:
        return f"revoked {token.revoked_at:%Y-%m-%d}"
    if token.expires_at is None:
        return "good"
    return f"{'expired' if token.expires_at <= datetime.now(UTC) else 'good until'} {token.expires_at:%Y-%m-%d}"


def _as_json(token: "Token") -> dict[str, str | None]:
    when = ("created_at", "expires_at", "last_used_on", "revoked_at")
    times = {name: getattr(token, name) for name in when}
    return {"name": token.name, "role": token.role} | {name: each and each.isoformat() for name, each in times.items()}
