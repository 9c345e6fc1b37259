"""How many devices a run uses, and along which axes."""

from dataclasses import dataclass

from dsv3.config.errors import require
from dsv3.config.schema import Node


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Node):
    """Devices along each axis of the mesh. `data`: replicas of the model, each with its own rows of every batch."""

    data: int

    def validate(self) -> None:
        require(self.data > 0, f"mesh.data is {self.data}; expected a positive number of devices")

    @property
    def n_devices(self) -> int:
        return self.data
