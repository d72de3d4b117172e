"""What a command line or a YAML file says about the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.methods import MethodConfig

DEFAULT_METHOD = "duallora"


@dataclass(frozen=True)
class MethodChoice:
    """A method by name, and those of its fields that were set; whatever is not set is the method's default.

    Attributes:
        name: One of the registered methods; None where only fields were given.
        fields: Field name to value, of that method's configuration.
    """

    name: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> MethodConfig:
        """The method's whole configuration.

        Raises:
            DualLoRAError: A value that the method's configuration refuses.
        """
        from duallora.methods import METHODS

        return METHODS[self.name or DEFAULT_METHOD].config(**self.fields)

    def check_against(self, name: str, config: object) -> None:
        """Compares the choice with the method that a saved model was made with.

        Args:
            name: The saved model's method.
            config: Its configuration.

        Raises:
            DualLoRAError: The choice names another method, or another value of a field.
        """
        if self.name is not None and self.name != name:
            raise DualLoRAError(
                f"the model was made with --method {name}, not {self.name}; leave --method out, "
                "or teach the folder to a new model."
            )
        for key, value in self.fields.items():
            stored = getattr(config, key, None)
            if stored != value:
                raise DualLoRAError(
                    f"the model was made with --method.{key} {stored}, not {value}; leave it out, "
                    "or teach the folder to a new model."
                )


UNSAID = MethodChoice()
