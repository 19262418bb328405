"""Lets a class that has a constructor be registered with Modal, which refuses one.

`modal.App.cls` looks at ``TheClass.__init__`` and refuses everything but `object.__init__`, inherited constructors too,
because a constructor's arguments would not reach the container. Ours have defaults, so there is nothing to reach it:
whoever asks the class for its constructor is shown `object.__init__`, and its instances, those that Modal makes in a
container included, run the real one. The price: a constructor has to call that of its base by ``super().__init__``, for
``Base.__init__(self)`` asks the class.
"""

from collections.abc import Callable
from typing import Any, Self

from modal.cls import is_parameter


class _Constructor:
    """A constructor that is there for instances, and not for who looks at the class."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return object.__init__ if instance is None else self._function.__get__(instance, owner)


class Constructible:
    """The root of classes that Modal takes with their constructors, where these can be called without arguments."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        constructor = cls.__init__  # its own, or one that a class outside of this family brings along
        if constructor is not object.__init__:
            cls.__init__ = _Constructor(constructor)  # type: ignore[assignment, method-assign]  # see above

    def __new__(cls, *_args: Any, **_options: Any) -> Self:
        """Make an instance, ready for use where the class has parameters."""
        instance = super().__new__(cls)
        if any(is_parameter(value) for value in vars(cls).values()):
            # Of a class with `modal.parameter`s Modal makes instances by this method alone, and then sets those.
            instance.__init__()  # type: ignore[misc]  # on purpose
        return instance
