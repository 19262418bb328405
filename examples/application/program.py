"""A program that uses a model without HTTP."""

import anyio
from word_count import Text, WordCount

from modalkit import InferenceWorker, Priority, QueueFullError, Success


async def main() -> None:
    async with InferenceWorker(WordCount()) as worker:
        print(await worker.predict(Text(text="one two three"), timeout_s=5))
        try:
            outcomes = await worker.predict_many([{"text": "one"}, {"txt": "two"}], priority=Priority.BULK)
        except QueueFullError as error:  # more than batch_config.max_queue_size wait already
            print(error)
            return
        for outcome in outcomes:
            print(outcome.value if isinstance(outcome, Success) else type(outcome.error).__name__)


anyio.run(main)
