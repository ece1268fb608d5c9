"""Training: optimizer chains, a jitted and sharded step, a fit loop that resumes bit for bit."""

from jaxcompress.train import schedules as schedules
from jaxcompress.train._optimizer import GD as GD
from jaxcompress.train._optimizer import SGD as SGD
from jaxcompress.train._optimizer import Adagrad as Adagrad
from jaxcompress.train._optimizer import Adam as Adam
from jaxcompress.train._optimizer import AdamW as AdamW
from jaxcompress.train._optimizer import Lion as Lion
from jaxcompress.train._optimizer import Momentum as Momentum
from jaxcompress.train._optimizer import Muon as Muon
from jaxcompress.train._optimizer import Nesterov as Nesterov
from jaxcompress.train._optimizer import OptimizerConfig as OptimizerConfig
from jaxcompress.train._optimizer import RMSProp as RMSProp
from jaxcompress.train._optimizer import optimizer as optimizer
from jaxcompress.train._precision import Precision as Precision
from jaxcompress.train._sharding import shard as shard
from jaxcompress.train._state import State as State
from jaxcompress.train._state import init as init
from jaxcompress.train._step import Aux as Aux
from jaxcompress.train._step import Step as Step
from jaxcompress.train._step import make_step as make_step
from jaxcompress.train._trainable import default_trainable as default_trainable
