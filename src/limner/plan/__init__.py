"""What a training takes, before it is begun: `limner plan`.

Parameters, arithmetic, memory and traffic are counted on the meta device, where tensors have shapes and no contents;
only the speeds are assumed, and said: see `devices.py`.
"""

from limner.plan.counting import Counts, count
from limner.plan.devices import DEVICES, Cluster, Device, cluster
from limner.plan.estimate import STRATEGIES, Estimate, Strategy, estimate
from limner.plan.report import Plan, plan, with_classes

__all__ = ["DEVICES", "STRATEGIES", "Cluster", "Counts", "Device", "Estimate", "Plan", "Strategy", "cluster", "count",
           "estimate", "plan", "with_classes"]  # fmt: skip
