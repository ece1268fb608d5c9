"""Low rank: contractions as products of thinner ones, chosen under a budget."""

from jaxcompress.lowrank._choose import Ranks as Ranks
from jaxcompress.lowrank._execute import Place as Place
from jaxcompress.lowrank._execute import execute as execute
from jaxcompress.lowrank._execute import places as places
from jaxcompress.lowrank._factorize import LowRank as LowRank
from jaxcompress.lowrank._factorize import factorize as factorize
from jaxcompress.lowrank._factors import Factors as Factors
from jaxcompress.lowrank._factors import densify as densify
from jaxcompress.lowrank._factors import restore as restore
from jaxcompress.lowrank._methods import SVD as SVD
from jaxcompress.lowrank._methods import ActivationSVD as ActivationSVD
from jaxcompress.lowrank._methods import Tucker2 as Tucker2
from jaxcompress.lowrank._report import FactorizedLeaf as FactorizedLeaf
from jaxcompress.lowrank._report import LowRankReport as LowRankReport
from jaxcompress.lowrank._svd import Pair as Pair
from jaxcompress.lowrank._svd import activation_svd as activation_svd
from jaxcompress.lowrank._svd import svd as svd
from jaxcompress.lowrank._tucker import ChannelSpectra as ChannelSpectra
from jaxcompress.lowrank._tucker import Tucker as Tucker
from jaxcompress.lowrank._tucker import spectra as spectra
from jaxcompress.lowrank._tucker import tucker2 as tucker2
