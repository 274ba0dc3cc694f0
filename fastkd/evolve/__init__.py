"""Evolution of masks: operators, fitness, the run with its checkpoints.

All of it is imported from here: ``from fastkd.evolve import evolve, Fitness``.
"""

from ..population import QUALITIES, Quality
from ..population.masks import mask_id
from ..runtime.checkpoint import CheckpointError
from ..runtime.stopping import Stopped
from ..runtime.world import RankLost, World
from .adapter import Pymoo
from .algorithms import ALGORITHMS, ECS, GA, NSGA2, Algorithm, Random, Scores
from .callbacks import TensorBoard
from .fitness import Fitness, FitnessError, latency
from .limits import Limits
from .pareto import crowding_distance, hypervolume, nondominated, nondominated_sort
from .ranking import global_norm, uniform_l1
from .result import Callback, Individuals, Result, Seen
from .run import evolve

__all__ = [
    "ALGORITHMS",
    "ECS",
    "GA",
    "NSGA2",
    "QUALITIES",
    "Algorithm",
    "Callback",
    "CheckpointError",
    "Fitness",
    "FitnessError",
    "Individuals",
    "Limits",
    "Pymoo",
    "Quality",
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
