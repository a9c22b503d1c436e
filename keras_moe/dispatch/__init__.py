"""How tokens travel to their experts and back, on one device."""

from keras_moe.dispatch.capacity import expert_capacity, limit_capacity
from keras_moe.dispatch.dropless import combine, sort_by_expert

__all__ = ["combine", "expert_capacity", "limit_capacity", "sort_by_expert"]
