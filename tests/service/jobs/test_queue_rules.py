"""Which queues a job may name."""

import pytest

from modalkit.service.jobs.queue_rules import QueueNotAllowedError, QueueRules
from modalkit.service.queue_backends import QueueNameError


class Raises:
    """A backend that says of a name what the test has it raise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def send_message(self, queue_name: str, message: str) -> bool:
        raise AssertionError

    def check_queue_name(self, queue_name: str) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit("odd")])
def test_whatever_a_backend_raises_for_a_name_refuses_that_name(error: BaseException) -> None:
    with pytest.raises(
        QueueNameError,
        match=f"success_queue: queue 'a': its backend cannot check the name: .*{type(error).__name__}: odd",
    ):
        QueueRules(["*"], Raises(error)).check("a", None)


def test_a_backends_own_refusal_is_passed_on_and_comes_after_ours() -> None:
    rules = QueueRules(["a*"], Raises(QueueNameError("a", "is too short")))
    with pytest.raises(QueueNameError, match="failure_queue: queue 'a': is too short"):
        rules.check(None, "a")
    with pytest.raises(
        QueueNotAllowedError, match=r"'b' is not allowed; allowed are: a\* \(queue_config.allowed_queues\)"
    ):
        rules.check(None, "b")
