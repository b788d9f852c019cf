"""The server against its own description: no request that schemathesis generates makes it fail."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from served_model import running_server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

CASES_PER_OPERATION = 150


def test_no_request_makes_the_server_fail(tiny_engine_folder: Path) -> None:
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text

    checked = settings(
        max_examples=CASES_PER_OPERATION, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    with running_server(tiny_engine_folder, max_queue=64) as running:
        description = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for found in description.get_all_operations():
            operation = found.ok()
            takes_anything = operation.body or operation.path_parameters
            for mode in schemathesis.GenerationMode if takes_anything else [schemathesis.GenerationMode.POSITIVE]:
                checked(given(operation.as_strategy(generation_mode=mode))(check))()
    assert statuses[200] > CASES_PER_OPERATION
    assert statuses[400] > CASES_PER_OPERATION
