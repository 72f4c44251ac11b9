"""Devices by name, with their makers' peak figures, and how much of those a training is assumed to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

from limner.errors import LimnerError, suggest

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """bf16, fp32: peak of dense matrix products in FLOP/s (fp32: TF32 where the device has it), a multiply-add being
    two. memory: bytes. bandwidth: of that memory, bytes/s. link: to its neighbours in one machine, network: of the
    whole machine to others, bytes/s each way. a_machine: devices in one machine. reached: share of the peak in products
    and convolutions. moved: share of all bandwidths. compiles: whether Limner compiles long trainings there."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    a_machine: int
    reached: float
    moved: float
    compiles: bool = True


DEVICES = {
    device.name: device
    for device in (
        # SXM boards. NVLink's published figure counts both ways; a network adapter of 400 Gb/s (A100: 200) for each.
        Device("H100", 989.4 * TERA, 494.7 * TERA, 80 * GIGA, 3.35 * TERA, 450 * GIGA, 400 * GIGA, 8, 0.4, 0.8),
        Device("H200", 989.4 * TERA, 494.7 * TERA, 141 * GIGA, 4.8 * TERA, 450 * GIGA, 400 * GIGA, 8, 0.4, 0.8),
        Device("A100", 312 * TERA, 156 * TERA, 80 * GIGA, 2.039 * TERA, 300 * GIGA, 200 * GIGA, 8, 0.5, 0.8),
        # Dense, with float32 sums; PCIe 4.0 x16 between cards; Ethernet of 25 Gb/s.
        Device("RTX4090", 165.2 * TERA, 82.6 * TERA, 24 * GIGA, 1.008 * TERA, 32 * GIGA, 3.1 * GIGA, 8, 0.5, 0.8),
        # Two cores of Zen 4 at 3.7 GHz: 32 operations a cycle and core, twice as many in bf16.
        Device("CPU2", 0.474 * TERA, 0.237 * TERA, 16 * GIGA, 40 * GIGA, 1 * GIGA, 1 * GIGA, 1, 0.5, 0.5, False),
    )
}  # fmt: skip
_ASKED = re.compile(r"(?:(\d+)\s*[xX*]\s*)?(.+)")


@dataclass(frozen=True)
class Cluster:
    """`number` devices of a kind."""

    device: Device
    number: int

    @property
    def wire(self) -> float:
        """What a ring through all devices passes at, bytes/s, as assumed: the slowest of its links."""
        within = self.number <= self.device.a_machine
        return self.device.moved * (self.device.link if within else min(self.device.link, self.device.network))

    @property
    def wire_name(self) -> str:
        if self.number == 1:
            return "none"
        return "links within the machine" if self.number <= self.device.a_machine else "network between machines"


def cluster(asked: str) -> Cluster:
    """Devices such as "8xH100", "rtx 4090" or "cpu2". Raises LimnerError for an unknown one, or none at all."""
    match = _ASKED.fullmatch(asked.strip())
    known = {name.casefold(): device for name, device in DEVICES.items()}
    name = re.sub(r"[\s_-]", "", match[2]) if match else ""
    if name.casefold() not in known:
        raise LimnerError(f"devices '{asked}': should be such as 8xH100{suggest(name, DEVICES)}")
    number = int(match[1] or 1) if match else 1
    if not 1 <= number <= 100_000:
        raise LimnerError(f"devices '{asked}': should be 1 to 100000 of them, such as 8xH100")
    return Cluster(known[name.casefold()], number)
