"""Evolution of masks: operators, fitness, the run with its checkpoints.

The function is ``fastkd.evolve.evolve``, with its parts beside it: ``from fastkd.evolve import Fitness, evolve``.
"""

from ..runtime.checkpoint import CheckpointError
from ..runtime.stopping import Stopped
from ..runtime.world import RankLost, World
from .adapter import Pymoo
from .algorithms import ALGORITHMS, ECS, GA, NSGA2, Algorithm, Random, Scores
from .budget import Limits, global_norm, uniform_l1
from .fitness import QUALITIES, Fitness, FitnessError, latency
from .pareto import crowding_distance, hypervolume, nondominated, nondominated_sort
from .run import Individuals, Result, Seen, TensorBoard, evolve, mask_id

__all__ = [
    "ALGORITHMS",
    "ECS",
    "GA",
    "NSGA2",
    "QUALITIES",
    "Algorithm",
    "CheckpointError",
    "Fitness",
    "FitnessError",
    "Individuals",
    "Limits",
    "Pymoo",
    "Random",
    "RankLost",
    "Result",
    "Scores",
    "Seen",
    "Stopped",
    "TensorBoard",
    "World",
    "crowding_distance",
    "evolve",
    "global_norm",
    "hypervolume",
    "latency",
    "mask_id",
    "nondominated",
    "nondominated_sort",
    "uniform_l1",
]
