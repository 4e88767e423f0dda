"""Tables of named parts, imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torchmdnet.errors import ConfigError, did_you_mean

__all__ = ["Catalogue"]


class Catalogue(Mapping[str, Any]):
    """Names of one kind of part, each with the address of the object that implements it.

    Looking a name up imports its module. An address, ``"my_package.nets:MyNet"``, works in place of a name, so
    that a configuration can use parts from other packages.

    Args:
        key: Configuration key these names are values of; it opens the error message.
        addresses: ``name -> "module:object"``.
        base: Address of a class. Addresses from outside have to lead to subclasses of it: they can come from a model
            file, which must not choose what is called.
        needs: Methods that a class from outside must have.
    """

    def __init__(
        self, key: str, addresses: Mapping[str, str], base: str | None = None, needs: Sequence[str] = ()
    ) -> None:
        self.key = key
        self.addresses = dict(addresses)
        self.base = base
        self.needs = tuple(needs)

    def __getitem__(self, name: str) -> Any:
        address = self.addresses.get(name, name) if isinstance(name, str) else ""
        module, colon, attribute = address.partition(":")
        if not (module and not module.startswith(".") and colon and attribute):
            raise ConfigError(
                f"{self.key}: {name!r} is not available.{did_you_mean(name, self)} "
                f"Choose from {', '.join(self)}, or give 'my_package.module:Class'."
            )
        try:
            found = getattr(importlib.import_module(module), attribute)
            return found if name in self.addresses else self._checked(found, name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
                raise ConfigError(f"{self.key}: {name!r} names module {module!r}, which cannot be found.") from error
            raise
        except AttributeError as error:
            raise ConfigError(f"{self.key}: module {module!r} has no {attribute!r}.") from error

    def _checked(self, found: Any, name: str) -> Any:
        """Refuse what cannot be such a part, before it is called."""
        if self.base is not None:
            module, _, attribute = self.base.partition(":")
            base = getattr(importlib.import_module(module), attribute)
            if not (isinstance(found, type) and issubclass(found, base)):
                raise ConfigError(f"{self.key}: {name!r} is no subclass of {module}.{attribute}, so it cannot be used.")
        if self.needs:
            methods = " and ".join(f"{method}()" for method in self.needs)
            if not isinstance(found, type) or issubclass(found, (Sequence, Mapping, Set)):
                what = f"a plain {found.__name__}" if isinstance(found, type) else "no class"
                raise ConfigError(f"{self.key}: {name!r} is {what}. It takes a class with {methods}.")
            missing = [method for method in self.needs if not callable(getattr(found, method, None))]
            if missing:
                raise ConfigError(f"{self.key}: {name!r} has no {missing[0]}(). It takes a class with {methods}.")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.addresses

    def __iter__(self) -> Iterator[str]:
        return iter(self.addresses)

    def __len__(self) -> int:
        return len(self.addresses)

    def name_of(self, cls: type) -> str:
        """The catalogue name of a class, or its import address when it is not listed."""
        address = f"{cls.__module__}:{cls.__qualname__}"
        return next((name for name, known in self.addresses.items() if known == address), address)
