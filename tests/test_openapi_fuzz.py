"""The service against its own OpenAPI description: schemathesis sends what it allows and what it forbids."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunningService

HOOKS = Path(__file__).parent
# That every image and every date of the right form is accepted, no schema can promise.
UNPROMISED = "positive_data_acceptance"


@pytest.mark.ray
def test_what_comes_in_and_out_is_as_described(guarded_service: RunningService, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{guarded_service.url}/openapi.json"),
        *("--url", guarded_service.url, "--header", f"Authorization: Bearer {guarded_service.token}"),
        *("--max-examples", "15", "--seed", "1", "--request-timeout", "30", "--exclude-checks", UNPROMISED),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(HOOKS), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert tested and int(tested[1]) >= 15, done.stdout
