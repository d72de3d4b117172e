"""What a command line or a YAML file says about the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.methods import MethodConfig

DEFAULT_METHOD = "duallora"
# How a task is trained; all other fields decide what the saved weights mean.
TRAINING_FIELDS = frozenset(
    {
        "epochs",
        "first_epochs",
        "min_steps",
        "batch_size",
        "class_weights",
        "learning_rate",
        "head_learning_rate",
        "optimizer",
        "schedule",
        "weight_decay",
    }
)
_REMEDY = "leave it out, or teach the folder to a new model."


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

    def check_against(self, name: str, config: Mapping[str, Any]) -> None:
        """Compares the choice with the method of a saved model; how a task is trained may differ.

        Args:
            name: The saved model's method.
            config: Its configuration.

        Raises:
            DualLoRAError: The choice names another method, or another value of a field.
        """
        if self.name is not None and self.name != name:
            raise DualLoRAError(f"the model was made with --method {name}, not {self.name}; {_REMEDY}")
        for key, value in self.fields.items():
            if key not in config:
                raise DualLoRAError(
                    f"--method {name}, which the model was made with, has no {key}; {_REMEDY}"
                )
            if key not in TRAINING_FIELDS and config[key] != value:
                stored = config[key]
                raise DualLoRAError(
                    f"the model was made with --method.{key} {stored}, not {value}; {_REMEDY}"
                )


def just_these_epochs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields: who names epochs means just these, unless the least steps are named too."""
    return ({"min_steps": 0} if "epochs" in fields else {}) | dict(fields)


UNSAID = MethodChoice()
