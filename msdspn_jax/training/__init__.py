from msdspn_jax.training.config import TrainConfig
from msdspn_jax.training.outer import outer_optimizer
from msdspn_jax.training.task import Task, epoch_positions

__all__ = ["Task", "TrainConfig", "epoch_positions", "outer_optimizer"]
