"""What a run will cost, stage by stage, before it starts: operations, bytes and time."""

from .planning import plan_training
from .training_plan import StagePlan, TrainingPlan

__all__ = ["StagePlan", "TrainingPlan", "plan_training"]
