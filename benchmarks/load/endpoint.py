"""Where requests go, how items become requests, and where an answer has its label."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlsplit

from modalkit.benchmarks.load.plan import OptionError

Item = Mapping[str, Any]

LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL that takes items by POST requests. Raises `OptionError` for a template of one item where lists are sent."""

    url: str
    body: Any = "$item"
    """A JSON template. ``$item`` is the item, ``$NAME`` its field NAME, ``$count`` the number of items, and
    ``{"$each": part}`` the list of the parts of all items. Lists need one of these."""
    answer: str | None = None
    """The path of an item's label in the answer, as ``data.0.label``; ``*`` stands for each item of a list."""
    headers: Mapping[str, str] = field(default_factory=dict)
    list_length: int = 1
    """Items of a request."""
    content_type: str = "application/json"
    error_mark: bytes = b""
    """What the answer to a list has once for each item that failed."""

    def __post_init__(self) -> None:
        if self.list_length > 1 and self.content_type != LINES and not _has_each(self.body):
            example = '{"inputs": {"$each": "$text"}}'
            raise OptionError(
                f"this --body sends one item, not the {self.list_length} of a request: name the list of all, as "
                f"{example}, or give --list-length 1"
            )

    def requests(self, items: Sequence[Item]) -> list[bytes]:
        """The HTTP requests for the items, in lists of `list_length` that begin again where the items end."""
        count = self.request_count(items)
        return [self.request(self.content(self.items_of(items, index))) for index in range(count)]

    def request(self, body: bytes) -> bytes:
        """The HTTP request with this body."""
        parts = urlsplit(self.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Host": parts.netloc.rpartition("@")[2],
            "Content-Type": self.content_type,
            **self.headers,
            "Content-Length": str(len(body)),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body

    def request_count(self, items: Sequence[Item]) -> int:
        """How many different requests the items make."""
        return -(-len(items) // self.list_length)

    def items_of(self, items: Sequence[Any], index: int) -> list[Any]:
        """What belongs to the request of that index: of the items, or of their labels."""
        begin = index * self.list_length
        return list(itertools.islice(itertools.cycle(items), begin, begin + self.list_length))

    def content(self, items: Sequence[Item]) -> bytes:
        """The body of a request for these items."""
        if self.content_type == LINES:
            return b"".join(_compact(filled(self.body, [item])) + b"\n" for item in items)
        return _compact(filled(self.body, items))

    def labels(self, body: bytes) -> list[str | None]:
        """The label of each item in an answer; None where there is none."""
        try:
            if self.content_type == LINES:
                rows = sorted(map(json.loads, body.splitlines()), key=lambda row: row.get("index", 0))
                return [_text(found(row, self.answer or "")) for row in rows]
            value = found(json.loads(body), self.answer or "")
        except ValueError:
            return [None] * self.list_length
        return [_text(label) for label in value] if isinstance(value, list) else [_text(value)]


def _has_each(template: Any) -> bool:
    if isinstance(template, Mapping):
        return set(template) == {"$each"} or any(map(_has_each, template.values()))
    return isinstance(template, list) and any(map(_has_each, template))


def filled(template: Any, items: Sequence[Item]) -> Any:
    """The template with the items in it. Raises `OptionError` for a field that an item has not."""
    if isinstance(template, str) and template.startswith("$"):
        name = template[1:]
        if name == "item":
            return items[0]
        if name == "count":
            return len(items)
        if name not in items[0]:
            raise OptionError(f"an item has no field {name!r}; it has {', '.join(items[0])}")
        return items[0][name]
    if isinstance(template, Mapping):
        if set(template) == {"$each"}:
            return [filled(template["$each"], [item]) for item in items]
        return {name: filled(part, items) for name, part in template.items()}
    return [filled(part, items) for part in template] if isinstance(template, list) else template


def found(value: Any, path: str) -> Any:
    """What is at the path; None where there is no such place, and a list where the path has a ``*``."""
    name, _, rest = path.partition(".")
    if not name:
        return value
    if name == "*":
        return [found(part, rest) for part in value] if isinstance(value, list) else None
    try:
        return found(value[int(name) if isinstance(value, list) else name], rest)
    except (KeyError, IndexError, ValueError, TypeError):
        return None


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, dict | list) else str(value)


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def model_query(model: str | None) -> str:
    """The query by which a modalkit server is asked for a model; empty for its first one."""
    return f"?model_name={quote(model, safe='')}" if model else ""


def _ours(url: str, model: str | None, length: int) -> Endpoint:
    query = model_query(model)
    if length == 1:
        return Endpoint(f"{url}/sync/predict{query}", answer="sentiment")
    return replace(
        Endpoint(f"{url}/batch/predict{query}", {"$each": "$item"}, "*.sentiment", error_mark=b'"status":"error"'),
        list_length=length,
    )


def _list_or_one(one: Any, each: Any, length: int) -> Any:
    return one if length == 1 else {"$each": each}


def _tei(url: str, model: str | None, length: int) -> Endpoint:  # noqa: ARG001  # a server has one model
    return Endpoint(
        f"{url}/predict",
        {"inputs": _list_or_one("$text", ["$text"], length)},
        "0.label" if length == 1 else "*.0.label",
    )


def _tei_embed(url: str, model: str | None, length: int) -> Endpoint:  # noqa: ARG001  # a server has one model
    return Endpoint(f"{url}/embed", {"inputs": _list_or_one("$text", "$text", length)})


def _vllm(url: str, model: str | None, length: int) -> Endpoint:
    body = {"input": _list_or_one("$text", "$text", length), **({"model": model} if model else {})}
    return Endpoint(f"{url}/classify", body, "data.*.label")


def _infinity(url: str, model: str | None, length: int) -> Endpoint:  # noqa: ARG001  # always a list
    return Endpoint(f"{url}/classify", {"input": {"$each": "$text"}, "model": model or "default"}, "data.*.0.label")


def _litserve(url: str, model: str | None, length: int) -> Endpoint:  # noqa: ARG001  # one item a request
    return Endpoint(f"{url}/predict", "$item", "label")


def _kserve(url: str, model: str | None, length: int) -> Endpoint:  # noqa: ARG001  # always a tensor
    tensor = {"name": "text", "shape": ["$count"], "datatype": "BYTES", "data": {"$each": "$text"}}
    name = quote(model or "model", safe="")
    return Endpoint(f"{url}/v2/models/{name}/infer", {"inputs": [tensor]}, "outputs.0.data.*")


PRESETS: Mapping[str, Callable[[str, str | None, int], Endpoint]] = {
    "ours": _ours,
    "tei": _tei,
    "tei-embed": _tei_embed,
    "vllm": _vllm,
    "litserve": _litserve,
    "infinity": _infinity,
    "kserve": _kserve,
}
"""By the kind of server: how its items are sent to a base URL, for a model of that name, in lists of that length."""


def preset(kind: str, url: str, *, model: str | None = None, list_length: int = 1) -> Endpoint:
    """The endpoint of a server of that kind (`PRESETS`) at its base URL. Raises `KeyError`, and `OptionError`."""
    if kind == "litserve" and list_length > 1:
        raise OptionError("LitServe takes one item in a request; give --body for an API of your own that takes lists")
    endpoint = PRESETS[kind](url.rstrip("/"), model, list_length)
    return replace(endpoint, list_length=list_length)
