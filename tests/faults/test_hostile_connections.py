"""Clients that send too much, too slowly or nothing do not keep a real service from its good clients."""

from pathlib import Path

from tests.faults.hostile import CONFIGURATION, KINDS, resident_mib, withstand
from tests.support.killed_server import KilledServer

LIMITS = {
    "MODALKIT_APP_SETTINGS__REQUEST_CONFIG__MAX_PENDING_BYTES": str(8 * 2**20),
    "MODALKIT_APP_SETTINGS__SERVER_CONFIG__HEADER_TIMEOUT_SECONDS": "1",
}
MAX_GROWTH_MIB = 200
"""What stalls would be 16 times 31 MiB alone, without a limit."""


def test_good_clients_are_served_and_memory_is_bounded_beside_hostile_connections(tmp_path: Path) -> None:
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    with KilledServer(tmp_path, **LIMITS) as server:
        before_mib = resident_mib(server)
        most_mib, probe = withstand(server, connections=16 * len(KINDS), seconds=3)
    assert probe.is_served, probe.statuses
    assert len(probe.latencies_s) > 0
    assert most_mib < before_mib + MAX_GROWTH_MIB
    assert "Traceback" not in server.said
